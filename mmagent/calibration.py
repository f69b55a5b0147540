"""Making a confidence mean what it says: temperature scaling (Guo et al., 2017, arXiv:1706.04599).

One temperature for each combination of modalities that validation holds enough of (an answer without its picture is
unsure in another way than one with it), a common one for those it holds few of. What validation never saw is never
made surer than the model is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

MIN_ROWS = 100  # of a combination of modalities, for a temperature of its own


class Calibration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, gt=0, description="logits are divided by it, of what validation never saw")
    by_modalities: dict[str, float] = Field({}, description="in its place, by what validation saw: text+image")
    thresholds: dict[str, float] = Field({}, description="multilabel: the probability from which a label is said")
    least: float = Field(
        0.0,
        description="the score from which something is said. extract: of a span, above that of no answer; match, read "
        "apart: of a lone candidate",
    )
    energies: dict[str, tuple[float, ...]] = Field(
        {}, description="by modalities: quantiles of the energy of validation answers, the least unusual first"
    )
    curve: tuple[tuple[float, float, float], ...] = Field(
        (),
        description="of validation: confidence, the share of answers at least as sure, and how many of those are right",
    )
    near_share: float = Field(0.5, ge=0, le=1, description="regress: share of answers less than half a deviation away")
    abstain_below: float = Field(0.5, ge=0, le=1, description="confidence under which an answer counts as abstained")

    def probabilities(self, logits: np.ndarray, modalities: Sequence[str]) -> np.ndarray:
        """Logits (n, labels), and the modalities of each row -> probabilities (n, labels)."""
        scale = np.array([self.by_modalities.get(key, self.temperature) for key in modalities])
        return softmax(logits / scale[:, None])

    def threshold(self, target: float) -> float | None:
        """The lowest confidence from which on so large a share of validation answers is right (Geifman and El-Yaniv,
        2017, arXiv:1705.08500); none: it is never reached, or nothing is known."""
        return next((sure for sure, _, right in reversed(self.curve) if right >= target), None)

    def novelty(self, logits: np.ndarray, modalities: str) -> float | None:
        """The share of validation answers whose energy was lower: near 1, the question is like nothing that was
        validated on. Logits (labels,)."""
        known = self.energies.get(modalities)
        if known is None:  # validation had too few of them to say, or none at all
            return 1.0 if self.energies and modalities not in self.by_modalities else None
        return round(float(np.interp(energy(logits), known, np.linspace(0, 1, len(known)))), 4)


def energy(logits: np.ndarray) -> np.ndarray:
    """-log sum exp of the logits (..., labels): low where a classifier knows what it sees (W. Liu et al. 2020,
    "Energy-based out-of-distribution detection", arXiv:2010.03759)."""
    top = logits.max(axis=-1)
    return -(top + np.log(np.exp(logits - top[..., None]).sum(axis=-1)))


def fit(logits: np.ndarray, labels: np.ndarray, modalities: Sequence[str]) -> Calibration:
    """The calibration that makes the validation labels likeliest: logits (n, labels), labels (n,), -100 for none."""
    known = labels >= 0
    logits, labels = logits[known].astype(np.float64), labels[known]
    keys = np.asarray(modalities)[known]
    if not len(labels):
        return Calibration()
    common, parts, energies = temperature(logits, labels), {}, {}
    for key in sorted(set(keys.tolist())):
        rows = keys == key
        parts[key] = temperature(logits[rows], labels[rows]) if rows.sum() >= MIN_ROWS else common
        if rows.sum() >= MIN_ROWS:
            quantiles = np.quantile(energy(logits[rows]), np.linspace(0, 1, 101))
            energies[key] = tuple(round(float(each), 4) for each in quantiles)
    return Calibration(temperature=max(1.0, common), by_modalities=parts, energies=energies)


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of least negative log-likelihood, between 1/20 and 20, by golden-section search on its log:
    the likelihood is unimodal in it.

    The right label counts as right in n + 1 of n + 2 cases, so that a few rows without a mistake do not make every
    answer certain (Platt, 1999, "Probabilistic outputs for support vector machines", section 2.2).
    """
    low, high = np.log(0.05), np.log(20.0)
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(50):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _nll(logits, labels, left) < _nll(logits, labels, right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def softmax(logits: np.ndarray) -> np.ndarray:
    """(n, labels) -> (n, labels), rows summing to one."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _nll(logits: np.ndarray, labels: np.ndarray, log_temperature: float) -> float:
    scaled = logits / np.exp(log_temperature)
    top = scaled.max(axis=1)
    log_sum = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
    doubt = 1 / (len(labels) + 2)
    wanted = (1 - doubt) * scaled[np.arange(len(labels)), labels] + doubt * scaled.mean(axis=1)
    return float((log_sum - wanted).mean())
