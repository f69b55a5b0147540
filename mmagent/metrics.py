"""How good a classifier's answers are: accuracy, F1, calibration, coverage, each with its formula's source.

Everything takes `Outcomes` and returns fractions of one (losses in nats). The intervals are 95 % percentile bootstraps
(B. Efron, R. Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13). Rows of one group, such as the
questions about one picture, are not independent of each other, so groups are drawn, not rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import sparse
from sklearn.metrics import precision_recall_fscore_support

RESAMPLES = 1000
BINS = 15
_DRAWS_AT_ONCE = 4_000_000  # bounds the memory of the bootstrap, whatever the number of rows

Number = dict[str, float | None]  # {"value", "low", "high"}: low and high are None where no interval is honest


class Judged(Protocol):
    """Answers that are right or wrong, each with a confidence."""

    @property
    def confidence(self) -> np.ndarray:
        """(n,) float: the probability each answer claims to be right with."""

    @property
    def correct(self) -> np.ndarray:
        """(n,) bool."""


@dataclass(frozen=True, slots=True)
class Marked:
    """`Judged`, of two arrays."""

    confidence: np.ndarray  # (n,) float
    correct: np.ndarray  # (n,) bool


@dataclass(frozen=True)
class Outcomes:
    """What a classifier said about n rows. Class k is ``labels[k]``."""

    labels: tuple[str, ...]
    truth: np.ndarray  # (n,) int: the right class
    predicted: np.ndarray  # (n,) int: the answered class
    confidence: np.ndarray  # (n,) float: the probability the answer claims to be right with
    p_truth: np.ndarray  # (n,) float: the probability given to the right class
    brier: np.ndarray  # (n,) float: sum over k of (p_k - [k is right])^2
    groups: np.ndarray  # (n,) int in 0..: rows of one group are drawn together

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def correct(self) -> np.ndarray:
        """(n,) bool."""
        return self.truth == self.predicted

    def take(self, mask: np.ndarray) -> Outcomes:
        """The rows where `mask` (n,) holds, groups numbered anew."""
        return Outcomes(
            self.labels,
            self.truth[mask],
            self.predicted[mask],
            self.confidence[mask],
            self.p_truth[mask],
            self.brier[mask],
            np.unique(self.groups[mask], return_inverse=True)[1],
        )

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        truth: Sequence[str],
        predicted: Sequence[str],
        confidence: np.ndarray,
        probabilities: np.ndarray,
        groups: Sequence[str] | None = None,
    ) -> Outcomes:
        """`probabilities` (n, len(labels)). A label that only the data has becomes a class after those of `labels`:
        its rows count as wrong, with probability 0."""
        names = (*labels, *sorted((set(truth) | set(predicted)) - set(labels)))
        place = {name: index for index, name in enumerate(names)}
        right = np.array([place[name] for name in truth], dtype=np.int64)
        rows = np.arange(len(right))
        known = right < len(labels)
        p_truth = np.where(known, probabilities[rows, np.where(known, right, 0)], 0.0)
        # sum_k (p_k - y_k)^2 = sum_k p_k^2 - 2 p_right + 1
        brier = np.square(probabilities).sum(axis=1) - 2 * p_truth + 1
        keys = rows if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        said = np.array([place[name] for name in predicted], dtype=np.int64)
        return cls(names, right, said, np.asarray(confidence, dtype=np.float64), p_truth, brier, keys)


def summary(outcomes: Outcomes, *, seed: int | Sequence[int] = 0, resamples: int = RESAMPLES) -> dict[str, Number]:
    """The main numbers of `outcomes`, with intervals.

    accuracy, macro_f1 (mean of F1 over the classes that occur, as truth or as answer), mean_confidence,
    nll (mean of -ln p of the right class), brier (G. W. Brier 1950, the sum over all classes, 0 to 2),
    ece (see `calibration`; a resample adds noise inside each bin and only ever raises it, so it gets no interval).
    """
    out = _numbers(_statistics(outcomes), _from_sums, outcomes.groups, seed, resamples)
    return out | {"ece": point(calibration(outcomes)["ece"])}


def share(hits: np.ndarray, groups: np.ndarray | None = None, *, seed: int | Sequence[int] = 0) -> Number:
    """The mean of `hits` (n,) with its interval: an accuracy where there are no probabilities, or of confidences."""
    keys = np.arange(len(hits)) if groups is None else groups
    statistics = np.stack([np.ones(len(hits)), hits], axis=1)
    drawn = [sums[:, 1] / sums[:, 0] for sums in _resampled(sparse.csr_array(statistics), keys, seed, RESAMPLES)]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return {"value": float(np.mean(hits)), "low": float(low), "high": float(high)}


def of_sums(
    columns: np.ndarray,
    from_sums: Callable[[np.ndarray], dict[str, np.ndarray]],
    *,
    groups: Sequence[str],
    seed: int | Sequence[int] = 0,
    resamples: int = 0,
) -> dict[str, Number]:
    """Metrics that are functions of sums over rows, with intervals where `resamples` is given.

    Args:
        columns: (n, k) what is summed.
        from_sums: (b, k) -> each metric (b,).
        groups: rows of one name are drawn together; "" stands alone.
    """
    names = [group or f"\0{index}" for index, group in enumerate(groups)]
    keys = np.unique(np.asarray(names), return_inverse=True)[1]
    return _numbers(sparse.csr_array(columns), from_sums, keys, seed, resamples)


def point(value: float) -> Number:
    """A number that has no interval."""
    return {"value": value, "low": None, "high": None}


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part / whole, 0 where there is nothing to be a share of."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)


def f1(both: np.ndarray, said: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN), of counts: right answers, answers, what was to be found."""
    return ratio(2 * both, said + truth)


