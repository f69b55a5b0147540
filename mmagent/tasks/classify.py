"""classify: one label of several. Cross-entropy; accuracy, F1, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import calibration as calibrations
from mmagent import metrics
from mmagent.calibration import Calibration
from mmagent.metrics import Number, Outcomes
from mmagent.reading import View
from mmagent.record import Record
from mmagent.tasks.task import IGNORED, Answered, AnswerHead, Decision, Outcome, Task, divergence, indexes


class Classify(Task):
    kind: ClassVar[str] = "classify"
    pooled: ClassVar[bool] = True
    score: ClassVar[str] = "accuracy"
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mean_confidence", "nll", "brier", "ece")

    def head(self, width: int) -> nn.Module:
        return AnswerHead(width, len(self.labels))

    def target(self, record: Record, view: View) -> dict[str, np.ndarray] | None:
        label = record.target.label
        return None if label is None else {"label": np.array(self.index.get(label, IGNORED))}

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        return {self.key("label"): indexes(targets, "label")}

    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        return cross_entropy(output, batch[self.key("label")], batch["weight"], size, smoothing)

    def distance(self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        return divergence(output, taught, temperature)

    def trust(self, taught: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        label = batch[self.key("label")]
        chances = taught.float().softmax(1)
        known = (label >= 0) & (label < taught.shape[1])
        right = chances.gather(1, torch.where(known, label, 0)[:, None])[:, 0]
        return torch.where(label < 0, 1.0, torch.where(known, right, 0.0))

    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        label = batch[self.key("label")]
        known = (label >= 0) & (batch["weight"] > 0)
        return ((output.argmax(1) == label) & known).sum(), known.sum()

    def evidence(self, output: Tensor, answer: Answered) -> Tensor:
        return output.float().log_softmax(1)[:, self.index[answer.label or ""]]

    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> np.ndarray:
        return outputs[0]

    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        chances = calibration.probabilities(raw[None], [modalities])[0]
        order = np.argsort(-chances, kind="stable")
        return Decision(
            label=self.labels[order[0]],
            probabilities={self.labels[index]: round(float(chances[index]), 6) for index in order},
            confidence=float(chances[order[0]]),
            novelty=calibration.novelty(raw, modalities),
        )

    def gold(self, record: Record) -> Any:
        return record.target.label

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        labels = np.array([self.index.get(self.gold(record), IGNORED) for record in records])
        return calibrations.fit(np.stack(raws), labels, modalities)

    def measure(self, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = 0) -> dict[str, Number]:
        return self.summary(self.outcomes(outcomes), seed=seed, resamples=resamples)

    def summary(self, outcomes: Outcomes, *, seed: int | Sequence[int] = 0, resamples: int = 0) -> dict[str, Number]:
        """`measure` of what is in arrays already: many classes and many rows are too much for anything else."""
        return metrics.summary(outcomes, seed=seed, resamples=resamples)

    def right(self, outcome: Outcome) -> bool:
        return bool(outcome.decision.label == outcome.gold)

    def per_class(self, outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
        return metrics.per_class(self.outcomes(outcomes))

    def outcomes(self, outcomes: Sequence[Outcome]) -> Outcomes:
        """The same as arrays, for what is measured of classifiers alone: classes, calibration, confusion."""
        chances = np.array([[o.decision.probabilities.get(label, 0.0) for label in self.labels] for o in outcomes])
        return Outcomes.of(
            self.labels,
            [o.gold for o in outcomes],
            [str(o.decision.label) for o in outcomes],
            np.array([o.decision.confidence for o in outcomes]),
            chances.reshape(len(outcomes), len(self.labels)),
            [o.group or str(index) for index, o in enumerate(outcomes)],
        )


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, size: int, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over samples by weight and divided by the nominal size of the micro-batch, so that a
    padded or unlabelled sample counts nothing and any split of a batch over workers sums to the same gradient.

    logits (rows, labels), labels (rows,) with -100 for none, weights (rows,).
    """
    each = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
    return (each * weights).sum() / size
