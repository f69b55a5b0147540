"""The tasks: one interface (a layer, its loss, its metrics, its answer), one file each.

A task is made of what the data set says of it (`TaskInfo`), and a model has a head for each of its tasks. Several tasks
share a batch: every head runs on every row, and a task's loss counts the rows that are its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmagent.targets import TaskInfo, kind
from mmagent.tasks.classify import Classify
from mmagent.tasks.dual import DualMatch
from mmagent.tasks.extract import Extract
from mmagent.tasks.generate import Generate
from mmagent.tasks.match import Match
from mmagent.tasks.multilabel import Multilabel
from mmagent.tasks.regress import Regress
from mmagent.tasks.relate import Relate
from mmagent.tasks.tag import Tag
from mmagent.tasks.task import Decision, Fused, Outcome, Task

__all__ = ["Decision", "Fused", "Outcome", "Task", "make", "make_all"]

_KINDS: Mapping[str, type[Task]] = {
    each.kind: each for each in (Classify, Multilabel, Regress, Match, Tag, Relate, Extract, Generate)
}


def make(info: TaskInfo) -> Task:
    """The task of a data set's description."""
    return (DualMatch if info.dual else _KINDS[kind(info.task)])(info)


def make_all(infos: Mapping[str, TaskInfo]) -> dict[str, Task]:
    """The tasks by name, in the order of the heads."""
    return {name: make(infos[name]) for name in sorted(infos)}
