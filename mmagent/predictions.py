"""The table of predictions: a row for each record asked, with what was right and what was answered.

It is what an evaluation counts, what ``predictions.parquet`` holds, and all that is read to choose examples. Right and
given answers stand in it twice: as words to read, and as JSON in the form that the task compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmagent.answer import Answer
from mmagent.record import Record
from mmagent.targets import words_of
from mmagent.tasks import Decision, Outcome, Task
from mmagent.tasks.task import Placed, focus

MAX_SLICES = 200  # of one column: more is an id, not a slice
_SLICE = "slice."  # column prefix, so that a slice named "label" is no other column


class EvaluationError(ValueError):
    """Predictions that cannot be judged; the message says what is missing."""


def schema(slices: Sequence[str]) -> pa.Schema:
    """A row for each record asked; `slices` are keys of its meta, or ``modalities``."""
    fields = [
        ("id", pa.string()),
        ("group", pa.string()),  # rows of one group are not independent: see metrics
        ("task", pa.string()),
        ("without", pa.string()),  # the modality that was taken away; "" for none
        ("label", pa.string()),  # the right answer in words; null where the record has none that can be used
        ("predicted", pa.string()),  # the given one in words; null where error is not
        ("truth", pa.string()),  # JSON of `Task.gold`
        ("answer", pa.string()),  # JSON of `Decision`'s fields, without those that have a column
        ("right", pa.bool_()),  # see `Task.right`
        ("confidence", pa.float64()),
        ("probabilities", pa.list_(pa.float32())),  # in the order of the task's labels; null where it has none
        ("abstained", pa.bool_()),
        ("cut", pa.int32()),  # tokens of its text that the model had no room for
        ("error", pa.string()),
    ]
    return pa.schema([*fields, *((_SLICE + name, pa.string()) for name in slices)])


def slice_column(name: str) -> str:
    """The column that holds the slice `name`."""
    return _SLICE + name


def slice_masks(table: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """``COLUMN=VALUE`` and its rows (n,), in the order of the columns; a row without the key is in no slice of it.

    Raises:
        EvaluationError: a column of too many values.
    """
    for column in table.column_names:
        if not column.startswith(_SLICE):
            continue
        name = column.removeprefix(_SLICE)
        values = np.array(table[column].to_pylist(), dtype=object)
        present = sorted({value for value in values if value is not None})
        if len(present) > MAX_SLICES:
            raise EvaluationError(
                f"the slice column {name!r} has {len(present)} values, e.g. {present[0]!r}; {MAX_SLICES} at most are "
                "wanted: name a column of fewer values in --slices"
            )
        for value in present:
            yield f"{name}={value}", values == value


def judged(task: Task, gold: Any, answer: Answer) -> dict[str, Any]:
    """The columns of an answer."""
    chances = answer.probabilities
    listed = bool(task.labels) and bool(chances)
    said: dict[str, Any] = {
        key: value for key, value in (("label", answer.label), ("value", answer.value)) if value is not None
    }
    if answer.text is not None:
        said["text"] = answer.text
    if answer.likelihood is not None:
        said["likelihood"] = list(answer.likelihood)
    if answer.placed is not None:
        asked, offered = ([round(float(x), 4) for x in side] for side in answer.placed[:2])
        said["placed"] = [asked, offered, list(answer.placed.keys)]
    if answer.labels is not None:
        said["labels"] = list(answer.labels)
    if answer.spans is not None:
        said["spans"] = [dict(span) for span in answer.spans]
    if chances and not listed:
        said["probabilities"] = dict(chances)
    decision = Decision(answer.label, answer.labels, answer.value, answer.text, answer.spans, chances)
    return {
        "predicted": answer.words,
        "answer": json.dumps(said, ensure_ascii=False),
        "right": task.right(Outcome(gold, decision)),
        "confidence": answer.confidence,
        "probabilities": [chances[label] for label in task.labels] if listed else None,
        "abstained": answer.abstained,
        "cut": answer.cut,
    }


def outcomes(table: pa.Table, task: Task) -> list[Outcome]:
    """The answered rows of a task, as its metrics want them."""
    columns = (table[name].to_pylist() for name in ("truth", "answer", "confidence", "probabilities", "group"))
    return [
        Outcome(json.loads(truth), decision(json.loads(answer), confidence, chances, task.labels), group)
        for truth, answer, confidence, chances, group in zip(*columns, strict=True)
    ]


def decision(
    said: Mapping[str, Any], confidence: float, chances: Sequence[float] | None, labels: Sequence[str]
) -> Decision:
    """What an answer was, from the columns of its row."""
    labelled, spans, weighed = said.get("labels"), said.get("spans"), said.get("likelihood")
    ranked = dict(zip(labels, chances, strict=True)) if chances is not None else said.get("probabilities", {})
    return Decision(
        label=said.get("label"),
        labels=None if labelled is None else tuple(labelled),
        value=said.get("value"),
        text=said.get("text"),
        spans=None if spans is None else tuple(spans),
        probabilities=ranked,
        confidence=confidence,
        likelihood=None if weighed is None else (float(weighed[0]), int(weighed[1])),
        placed=Placed(placed[0], placed[1], (placed[2][0], placed[2][1])) if (placed := said.get("placed")) else None,
    )


def right_words(record: Record, kind: str) -> str:
    """The right answer as one would say it."""
    target = record.target
    if kind == "match":
        contents = (record.candidates[int(index)].get("content") or index for index in target.labels or ())
        return " | ".join(contents)
    if kind == "extract":
        return (target.texts or ("",))[0]
    if kind == "generate":
        return target.text or next(iter(target.texts or ()), "")
    if kind == "tag":
        text = focus(record) if target.spans else ""
        spans = tuple({**span, "text": words_of(text, span)} for span in target.spans or ())
        return Decision(spans=spans).words
    return Decision(target.label, target.labels, target.value).words
