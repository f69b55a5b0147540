"""Whether a bundle may take another's place at all, before anything is asked of it: whoever asks the one can ask the
other, and gets an answer of the same kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mmagent.bundle import Bundle
from mmagent.predictor import Predictor
from mmagent.targets import TaskInfo

_NAMED = 5  # labels


class MisfitError(ValueError):
    """A candidate that was built for something else; names the bundle, and what it lacks."""


class Office(NamedTuple):
    """What a bundle is there for."""

    name: str
    tasks: Mapping[str, TaskInfo]
    task: str  # where a request names none
    modalities: Sequence[str]  # that it takes


def of_bundle(found: Bundle) -> Office:
    return Office(found.name, found.tasks, found.task, tuple(found.manifest.get("modalities") or ()))


def of_predictor(predictor: Predictor) -> Office:
    tasks = {name: task.info for name, task in predictor.tasks.items()}
    return Office(predictor.name, tasks, predictor.task, predictor.modalities)


def check(before: Office, after: Office) -> None:
    """
    Args:
        before, after: what answers, and what may take its place.

    Raises:
        MisfitError: a task, a label or a kind of input is missing, or another task is meant where none is named.
    """
    if found := [*_misfits(before, after)]:
        raise MisfitError(f"{after.name} cannot take the place of {before.name}: {'; '.join(found)}")


def _misfits(before: Office, after: Office) -> Iterator[str]:
    for task, info in before.tasks.items():
        if task not in after.tasks:
            yield f"it has no task {task!r} (its tasks: {', '.join(after.tasks)})"
            continue
        lost = [label for label in info.labels if label not in after.tasks[task].labels]
        if lost:
            named = ", ".join(map(repr, lost[:_NAMED])) + (" ..." if len(lost) > _NAMED else "")
            yield f"its task {task!r} lacks {len(lost)} of {len(info.labels)} labels: {named}"
    if before.task in after.tasks and after.task != before.task:
        yield f"a request that names no task meant {before.task!r} and would mean {after.task!r}"
    if missing := [each for each in before.modalities if each not in after.modalities]:
        yield f"it takes no {', no '.join(missing)}"
