"""Cuts validation and test out of training where a source does not name them."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Mapping

from jobs.sources import SourceError
from mmagent import targets
from mmagent.record import Record

_GOLDEN = (5**0.5 - 1) / 2


class Cut:
    """Chooses each record's split, in the order of the source, so that a row stays where it is when others are added
    at the end.

    Rows of one group stay together: a seeded hash of the group chooses. Where each row has one label and there are no
    groups, the cut is stratified: of each run of rows with one label, as many as make up one row of the shares, a
    seeded draw sends one. Else a seeded hash of the id chooses. The first row with a label that training does not have
    yet stays in training, unless its group decides.
    """

    def __init__(self, seed: int, shares: Mapping[str, float], named: Collection[str]) -> None:
        """`shares` of training, by split; a split in `named` is in the source already and is not cut."""
        for split, share in shares.items():
            if not 0 < share < 1:
                raise SourceError(f"the share of {split} is {share:g}, but a number between 0 and 1 is wanted")
        if sum(shares.values()) >= 1:
            raise SourceError(f"the shares {dict(shares)} leave nothing for training: their sum must be below 1")
        self._seed = seed
        self._shares = {split: share for split, share in shares.items() if split not in named}
        self._trained: set[tuple[str, str]] = set()  # (task, label) that training has
        self._seen: Counter[tuple[str, str]] = Counter()  # (task, label) -> rows cut so far

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are cut."""
        return tuple(self._shares)

    def split_of(self, record: Record) -> str:
        if record.split not in (None, "train"):
            return str(record.split)
        if group := record.meta.get("group"):
            return self._drawn(group)
        names = [(record.task, label) for label in targets.labels_of(record)]
        if not self._trained.issuperset(names):
            self._trained.update(names)
            return "train"
        if targets.kind(record.task) in ("classify", "relate"):
            return self._stratified(names[0])
        return self._drawn(record.id)

    def _drawn(self, key: str) -> str:
        """By the hash of a key."""
        digest = hashlib.blake2b(f"{self._seed}/{key}".encode(), digest_size=8).digest()
        return self._share_at(int.from_bytes(digest) / 2**64)

    def _stratified(self, name: tuple[str, str]) -> str:
        """By how many rows of this task and label came before: each run of 1 / (sum of shares) rows has one that is
        cut, at a seeded place; the golden ratio's multiples say to which split (they lie evenly however many)."""
        number, total = self._seen[name], sum(self._shares.values())
        self._seen[name] += 1
        for turn in range(int(number * total), int((number + 1) * total) + 1) if total else ():
            if int((turn + random.Random(f"{self._seed}/{name}/{turn}").random()) / total) == number:
                return self._share_at((turn * _GOLDEN + random.Random(f"{self._seed}/{name}").random()) % 1 * total)
        return "train"

    def _share_at(self, place: float) -> str:
        """The split at a place from 0 to 1, when each takes up its share; the rest is training."""
        for split, share in self._shares.items():
            if place < share:
                return split
            place -= share
        return "train"
