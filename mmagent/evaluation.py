"""From a table of predictions to the numbers of ``evaluation.json``.

Pure: it opens no bundle and no data set. The table (`schema`) has a row for each record asked; a row that could not be
answered carries an `error` and counts in no metric, but is counted by reason. Every accuracy, share and probability in
``evaluation.json`` is a fraction of one (the benchmark files alone speak percent), every loss is in nats::

    {"format_version": 1, "bundle": str, "data": str, "split": str, "task": "classify", "n": int,
     "metrics": {"accuracy": {"value", "low", "high"}, "macro_f1": ..., "mean_confidence": ..., "nll": ...,
                 "brier": ..., "ece": {"value", "low": null, "high": null}},
     "abstained": float, "errors": {"n": int, "reasons": {REASON: int}}, "unknown_labels": [labels no answer can be],
     "per_class": {LABEL: {"precision", "recall", "f1", "support"}},
     "slices": {"COLUMN=VALUE": {"n": int, "metrics": {...}}},
     "calibration": {"ece", "bins": [{"low", "high", "n", "confidence", "accuracy"}]},
     "coverage": [{"coverage", "accuracy", "confidence"}],
     "confusion": {"labels": [...], "cells": [{"truth", "predicted", "count"}]},
     "blind": {"without": "image", "n", "accuracy", "mean_confidence", "gap", "errors", "slices": {...}},
     "before": {NAME: {"what", "n", "metrics": {"accuracy": ...}, "slices": {"COLUMN=VALUE": {"n", "metrics"}}}}}

`blind` (how honest the answers are where a modality was taken away: gap = |mean confidence - accuracy|) and `before`
(simple answers to compare with) are there where they were asked for.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmagent import metrics
from mmagent.metrics import Outcomes

FORMAT_VERSION = 1
MAX_SLICES = 200  # of one column: more is an id, not a slice
MAX_REASONS = 20  # for rows without an answer, most frequent first
_SLICE = "slice."  # column prefix, so that a slice named "label" is no other column


class EvaluationError(ValueError):
    """Predictions that cannot be judged; the message says what is missing."""


def schema(slices: Sequence[str]) -> pa.Schema:
    """A row for each record asked; `slices` are keys of its meta, or ``modalities``."""
    fields = [
        ("id", pa.string()),
        ("group", pa.string()),  # rows of one group are not independent: see metrics
        ("without", pa.string()),  # the modality that was taken away; "" for none
        ("label", pa.string()),
        ("predicted", pa.string()),  # null where error is not
        ("confidence", pa.float64()),
        ("probabilities", pa.list_(pa.float32())),  # in the order of the bundle's labels
        ("abstained", pa.bool_()),
        ("error", pa.string()),
    ]
    return pa.schema([*fields, *((_SLICE + name, pa.string()) for name in slices)])


def slice_column(name: str) -> str:
    """The column of the predictions that holds the slice `name`."""
    return _SLICE + name


def evaluate(
    table: pa.Table,
    labels: Sequence[str],
    *,
    bundle: str,
    data: str,
    split: str,
    task: str = "classify",
    before: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of ``evaluation.json``; `labels` are the bundle's, in the order of the probabilities.

    Raises:
        EvaluationError: a task without metrics, or no row with an answer.
    """
    if task != "classify":
        raise EvaluationError(f"the task is {task!r}; metrics exist for classify")
    whole = table.filter(pc.equal(table["without"], ""))
    answered, errors = _answered(whole)
    if not answered.num_rows:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in errors["reasons"].items())
        raise EvaluationError(f"no row of the split {split!r} of {data!r} has an answer: {reasons or 'it is empty'}")
    outcomes = _outcomes(answered, labels)
    out: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "bundle": bundle,
        "data": data,
        "split": split,
        "task": task,
        "n": len(outcomes),
        "metrics": metrics.summary(outcomes, seed=seed),
        "abstained": float(np.mean(answered["abstained"].to_numpy(zero_copy_only=False))),
        "errors": errors,
        "unknown_labels": sorted(set(answered["label"].to_pylist()) - set(labels)),
        "per_class": metrics.per_class(outcomes),
        "slices": {
            name: {"n": len(part), "metrics": metrics.summary(part, seed=[seed, zlib.crc32(name.encode())])}
            for name, part in _slices(answered, outcomes)
        },
        "calibration": metrics.calibration(outcomes),
        "coverage": metrics.coverage(outcomes),
        "confusion": {"labels": list(outcomes.labels), "cells": metrics.confusion(outcomes)},
    }
    for without in sorted(set(table["without"].to_pylist()) - {""}):
        out["blind"] = _blind(table.filter(pc.equal(table["without"], without)), without, labels)
    if before:
        out["before"] = dict(before)
    return out


