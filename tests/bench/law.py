"""How a cost grows: the law that fits what was measured, by least squares, and what it says about more.

Errors are taken relative to what was measured, so that the smallest point weighs as much as the largest; of the two
laws the one with the smaller error is told, and of equals the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EQUAL = 0.02  # relative error below which one law is as good as the other


@dataclass(frozen=True, slots=True)
class Law:
    """constant + slope * n ** power"""

    constant: float
    slope: float
    power: float
    error: float  # root of the mean square of relative errors

    def at(self, count: float) -> float:
        return self.constant + self.slope * count**self.power

    def reaches(self, limit: float) -> float:
        """Where it comes to a limit; infinite where it never does."""
        if self.slope <= 0 or limit <= self.constant:
            return math.inf if self.slope <= 0 else 0.0
        return float(((limit - self.constant) / self.slope) ** (1 / self.power))

    def __str__(self) -> str:
        if self.power == 1.0:
            return f"{self.constant:.3g} + {self.slope:.3g} n"
        return f"{self.slope:.3g} n^{self.power:.2f}"


def fit(points: Sequence[tuple[float, float]]) -> Law:
    """Of (n, cost) with costs above 0, two at least."""
    assert len(points) > 1, "a law wants two points"
    counts, costs = (np.array(each, float) for each in zip(*points, strict=True))
    return min(_linear(counts, costs), _power(counts, costs), key=lambda law: law.error - _EQUAL * (law.power == 1.0))


def _linear(counts: np.ndarray, costs: np.ndarray) -> Law:
    """Constant + slope * n; neither is below 0: a cost that shrinks to nothing is no law."""
    by = np.stack([1 / costs, counts / costs], axis=1)
    (constant, slope), *_ = np.linalg.lstsq(by, np.ones(len(costs)), rcond=None)
    if slope < 0:
        constant, slope = 1 / np.mean(1 / costs), 0.0
    elif constant < 0:
        constant, slope = 0.0, float(np.sum(counts / costs) / np.sum((counts / costs) ** 2))
    return _law(float(constant), float(slope), 1.0, counts, costs)


def _power(counts: np.ndarray, costs: np.ndarray) -> Law:
    power, slope = np.polyfit(np.log(counts), np.log(costs), 1)
    return _law(0.0, math.exp(slope), max(float(power), 1e-3), counts, costs)


def _law(constant: float, slope: float, power: float, counts: np.ndarray, costs: np.ndarray) -> Law:
    found = constant + slope * counts**power
    return Law(constant, slope, power, float(np.sqrt(np.mean((found / costs - 1) ** 2))))
