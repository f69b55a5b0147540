"""Transfer: a bundle asked another domain's questions: which of its tasks answers which of the data set's, and what it
reaches at home.

Tasks of one name are one task. Of the others, those of one kind are matched where they have labels in common, most
first; kinds without labels (regress, match, extract, generate) where there is one of the kind. A label that the bundle
does not know is never answered: those rows count as wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.summary import some
from mmagent.bundle import Bundle
from mmagent.predictions import EvaluationError
from mmagent.shards import Dataset
from mmagent.targets import TaskInfo


@dataclass(frozen=True, slots=True)
class Match:
    """A task of the data set, and the bundle's that answers it."""

    asked: str
    answered: str
    shared: tuple[str, ...]  # labels that both have
    unknown: tuple[str, ...]  # labels of the data set that the bundle has not

    def told(self, bundle: str, data: str) -> str:
        """What is said of a match that is not the same thing twice; empty of one that is."""
        if self.asked == self.answered and not self.unknown:
            return ""
        labels = len(self.shared) + len(self.unknown)
        known = f"{len(self.shared)} of its {labels} labels are the bundle's" if labels else "a kind without labels"
        lacks = f"; not {some(self.unknown)}" if self.unknown else ""
        return f"the task {self.asked} of {data} is answered by {self.answered} of {bundle}: {known}{lacks}"


def match(bundle: Bundle, dataset: Dataset, wanted: Mapping[str, str] | None = None) -> tuple[Match, ...]:
    """Which tasks of a data set a bundle can be asked.

    Args:
        wanted: the bundle's task for a task of the data set, where the user says it.

    Raises:
        EvaluationError: none can; two tasks of the bundle would serve alike; or a wanted one is not there.
    """
    own, other = bundle.tasks, dataset.tasks
    pairs: dict[str, str] = {}
    for asked, answered in (wanted or {}).items():
        _check_wanted(asked, answered, bundle, dataset)
        pairs[asked] = answered
    for name in sorted(set(own) & set(other) - set(pairs) - set(pairs.values())):
        pairs[name] = name
    for name in sorted(set(other) - set(pairs)):
        free = {key: info for key, info in own.items() if key not in pairs.values()}
        if (found := _nearest(other[name], free)) is not None:
            pairs[name] = found
    if not pairs:
        raise EvaluationError(
            f"the bundle {bundle.name!r} has the tasks {some(sorted(own))}, the data set {dataset.name!r} has "
            f"{some(sorted(other))}: none is in both, and none of one kind have a label in common; prepare the data "
            "with the bundle's task, or say which answers which: --tasks THEIRS=OWN"
        )
    return tuple(_match(asked, answered, other[asked], own[answered]) for asked, answered in sorted(pairs.items()))


def _match(asked: str, answered: str, other: TaskInfo, own: TaskInfo) -> Match:
    shared = tuple(label for label in other.labels if label in own.labels)
    if own.labels and other.labels and not shared:
        raise EvaluationError(
            f"for the task {answered!r} the bundle answers {some(own.labels)}, the data set asks for "
            f"{some(other.labels)}: they have no label in common"
        )
    return Match(asked, answered, shared, tuple(label for label in other.labels if label not in own.labels))


def _nearest(asked: TaskInfo, free: Mapping[str, TaskInfo]) -> str | None:
    """The task of the same kind with most labels in common, as a share of all labels of both."""
    alike = {name: _likeness(asked, info) for name, info in free.items() if info.kind == asked.kind}
    best = max(alike.values(), default=0.0)
    found = sorted(name for name, value in alike.items() if value == best and value > 0)
    if len(found) > 1:
        raise EvaluationError(
            f"the data set's task {asked.task!r} might be answered by {' or '.join(found)}: say which with "
            f"--tasks {asked.task}={found[0]}"
        )
    return found[0] if found else None


def _likeness(one: TaskInfo, other: TaskInfo) -> float:
    if not one.labels and not other.labels:
        return 1.0
    return len(set(one.labels) & set(other.labels)) / len(set(one.labels) | set(other.labels))


def _check_wanted(asked: str, answered: str, bundle: Bundle, dataset: Dataset) -> None:
    for name, known, place in ((asked, dataset.tasks, dataset.name), (answered, bundle.tasks, bundle.name)):
        if name not in known:
            raise EvaluationError(
                f"--tasks {asked}={answered}: {place!r} has no task {name!r}, but {some(sorted(known))}"
            )
    if dataset.tasks[asked].kind != bundle.tasks[answered].kind:
        raise EvaluationError(f"--tasks {asked}={answered}: these are of two kinds, whose answers cannot be compared")


def home(bundle: Bundle) -> dict[str, Any] | None:
    """What a bundle reached on its own data set when it was made: ``{"data", "split", "tasks": {TASK: {"main", "n",
    "metrics"}}}``; None where it was not asked."""
    file = bundle.path / "metrics.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    return kept(found, found["tasks"]) if found.get("tasks") else None


def kept(result: Mapping[str, Any], blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The part of an evaluation that another one sets beside its own."""
    tasks = {name: {key: block[key] for key in ("main", "n", "metrics")} for name, block in blocks.items()}
    return {"data": result["data"], "split": result["split"], "tasks": tasks}