def compare(table: pa.Table, hits: Sequence[bool | None], what: str, *, seed: int = 0) -> dict[str, Any]:
    """An entry of `before`: how often another way of answering was right.

    Args:
        table: predictions; their labels, groups and slices are used.
        hits: for each row of the table whether the other answer is right; None where it was not asked.
        what: how the other answers were made, in a sentence.

    Raises:
        EvaluationError: no row was asked.
    """
    asked = np.array([hit is not None for hit in hits], dtype=bool)
    if not asked.any():
        raise EvaluationError(f"no row was asked for the comparison: {what}")
    table, right = table.filter(pa.array(asked)), np.array([bool(hit) for hit in hits])[asked]
    groups = np.unique(np.asarray(table["group"].to_pylist()), return_inverse=True)[1]
    parts = {}
    for name, mask in _slice_masks(table):
        keys = np.unique(groups[mask], return_inverse=True)[1]
        number = metrics.share(right[mask], keys, seed=[seed, zlib.crc32(name.encode())])
        parts[name] = {"n": int(mask.sum()), "metrics": {"accuracy": number}}
    whole = {"accuracy": metrics.share(right, groups, seed=seed)}
    return {"what": what, "n": len(right), "metrics": whole, "slices": parts}


def _blind(table: pa.Table, without: str, labels: Sequence[str]) -> dict[str, Any]:
    answered, errors = _answered(table)
    if not answered.num_rows:
        return {"without": without, "n": 0, "errors": errors, "slices": {}}
    outcomes = _outcomes(answered, labels)
    parts = {name: _honesty(part) for name, part in _slices(answered, outcomes)}
    return {"without": without, **_honesty(outcomes), "errors": errors, "slices": parts}


def _honesty(outcomes: Outcomes) -> dict[str, Any]:
    accuracy, confidence = float(outcomes.correct.mean()), float(outcomes.confidence.mean())
    gap = abs(confidence - accuracy)
    return {"n": len(outcomes), "accuracy": accuracy, "mean_confidence": confidence, "gap": gap}


def _answered(table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """The rows with an answer, and how many have none, by reason."""
    failed = Counter(reason for reason in table["error"].to_pylist() if reason is not None)
    errors = {"n": failed.total(), "reasons": dict(failed.most_common(MAX_REASONS))}
    return table.filter(pc.is_null(table["error"])), errors


def _outcomes(answered: pa.Table, labels: Sequence[str]) -> Outcomes:
    flat = pc.list_flatten(answered["probabilities"]).to_numpy().astype(np.float64)
    if len(flat) != answered.num_rows * len(labels):
        raise EvaluationError(
            f"{len(flat)} probabilities for {answered.num_rows} answers; {len(labels)} for each are wanted"
        )
    return Outcomes.of(
        labels,
        answered["label"].to_pylist(),
        answered["predicted"].to_pylist(),
        answered["confidence"].to_numpy(),
        flat.reshape(-1, len(labels)),
        answered["group"].to_pylist(),
    )


def _slices(answered: pa.Table, outcomes: Outcomes) -> Iterator[tuple[str, Outcomes]]:
    for name, mask in _slice_masks(answered):
        yield name, outcomes.take(mask)


def _slice_masks(table: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """``COLUMN=VALUE`` and its rows (n,), in the order of the columns; a row without the key is in no slice of it."""
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
