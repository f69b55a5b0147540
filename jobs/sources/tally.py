"""What a split holds: counts for dataset.json, and the checks that need them all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jobs.sources import GoodRow, SourceError
from mmagent import targets
from mmagent.targets import TaskInfo

_FEW_GROUPS = 50
_TWO_LABELS = ("classify", "relate")  # with one label there is nothing to tell apart
_SOME_LABEL = ("multilabel", "tag")


class TaskTally:
    """The rows of one task in one split."""

    def __init__(self) -> None:
        self.rows = 0
        self.labels: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # label -> where it occurs first
        self.first_row = ""
        self._mean = self._squares = 0.0

    def add(self, row: GoodRow) -> None:
        place = f"{row.file} row {row.number}"
        self.first_row = self.first_row or place
        self.rows += 1
        for label in targets.labels_of(row.record):
            self.labels[label] += 1
            self.first.setdefault(label, place)
        if row.record.target.value is not None:  # Welford's update: one pass, and no difference of large sums
            step = row.record.target.value - self._mean
            self._mean += step / self.rows
            self._squares += step * (row.record.target.value - self._mean)

    def info(self, task: str, rows: Mapping[str, int]) -> TaskInfo:
        """This task as dataset.json has it, `self` being its training rows."""
        labels = tuple(sorted(self.labels))
        mean = deviation = None
        if targets.kind(task) == "regress":
            mean, deviation = self._mean, math.sqrt(self._squares / max(self.rows, 1))
        return TaskInfo(task, labels, {label: self.labels[label] for label in labels}, mean, deviation, rows)


class Tally:
    """The rows of one split."""

    def __init__(self) -> None:
        self.rows = 0
        self.tasks: dict[str, TaskTally] = {}
        self._counts: dict[str, Counter[str]] = {key: Counter() for key in ("modalities", "forms")}
        self.groups: set[str] = set()  # as far as they are few, which is when they make a split empty

    def add(self, row: GoodRow) -> None:
        record = row.record
        self.rows += 1
        self.tasks.setdefault(record.task, TaskTally()).add(row)
        self._counts["modalities"][record.modalities] += 1
        if form := record.meta.get("form"):
            self._counts["forms"][form] += 1
        if (group := record.meta.get("group")) and len(self.groups) < _FEW_GROUPS:
            self.groups.add(group)

    def to_dict(self) -> dict[str, Any]:
        """The counts of a split: its rows, and those of each task, kind of input, form and label."""
        labels: Counter[str] = Counter()
        for task in self.tasks.values():
            labels += task.labels
        counts = {"tasks": Counter({name: task.rows for name, task in self.tasks.items()}), **self._counts}
        counts["labels"] = labels
        return {"rows": self.rows} | {key: dict(sorted(count.items())) for key, count in counts.items()}


def tasks(tallies: Mapping[str, Tally]) -> dict[str, TaskInfo]:
    """Every task of training; the one with most rows first, which is the data set's default."""
    train = tallies["train"].tasks
    return {
        name: train[name].info(
            name, {split: tally.tasks[name].rows if name in tally.tasks else 0 for split, tally in tallies.items()}
        )
        for name in sorted(train, key=lambda name: (-train[name].rows, name))
    }


def check(tallies: Mapping[str, Tally], cut: tuple[str, ...]) -> None:
    """
    Raises:
        SourceError: an empty split, a task or a label that training never has, a task with too few labels to learn, or
            values that are all the same.
    """
    rows = {split: tally.rows for split, tally in tallies.items()}
    for split, tally in tallies.items():
        if not tally.rows:
            raise SourceError(f"the split {split} is empty (rows: {rows}){_why_empty(tallies, split in cut)}")
    for split, tally in tallies.items():
        for name, task in tally.tasks.items():
            if name not in tallies["train"].tasks:
                raise SourceError(f"{task.first_row}: the task {name!r} is in {split}, but training never has it")
            _check_labels(split, name, task, tallies["train"].tasks[name], split in cut)
    for name, info in tasks(tallies).items():
        _check_enough(name, info)


def _check_labels(split: str, name: str, task: TaskTally, train: TaskTally, cut: bool) -> None:
    for label in sorted(task.labels.keys() - train.labels.keys()):
        raise SourceError(
            f"{task.first[label]}: the label {label!r} of {name} is in {split}, but training never has it; "
            f"training has {_some(sorted(train.labels))}"
            + ("; another --seed may cut better, or give a column split" if cut else "")
        )


def _check_enough(name: str, info: TaskInfo) -> None:
    wanted = 2 if info.kind in _TWO_LABELS else 1 if info.kind in _SOME_LABEL else 0
    if len(info.labels) < wanted:
        seen = f"the labels {_some(list(info.labels))}" if info.labels else "no label at all"
        raise SourceError(f"training has {seen}, but {('one', 'two')[wanted - 1]} or more are wanted for {name}")
    if info.kind == "regress" and not info.deviation:
        raise SourceError(f"every value of {name} in training is {info.mean:g}: there is nothing to learn")


def _why_empty(tallies: Mapping[str, Tally], cut: bool) -> str:
    if not cut:
        names = next(split for split, tally in tallies.items() if not tally.rows)
        return f"; give rows with split={names}"
    train = tallies["train"]
    if train.rows and all(task.rows == len(task.labels) for task in train.tasks.values()):
        return ": each label has one row, which stays in training; give more rows of a label"
    groups = set().union(*(each.groups for each in tallies.values()))
    why = f": rows of one group stay together, and there are {len(groups)} groups" if groups else ""
    return f"{why if len(groups) < _FEW_GROUPS else ''}; give another --seed, a larger share, or more rows"


def _some(labels: list[str]) -> str:
    return ", ".join(map(repr, labels[:10])) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
