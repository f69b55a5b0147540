"""What a split holds: counts for dataset.json, and the checks that need them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from jobs.sources import GoodRow, SourceError

_FEW_GROUPS = 50


class Tally:
    def __init__(self) -> None:
        self.rows = 0
        self._counts: dict[str, Counter[str]] = {key: Counter() for key in ("tasks", "modalities", "forms", "labels")}
        self._first: dict[str, str] = {}  # label -> where it occurs first
        self.groups: set[str] = set()  # as far as they are few, which is when they make a split empty

    def add(self, row: GoodRow) -> None:
        record = row.record
        label = record.target.label
        assert label is not None
        self.rows += 1
        self._counts["tasks"][record.task] += 1
        self._counts["modalities"][record.modalities] += 1
        self._counts["labels"][label] += 1
        if form := record.meta.get("form"):
            self._counts["forms"][form] += 1
        if (group := record.meta.get("group")) and len(self.groups) < _FEW_GROUPS:
            self.groups.add(group)
        if label not in self._first:
            self._first[label] = f"{row.file} row {row.number}"

    @property
    def labels(self) -> list[str]:
        return sorted(self._first)

    def first(self, label: str) -> str:
        return self._first[label]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows} | {key: dict(sorted(counts.items())) for key, counts in self._counts.items()}


def check(tallies: Mapping[str, Tally], cut: tuple[str, ...]) -> None:
    """Raises SourceError for an empty split, a label that training never has, or fewer than two labels."""
    rows = {split: tally.rows for split, tally in tallies.items()}
    for split, tally in tallies.items():
        if not tally.rows:
            advice = "another --seed, a larger share, or more rows" if split in cut else f"rows with split={split}"
            groups = set().union(*(each.groups for each in tallies.values()))
            why = f": rows of one group stay together, and there are {len(groups)} groups" if groups else ""
            why = why if split in cut and len(groups) < _FEW_GROUPS else ""
            raise SourceError(f"the split {split} is empty (rows: {rows}){why}; give {advice}")
    trained = set(tallies["train"].labels)
    for split, tally in tallies.items():
        for label in tally.labels:
            if label not in trained:
                raise SourceError(
                    f"{tally.first(label)}: the label {label!r} is in {split}, but training never has it; "
                    f"training has {_some(tallies['train'].labels)}"
                    + ("; another --seed may cut better, or give a column split" if split in cut else "")
                )
    if len(trained) < 2:
        raise SourceError(f"training has the labels {_some(sorted(trained))}, but two or more are wanted")


def _some(labels: list[str]) -> str:
    return ", ".join(map(repr, labels[:10])) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
