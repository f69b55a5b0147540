"""Gaps between groups of rows, such as those of one language or region: how much more often one is answered rightly, or
given an answer, than another.

By fairlearn's definitions (docs: fairlearn.metrics; Hardt et al. 2016, arXiv:1610.02413), which are of one label; of
several labels the largest is told:

    accuracy             the best group's share of right answers less the worst one's
    demographic_parity   the largest difference between groups of how often a label is answered
    equalized_odds       the largest difference of how often it is answered where it is right, or where it is not

Intervals are by bootstrap over groups of rows that belong together, as for every metric. A difference of several
groups is above zero by chance alone: the interval's low end says how much of it is sure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmagent import metrics
from mmagent.predictions import slice_column
from mmagent.tasks import Task

MIN_ROWS = 20  # of a group that is compared
_LABELS = 30  # the most frequent that are compared
_RESAMPLES = 1000


def gaps(answered: pa.Table, task: Task, column: str, seed: int = 0) -> dict[str, Any] | None:
    """What differs between the values of a slice column; none where fewer than two have rows enough.

    Args:
        answered: rows of `mmagent.predictions` of one task that have an answer.
    """
    values = np.array(answered[slice_column(column)].to_pylist(), object)
    counted = Counter(value for value in values if value is not None)
    names = sorted(value for value, count in counted.items() if count >= MIN_ROWS)
    if len(names) < 2:
        return None
    keep = np.array([value in set(names) for value in values])
    part = answered.filter(pa.array(keep))
    place = np.array([names.index(value) for value in values[keep]])
    labels, said, truth = _labels(part, task)
    sums = _columns(place, len(names), np.array(part["right"].to_pylist(), float), said, truth)
    found = metrics.of_sums(
        sums, lambda drawn: _gaps(drawn, len(names), len(labels)), groups=part["group"].to_pylist(), seed=seed,
        resamples=_RESAMPLES,
    )  # fmt: skip
    own = _shares(sums.sum(0)[None], len(names), len(labels))
    out: dict[str, Any] = {
        "groups": {name: {"n": int(counted[name]), "accuracy": float(own["accuracy"][0, index])}
                   for index, name in enumerate(names)},
        **{key: value for key, value in found.items() if labels or key == "accuracy"},
    }  # fmt: skip
    if labels:
        spread = np.ptp(own["said"][0], axis=0)  # (labels,)
        out["label"] = labels[int(np.nanargmax(spread))]  # that differs most in how often it is answered
    return out


def _labels(part: pa.Table, task: Task) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The labels that are compared, and whether each is a row's answer, and its right answer: (rows, labels)."""
    if task.kind not in ("classify", "relate"):
        empty = np.zeros((part.num_rows, 0))
        return [], empty, empty
    said, truth = (np.array(part[name].to_pylist(), object) for name in ("predicted", "label"))
    labels = [label for label, _ in Counter([*said, *truth]).most_common(_LABELS) if label is not None]
    return labels, said[:, None] == np.array(labels, object), truth[:, None] == np.array(labels, object)


def _columns(place: np.ndarray, count: int, right: np.ndarray, said: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(rows, groups x (2 + 4 labels)): in each group's columns its rows, right answers, and of each label how often it
    was said, is right, both, and said where it is not."""
    each = np.concatenate(
        [np.ones((len(place), 1)), right[:, None], said, truth, said & truth, said & ~truth]
        if said.shape[1] else [np.ones((len(place), 1)), right[:, None]], axis=1,
    ).astype(float)  # fmt: skip
    out = np.zeros((len(place), count, each.shape[1]))
    out[np.arange(len(place)), place] = each
    return out.reshape(len(place), -1)


def _shares(sums: np.ndarray, groups: int, labels: int) -> dict[str, np.ndarray]:
    """(b, groups x columns) -> accuracy (b, groups), and of each label said, true and false positives (b, groups,
    labels)."""
    each = sums.reshape(len(sums), groups, -1)
    rows, right = each[..., 0], each[..., 1]
    said, truth, both, wrong = (each[..., 2 + n * labels : 2 + (n + 1) * labels] for n in range(4))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "accuracy": right / rows,
            "said": said / rows[..., None],
            "hit": both / truth,  # not a number where a group never has the label
            "false": wrong / (rows[..., None] - truth),
        }


def _gaps(sums: np.ndarray, groups: int, labels: int) -> dict[str, np.ndarray]:
    shares = _shares(sums, groups, labels)
    out = {"accuracy": _spread(shares["accuracy"][..., None])}
    if labels:
        out["demographic_parity"] = _spread(shares["said"])
        out["equalized_odds"] = np.maximum(_spread(shares["hit"]), _spread(shares["false"]))
    return out


def _spread(shares: np.ndarray) -> np.ndarray:
    """(b, groups, labels) -> (b,): the largest difference between groups, over labels."""
    with np.errstate(invalid="ignore"):
        low = np.where(np.isnan(shares), np.inf, shares).min(1)
        high = np.where(np.isnan(shares), -np.inf, shares).max(1)
    apart = np.where(np.isfinite(high - low), high - low, 0.0)
    return np.asarray(apart.max(1))


def lines(found: dict[str, dict[str, Any]]) -> Sequence[str]:
    """For a terminal."""
    out = []
    for column, each in found.items():
        numbers = [f"{key} {each[key]['value']:.3f} ({each[key]['low']:.3f} to {each[key]['high']:.3f})"
                   for key in ("accuracy", "demographic_parity", "equalized_odds") if key in each]  # fmt: skip
        about = f", most on {each['label']!r}" if "label" in each else ""
        out.append(f"gaps between {len(each['groups'])} groups of {column}: {', '.join(numbers)}{about}")
    return out
