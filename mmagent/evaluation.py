"""From a table of predictions to the numbers of ``evaluation.json``.

Pure: it opens no bundle and no data set. The table (`mmagent.predictions`) has a row for each record asked; a row that
could not be answered carries an `error` and counts in no metric, but is counted by reason. Every accuracy, share and
probability in ``evaluation.json`` is a fraction of one (the benchmark files alone speak percent), every loss is in
nats::

    {"format_version": 1, "bundle": str, "data": str, "split": str,
     "task": "classify", "kind": "classify", "main": the metric to look at first, "n": int,
     "metrics": {NAME: {"value", "low", "high"}}, low and high null where no interval is honest
     "abstained": float, "cut": rows whose text is longer than the model reads,
     "errors": {"n": int, "reasons": {REASON: int}},
     "unknown_labels": {LABEL: rows}, right answers that no answer can be: wrong; "unknown_rows": int,
     "per_class": {LABEL: {"precision", "recall", "f1", "support"}},
     "slices": {"COLUMN=VALUE": {"n": int, "metrics": {...}}},
     "gaps": {COLUMN: {"groups": {VALUE: {"n", "accuracy"}}, "accuracy", "demographic_parity", "equalized_odds": each
        {"value", "low", "high"}, "label"}}, see `mmagent.fairness`,
     "calibration": {"ece", "bins": [{"low", "high", "n", "confidence", "accuracy"}]},
     "coverage": [{"coverage", "accuracy", "confidence"}],
     "confusion": {"labels": [...], "cells": [{"truth", "predicted", "count"}]},
     "points": [[truth, answer]],
     "blind": {"without": "image", "n", "accuracy", "mean_confidence", "gap", "errors", "slices": {...}},
     "before": {NAME: {"what", "n", "metrics": {...}, "slices": {"COLUMN=VALUE": {"n", "metrics"}}}},
     "tasks": {TASK: all from "task" on}, "unanswered": {TASK: {"n", "reasons"}},
     "counterfactual": {"pairs", "n", "changed": {"value", "low", "high"}, "examples"}, where words were swapped,
     "verbatim": {TASK: {"words", "n", "repeated", "examples"}}, of tasks that write,
     "matched": {TASK OF THE DATA: the bundle's}, "own": {"data", "split", "tasks": {TASK: {"main", "n", "metrics"}}}}

The metrics are the task's own (classify: accuracy, macro_f1, mean_confidence, nll, brier, ece). `per_class` is there
for tasks whose labels are counted (classify, relate, multilabel, tag), `confusion` for those that give one (classify,
relate), `points` for regress. `calibration` and `coverage` ask whether an answer is right as a whole (`Task.right`),
and are there for all but regress, whose confidence is one number for all answers. `blind` (how honest the answers are
where a modality was taken away: gap = |mean confidence - accuracy|) and `before` (simple answers to compare with) are
there where they were asked for. Several tasks stand under `tasks`, and the one that a request means which names none
also at the top. `unanswered` are tasks of the data set of which no row was answered. `matched` are tasks that the two
call differently, and `own` is what the bundle reaches on its own data set, where it was asked another one.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmagent import fairness, metrics, predictions
from mmagent.comparison import one_seed, taken
from mmagent.metrics import Number, Outcomes
from mmagent.predictions import EvaluationError, slice_masks
from mmagent.tasks import Outcome, Task
from mmagent.tasks.classify import Classify

FORMAT_VERSION = 1
MAX_REASONS = 20  # for rows without an answer, most frequent first
_POINTS = 400  # of a scatter: more cannot be told apart


def evaluate(
    table: pa.Table,
    tasks: Mapping[str, Task],
    task: str,
    *,
    bundle: str,
    data: str,
    split: str,
    before: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of ``evaluation.json``.

    Args:
        table: see `mmagent.predictions.schema`.
        tasks, task: the bundle's, and the one that it means where a request names none.
        before: by task, entries of `mmagent.comparison` by name.

    Raises:
        EvaluationError: no row with an answer, or a table that does not fit the tasks.
    """
    whole = table.filter(pc.equal(table["without"], ""))
    found: dict[str, dict[str, Any]] = {}
    unanswered: dict[str, dict[str, Any]] = {}
    for name in sorted(set(whole["task"].to_pylist())):
        mine = table.filter(pc.equal(table["task"], name))
        answered, errors = _answered(mine.filter(pc.equal(mine["without"], "")))
        if name in tasks and answered.num_rows:
            found[name] = _block(mine, answered, errors, tasks[name], (before or {}).get(name), seed)
        else:
            unanswered[name] = errors
    if not found:
        reasons = sum((Counter(errors["reasons"]) for errors in unanswered.values()), Counter[str]())
        told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(MAX_REASONS))
        raise EvaluationError(f"no row of the split {split!r} of {data!r} has an answer: {told or 'it is empty'}")
    first = task if task in found else max(found, key=lambda name: (found[name]["n"], name))
    return {
        "format_version": FORMAT_VERSION, "bundle": bundle, "data": data, "split": split, **found[first],
        **({"tasks": found} if len(found) > 1 else {}),
        **({"unanswered": unanswered} if unanswered else {}),
    }  # fmt: skip