def mean_where(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The mean over the last axis of the values (b, k) that are there."""
    return ratio((values * there).sum(axis=-1), there.sum(axis=-1).astype(float))


def precision_recall(both: int, said: int, truth: int) -> dict[str, float]:
    """Of one class, by its counts: precision, recall, F1 and support."""
    return {
        "precision": both / said if said else 0.0,
        "recall": both / truth if truth else 0.0,
        "f1": 2 * both / (said + truth) if said + truth else 0.0,
        "support": truth,
    }


def per_class(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each class that occurs (0 where a share has no rows to be a share of)."""
    present = np.union1d(outcomes.truth, outcomes.predicted)
    columns = precision_recall_fscore_support(
        outcomes.truth, outcomes.predicted, labels=present, average=None, zero_division=0
    )
    return {
        outcomes.labels[index]: {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
        }
        for index, precision, recall, f1, support in zip(present, *columns, strict=True)
    }


def calibration(outcomes: Judged, bins: int = BINS) -> dict[str, Any]:
    """Expected calibration error over equal-width bins (m-1)/M < confidence <= m/M: the mean over rows of
    |accuracy - confidence| of the row's bin (C. Guo et al. 2017, arXiv:1706.04599, equation 3), and the bins."""
    place = np.clip(np.ceil(outcomes.confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    hits = np.bincount(place, weights=outcomes.correct, minlength=bins)
    claimed = np.bincount(place, weights=outcomes.confidence, minlength=bins)
    rows = [
        {
            "low": index / bins,
            "high": (index + 1) / bins,
            "n": int(count[index]),
            "confidence": float(claimed[index] / count[index]) if count[index] else None,
            "accuracy": float(hits[index] / count[index]) if count[index] else None,
        }
        for index in range(bins)
    ]
    return {"ece": float(np.abs(hits - claimed).sum() / len(outcomes.correct)), "bins": rows}


def coverage(outcomes: Judged, points: int = 100) -> list[dict[str, float]]:
    """Accuracy of the answers that are given where only those of at least some confidence are: (coverage, accuracy,
    confidence) with rising coverage (Y. Geifman, R. El-Yaniv 2017, arXiv:1705.08500). Rows of equal confidence are
    kept or refused together; of more than `points` thresholds, evenly spread ones are given."""
    order = np.argsort(-outcomes.confidence, kind="stable")
    sorted_confidence = outcomes.confidence[order]
    last = np.flatnonzero(np.append(np.diff(sorted_confidence) != 0, True))  # the last row of each run of ties
    hits = np.cumsum(outcomes.correct[order])
    if len(last) > points:
        wanted = np.linspace(last[0], last[-1], points)
        last = np.unique(last[np.searchsorted(last, wanted)])
    return [
        {
            "coverage": float((index + 1) / len(order)),
            "accuracy": float(hits[index] / (index + 1)),
            "confidence": float(sorted_confidence[index]),
        }
        for index in last
    ]


def confusion(outcomes: Outcomes) -> list[dict[str, Any]]:
    """The cells of the confusion matrix that are not empty, largest first."""
    width = len(outcomes.labels)
    cells, counts = np.unique(outcomes.truth * width + outcomes.predicted, return_counts=True)
    order = np.lexsort((cells, -counts))
    return [
        {
            "truth": outcomes.labels[cells[index] // width],
            "predicted": outcomes.labels[cells[index] % width],
            "count": int(counts[index]),
        }
        for index in order
    ]


def _numbers(
    statistics: sparse.csr_array,
    from_sums: Callable[[np.ndarray], dict[str, np.ndarray]],
    groups: np.ndarray,
    seed: int | Sequence[int],
    resamples: int,
) -> dict[str, Number]:
    found = from_sums(np.asarray(statistics.sum(axis=0)).reshape(1, -1))
    drawn = [from_sums(np.asarray(sums)) for sums in _resampled(statistics, groups, seed, resamples)]
    out: dict[str, Number] = {}
    for name, value in found.items():
        out[name] = point(float(value[0]))
        if drawn:
            low, high = np.percentile(np.concatenate([part[name] for part in drawn]), [2.5, 97.5])
            out[name] = {"value": float(value[0]), "low": float(low), "high": float(high)}
    return out


def _statistics(outcomes: Outcomes) -> sparse.csr_array:
    """(n, 5 + 3 classes): every metric with an interval is a function of sums of these columns over the rows."""
    rows, width = len(outcomes), len(outcomes.labels)
    # A probability that rounding made 0 must not make the mean infinite: the floor is float32's epsilon.
    nll = -np.log(np.maximum(outcomes.p_truth, float(np.finfo(np.float32).eps)))
    dense = np.stack([np.ones(rows), outcomes.correct, outcomes.confidence, nll, outcomes.brier], axis=1)
    truth = _one_hot(outcomes.truth, width)
    said = _one_hot(outcomes.predicted, width)
    return sparse.csr_array(sparse.hstack([sparse.csr_array(dense), truth, said, truth.multiply(said)]))


def _one_hot(classes: np.ndarray, width: int) -> sparse.csr_array:
    rows = len(classes)
    return sparse.csr_array((np.ones(rows), (np.arange(rows), classes)), shape=(rows, width))


def _from_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(b, 5 + 3 classes) -> each metric (b,)."""
    sums = np.asarray(sums).reshape(-1, sums.shape[-1])
    rows, correct, confidence, nll, brier = sums[:, :5].T
    truth, said, both = np.split(sums[:, 5:], 3, axis=1)  # (b, classes)
    return {
        "accuracy": correct / rows,
        "macro_f1": mean_where(f1(both, said, truth), truth + said > 0),
        "mean_confidence": confidence / rows,
        "nll": nll / rows,
        "brier": brier / rows,
    }


def _resampled(
    statistics: sparse.csr_array, groups: np.ndarray, seed: int | Sequence[int], resamples: int
) -> Iterator[np.ndarray]:
    """Sums of `statistics` (n, k) over groups drawn with replacement: blocks (b, k), `resamples` rows in all."""
    rows, count = statistics.shape[0], int(groups.max()) + 1
    member = sparse.csr_array((np.ones(rows), (groups, np.arange(rows))), shape=(count, rows))
    by_group = member @ statistics  # (groups, k)
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS_AT_ONCE // max(count, statistics.shape[1]))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)  # (b, groups)
        yield (by_group.T @ times.T).T
