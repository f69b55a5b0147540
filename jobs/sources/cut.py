"""Cuts validation and test out of training where a source does not name them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from jobs.sources import SourceError
from mmagent.record import Record


class Cut:
    """A seeded hash of a record's group, or else of its id, chooses its split: rows of one group stay together, and
    a row stays where it is when other rows come or go."""

    def __init__(self, seed: int, shares: Mapping[str, float], named: Collection[str]) -> None:
        """`shares` of training, by split; a split in `named` is in the source already and is not cut."""
        for split, share in shares.items():
            if not 0 < share < 1:
                raise SourceError(f"the share of {split} is {share:g}, but a number between 0 and 1 is wanted")
        if sum(shares.values()) >= 1:
            raise SourceError(f"the shares {dict(shares)} leave nothing for training: their sum must be below 1")
        self._seed = seed
        self._shares = {split: share for split, share in shares.items() if split not in named}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are cut."""
        return tuple(self._shares)

    def split_of(self, record: Record) -> str:
        if record.split not in (None, "train"):
            return str(record.split)
        key = f"{self._seed}/{record.meta.get('group') or record.id}"
        place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
        for split, share in self._shares.items():
            if place < share:
                return split
            place -= share
        return "train"