def blocks(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The part of each task, the bundle's own first."""
    return {result["task"]: result} | {
        name: part for name, part in result.get("tasks", {}).items() if name != result["task"]
    }


@dataclass(frozen=True)
class Judged:
    """The answered rows of one task."""

    task: Task
    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def confidence(self) -> np.ndarray:
        return self.table["confidence"].to_numpy()

    @property
    def correct(self) -> np.ndarray:
        return self.table["right"].to_numpy(zero_copy_only=False).astype(bool)

    @cached_property
    def classes(self) -> Outcomes | None:
        """The answers as classes, of tasks that give one label."""
        return _classes(self.table, self.task.labels) if isinstance(self.task, Classify) else None

    @cached_property
    def outcomes(self) -> list[Outcome]:
        return predictions.outcomes(self.table, self.task)

    @property
    def calibrated(self) -> bool:
        """Whether the confidence speaks of each answer."""
        return self.task.kind != "regress"

    def measure(self, mask: np.ndarray | None, seed: int | list[int]) -> dict[str, Number]:
        """The task's metrics over the rows where `mask` (n,) holds, with mean_confidence and, where the confidence
        speaks of each answer, ece."""
        keep = np.ones(len(self), bool) if mask is None else mask
        if isinstance(self.task, Classify) and self.classes is not None:
            part = self.classes if mask is None else self.classes.take(mask)
            return self.task.summary(part, seed=seed, resamples=metrics.RESAMPLES)
        out = self.task.measure(taken(self.outcomes, keep), seed=one_seed(seed), resamples=metrics.RESAMPLES)
        part = self.table.filter(pa.array(keep))
        groups = np.unique(np.asarray(part["group"].to_pylist()), return_inverse=True)[1]
        out["mean_confidence"] = metrics.share(part["confidence"].to_numpy(), groups, seed=seed)
        if self.calibrated:
            out["ece"] = metrics.point(metrics.calibration(Judged(self.task, part))["ece"])
        return out

    def per_class(self) -> dict[str, dict[str, float]]:
        return self.task.per_class(self.outcomes) if self.classes is None else metrics.per_class(self.classes)

    def unknown(self) -> list[set[str]]:
        """The labels of each right answer that no answer can name."""
        named: list[set[str]] = []
        if self.classes is not None:
            named = [{label} for label in self.table["label"].to_pylist()]
        elif self.task.kind == "multilabel":
            named = [set(outcome.gold) for outcome in self.outcomes]
        elif self.task.kind == "tag":
            named = [{label for _, _, label in outcome.gold} for outcome in self.outcomes]
        return [labels - set(self.task.labels) for labels in named]


def _block(
    mine: pa.Table, answered: pa.Table, errors: dict[str, Any], task: Task, before: Mapping[str, Any] | None, seed: int
) -> dict[str, Any]:
    found = Judged(task, answered)
    unknown = found.unknown()
    out: dict[str, Any] = {
        "task": task.name,
        "kind": task.kind,
        "main": task.main or task.score,
        "n": len(found),
        "metrics": found.measure(None, seed),
        "abstained": float(np.mean(answered["abstained"].to_numpy(zero_copy_only=False))),
        "cut": pc.sum(pc.greater(answered["cut"], 0)).as_py() or 0,
        "errors": errors,
        "unknown_labels": dict(sorted(Counter(label for labels in unknown for label in labels).items())),
        "unknown_rows": sum(map(bool, unknown)),
        "slices": {
            name: {"n": int(mask.sum()), "metrics": found.measure(mask, [seed, zlib.crc32(name.encode())])}
            for name, mask in slice_masks(answered)
        },
    }
    if apart := {name: each for name in _columns(answered) if (each := fairness.gaps(answered, task, name, seed))}:
        out["gaps"] = apart
    if classes := found.per_class():
        out["per_class"] = classes
    if found.calibrated:
        judged: metrics.Judged = found if found.classes is None else found.classes
        out |= {"calibration": metrics.calibration(judged), "coverage": metrics.coverage(judged)}
    if found.classes is not None:
        out["confusion"] = {"labels": list(found.classes.labels), "cells": metrics.confusion(found.classes)}
    if task.kind == "regress":
        out["points"] = _points(found.outcomes, seed)
    for without in sorted(set(mine["without"].to_pylist()) - {""}):
        if found.calibrated:
            out["blind"] = _blind(mine.filter(pc.equal(mine["without"], without)), without, task)
    if before:
        out["before"] = dict(before)
    return out


def _columns(table: pa.Table) -> list[str]:
    """The slice columns that somebody named: gaps between those that are always told would say little."""
    prefix = predictions.slice_column("")
    names = (name.removeprefix(prefix) for name in table.column_names if name.startswith(prefix))
    return [name for name in names if name not in ("form", "voice", "family")]


def _points(outcomes: Sequence[Outcome], seed: int) -> list[list[float]]:
    drawn = np.random.default_rng(seed).permutation(len(outcomes))[:_POINTS]
    return [[float(outcomes[index].gold), float(outcomes[index].decision.value or 0.0)] for index in sorted(drawn)]


def _blind(table: pa.Table, without: str, task: Task) -> dict[str, Any]:
    answered, errors = _answered(table)
    if not answered.num_rows:
        return {"without": without, "n": 0, "errors": errors, "slices": {}}
    found = Judged(task, answered)
    parts = {name: _honesty(found.correct[mask], found.confidence[mask]) for name, mask in slice_masks(answered)}
    return {"without": without, **_honesty(found.correct, found.confidence), "errors": errors, "slices": parts}


def _honesty(correct: np.ndarray, confidence: np.ndarray) -> dict[str, Any]:
    accuracy, claimed = float(correct.mean()), float(confidence.mean())
    return {"n": len(correct), "accuracy": accuracy, "mean_confidence": claimed, "gap": abs(claimed - accuracy)}


def _answered(table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """The rows with an answer, and how many have none, by reason."""
    failed = Counter(reason for reason in table["error"].to_pylist() if reason is not None)
    errors = {"n": failed.total(), "reasons": dict(failed.most_common(MAX_REASONS))}
    return table.filter(pc.is_null(table["error"])), errors


def _classes(answered: pa.Table, labels: Sequence[str]) -> Outcomes:
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
