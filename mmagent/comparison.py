"""What simpler answers reach on the rows that a bundle was asked: the entries of an evaluation's `before`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmagent import metrics
from mmagent.metrics import Number
from mmagent.predictions import EvaluationError, slice_masks
from mmagent.tasks import Decision, Outcome, Task

Seed = int | list[int]


def compare(
    table: pa.Table, hits: Sequence[bool | None], what: str, *, name: str = "accuracy", seed: int = 0
) -> dict[str, Any]:
    """An entry of `before`: how often another way of answering was right.

    Args:
        table: predictions; their groups and slices are used.
        hits: for each row of the table whether the other answer is right; None where it was not asked.
        what: how the other answers were made, in a sentence.
        name: the metric that the share of right answers is called.

    Raises:
        EvaluationError: no row was asked.
    """
    asked = np.array([hit is not None for hit in hits], dtype=bool)
    if not asked.any():
        raise EvaluationError(f"no row was asked for the comparison: {what}")
    table, right = table.filter(pa.array(asked)), np.array([bool(hit) for hit in hits])[asked]
    groups = np.unique(np.asarray(table["group"].to_pylist()), return_inverse=True)[1]

    def measure(mask: np.ndarray, seed: Seed) -> dict[str, Number]:
        keys = np.unique(groups[mask], return_inverse=True)[1]
        return {name: metrics.share(right[mask], keys, seed=seed)}

    return _entry(table, what, measure, seed)


def compare_answers(
    table: pa.Table, task: Task, decisions: Sequence[Decision], what: str, *, seed: int = 0
) -> dict[str, Any]:
    """An entry of `before`: what other answers to the same rows measure.

    Args:
        table: predictions of one task that have a right answer.
        decisions: for each row of the table the other answer.
    """
    columns = table["truth"].to_pylist(), decisions, table["group"].to_pylist()
    found = [Outcome(json.loads(truth), said, group) for truth, said, group in zip(*columns, strict=True)]

    def measure(mask: np.ndarray, seed: Seed) -> dict[str, Number]:
        return task.measure(taken(found, mask), seed=one_seed(seed), resamples=metrics.RESAMPLES)

    return _entry(table, what, measure, seed)


def _entry(
    table: pa.Table, what: str, measure: Callable[[np.ndarray, Seed], dict[str, Number]], seed: int
) -> dict[str, Any]:
    parts = {
        name: {"n": int(mask.sum()), "metrics": measure(mask, [seed, zlib.crc32(name.encode())])}
        for name, mask in slice_masks(table)
    }
    every = np.ones(table.num_rows, bool)
    return {"what": what, "n": table.num_rows, "metrics": measure(every, seed), "slices": parts}


def taken(outcomes: Sequence[Outcome], mask: np.ndarray) -> list[Outcome]:
    """Those where `mask` (n,) holds."""
    return [outcome for outcome, there in zip(outcomes, mask, strict=True) if there]


def one_seed(seed: Seed) -> int:
    """A seed of several parts as one number."""
    return seed if isinstance(seed, int) else int(np.random.SeedSequence(seed).generate_state(1)[0])
