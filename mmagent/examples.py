"""Answers to look at: a seeded choice of right and wrong ones.

`choose` looks at the predictions alone; the caller then reads the chosen records from their shards, makes an `Example`
of each with `shown`, and `mmagent.example_cards` shows them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmagent import predictions
from mmagent.predictions import slice_column
from mmagent.record import Record
from mmagent.tasks import Decision, Task


@dataclass(frozen=True)
class Example:
    """A record and what was answered."""

    record: Record
    kind: str  # of the task
    answer: Decision
    right: str  # the right answer in words
    correct: bool
    probabilities: Mapping[str, float]  # likeliest first, as many as are worth showing
    group: str = ""  # the heading it stands under, e.g. ``form=speech_unseen``
    abstained: bool = False


def choose(table: pa.Table, column: str | None, *, each: int = 3, seed: int = 0) -> dict[str, str]:
    """Ids of up to `each` right and `each` wrong answers for every value of the slice `column` (or of the whole, where
    there is none), with the group they belong to. Which ones depends on the seed and the ids alone."""
    groups = table[slice_column(column)].to_pylist() if column else [""] * table.num_rows
    cells: dict[tuple[str, bool], list[str]] = {}
    columns = (table[name].to_pylist() for name in ("id", "right", "error", "without"))
    for (key, right, error, without), group in zip(zip(*columns, strict=True), groups, strict=True):
        if error is None and not without and group is not None:
            cells.setdefault((group, right), []).append(key)
    out: dict[str, str] = {}
    for (group, _), ids in sorted(cells.items()):
        ranked = sorted(ids, key=lambda key: (zlib.crc32(f"{seed}:{key}".encode()), key))
        heading = f"{column}={group}" if column else ""
        out |= dict.fromkeys(ranked[:each], heading)
    return out


def likeliest(
    labels: Sequence[str], probabilities: Sequence[float], *, count: int = 4, also: str | None = None
) -> dict[str, float]:
    """The `count` most probable labels, first first; in place of the last of them the label `also`, if it is none."""
    order = np.argsort(-np.asarray(probabilities), kind="stable")[:count].tolist()
    if also in labels and labels.index(also) not in order:
        order[-1] = labels.index(also)
    return {labels[index]: float(probabilities[index]) for index in order}


def shown(record: Record, row: Mapping[str, Any], task: Task, group: str) -> Example:
    """The example of a record and its row of the predictions."""
    said = predictions.decision(json.loads(row["answer"]), row["confidence"], row["probabilities"], task.labels)
    listed = row["probabilities"] is not None
    likely = likeliest(task.labels, row["probabilities"], also=row["label"]) if listed else said.probabilities
    return Example(record, task.kind, said, row["label"], row["right"], likely, group, row["abstained"])


def group_name(name: str) -> str:
    """``form=speech_known`` as ``form: speech known``."""
    column, equals, value = name.partition("=")
    return f"{column}: {value.replace('_', ' ')}" if equals else name
