"""Watches a bundle that took another's place, or a share of its traffic, and says when it does worse in life: called
wrong more often, or unsure more often, than the one it is set beside.

Both are shares of answers. The new one's has to be above the old one's by more than the rule allows, and surely above
it, by a one-sided test of two proportions (pooled; level 0.005). Each replica watches what it answers itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_LEAST_ANSWERS, _LEAST_VERDICTS = 50, 20  # of each bundle
_SURE = 2.576  # standard errors
_REMEMBERED = 10_000  # answers whose verdict may change


@dataclass(slots=True)
class Record:
    """What became of a bundle's answers: how many, and how many of them were unsure; judged, and wrong."""

    answers: int = 0
    unsure: int = 0
    verdicts: int = 0
    wrong: int = 0


@dataclass(slots=True)
class Sentinel:
    """
    Args:
        most: by how much a share may be above the other bundle's; none: nothing is compared.
    """

    most: float | None
    records: dict[str, Record] = field(default_factory=dict)  # by a bundle's seal
    _wrong: dict[tuple[str, str], bool] = field(default_factory=dict)  # of a bundle and an answer: the last word on it

    def answered(self, bundle: str, *, unsure: bool) -> None:
        found = self.records.setdefault(bundle, Record())
        found.answers += 1
        found.unsure += unsure

    def judged(self, bundle: str, answer: str, says: str) -> None:
        """Takes a verdict of a user's: right, wrong, or something else, which counts as none. Who judges one answer
        again changes what was said of it, and adds nothing."""
        if says not in ("right", "wrong"):
            return
        found, place = self.records.setdefault(bundle, Record()), (bundle, answer)
        before = self._wrong.pop(place, None)
        self._wrong[place] = says == "wrong"
        if len(self._wrong) > _REMEMBERED:
            del self._wrong[next(iter(self._wrong))]
        found.verdicts += before is None
        found.wrong += (says == "wrong") - bool(before)

    def complaint(self, new: str, old: str) -> str | None:
        """What is wrong with a new bundle beside an old one, if anything."""
        if self.most is None or new == old or not {new, old} <= self.records.keys():
            return None
        a, b = self.records[new], self.records[old]
        if min(a.verdicts, b.verdicts) >= _LEAST_VERDICTS and self._worse(a.wrong, a.verdicts, b.wrong, b.verdicts):
            return f"{a.wrong} of {a.verdicts} answers were called wrong, {b.wrong} of {b.verdicts} before"
        if min(a.answers, b.answers) >= _LEAST_ANSWERS and self._worse(a.unsure, a.answers, b.unsure, b.answers):
            return f"{a.unsure} of {a.answers} answers were unsure, {b.unsure} of {b.answers} before"
        return None

    def forget(self, bundle: str) -> None:
        """A bundle that comes again begins anew."""
        self.records.pop(bundle, None)
        self._wrong = {place: wrong for place, wrong in self._wrong.items() if place[0] != bundle}

    def _worse(self, hits: int, count: int, other: int, of: int) -> bool:
        assert self.most is not None
        apart, pooled = hits / count - other / of, (hits + other) / (count + of)
        error = math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / of))
        return apart > self.most and apart > _SURE * error
