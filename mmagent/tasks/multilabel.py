"""multilabel: any number of labels. Binary cross-entropy for each; thresholds tuned on validation rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import metrics
from mmagent.calibration import Calibration
from mmagent.metrics import Number
from mmagent.reading import View
from mmagent.record import Record
from mmagent.tasks.task import Answered, AnswerHead, Decision, Outcome, Task, divergence

_THRESHOLD = 0.5  # of a label that validation says nothing about


class Multilabel(Task):
    kind: ClassVar[str] = "multilabel"
    pooled: ClassVar[bool] = True
    score: ClassVar[str] = "micro_f1"
    measures: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "subset_accuracy", "map")

    def head(self, width: int) -> nn.Module:
        return AnswerHead(width, len(self.labels))

    def target(self, record: Record, view: View) -> dict[str, np.ndarray] | None:
        if record.target.labels is None:
            return None
        return {"labels": self._row(record.target.labels)}

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        known = torch.tensor([target is not None for target in targets], dtype=torch.float32)
        blank = np.zeros(len(self.labels), np.float32)
        rows = np.stack([blank if target is None else target["labels"] for target in targets])
        return {self.key("labels"): torch.from_numpy(rows), self.key("known"): known}

    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        """The mean over labels of each row's binary cross-entropy."""
        wanted = batch[self.key("labels")] * (1 - smoothing) + smoothing / 2
        each = F.binary_cross_entropy_with_logits(output.float(), wanted, reduction="none").mean(1)
        return (each * batch[self.key("known")] * batch["weight"]).sum() / size

    def distance(self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        """The mean over labels of each one's divergence."""
        wanted = torch.stack([taught, torch.zeros_like(taught)], -1)
        said = output[:, : taught.shape[1]]
        return divergence(torch.stack([said, torch.zeros_like(said)], -1), wanted, temperature).mean(1)

    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        known = (batch[self.key("known")] > 0) & (batch["weight"] > 0)
        same = (output > 0) == (batch[self.key("labels")] > 0)
        return (same & known[:, None]).sum(), known.sum() * len(self.labels)

    def evidence(self, output: Tensor, answer: Answered) -> Tensor:
        said = [self.index[label] for label in answer.labels or ()]
        return output.float()[:, said].sum(1) if said else super().evidence(output, answer)

    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> np.ndarray:
        return outputs[0]

    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        """The labels above their thresholds. The confidence is the probability that all of them, and none else, are
        right, were they independent, as a geometric mean over the labels, so that many labels do not make it vanish."""
        chances = _sigmoid(raw)
        limits = np.array([calibration.thresholds.get(label, _THRESHOLD) for label in self.labels])
        said = chances >= limits
        sure = np.where(said, chances, 1 - chances)
        order = np.argsort(-chances, kind="stable")
        return Decision(
            labels=tuple(self.labels[index] for index in order if said[index]),
            probabilities={self.labels[index]: round(float(chances[index]), 6) for index in order},
            confidence=float(np.exp(np.log(np.maximum(sure, 1e-9)).mean())),
        )

    def gold(self, record: Record) -> Any:
        return None if record.target.labels is None else list(record.target.labels)

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        """For each label the threshold of best F1 on the validation rows; halfway between two probabilities."""
        chances, truth = _sigmoid(np.stack(raws)), np.stack([self._row(self.gold(record)) for record in records]) > 0
        return Calibration(
            thresholds={
                label: _best_threshold(chances[:, index], truth[:, index])
                for index, label in enumerate(self.labels)
                if truth[:, index].any()
            }
        )

    def measure(self, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = 0) -> dict[str, Number]:
        """micro_f1 (all label decisions together), macro_f1 (mean over the labels that occur), subset_accuracy (all
        labels of a row right), map (mean over labels of the average precision)."""
        truth, said = self._truth_and_said(outcomes)
        sums = np.concatenate([truth & said, said, truth, (truth == said).all(1)[:, None]], axis=1).astype(float)
        out = metrics.of_sums(
            np.concatenate([np.ones((len(sums), 1)), sums], axis=1),
            self._from_sums,
            groups=[o.group for o in outcomes],
            seed=seed,
            resamples=resamples,
        )
        names = self.names(label for o in outcomes for label in o.gold)
        chances = np.array([[o.decision.probabilities.get(label, 0.0) for label in names] for o in outcomes])
        there = np.flatnonzero(truth.any(0))
        each = [average_precision_score(truth[:, index], chances[:, index]) for index in there]
        return out | {"map": metrics.point(float(np.mean(each)) if each else 0.0)}

    def right(self, outcome: Outcome) -> bool:
        return set(outcome.decision.labels or ()) == set(outcome.gold)

    def per_class(self, outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
        truth, said = self._truth_and_said(outcomes)
        counts = zip((truth & said).sum(0).tolist(), said.sum(0).tolist(), truth.sum(0).tolist(), strict=True)
        names = self.names(label for o in outcomes for label in o.gold)
        return {name: metrics.precision_recall(*count) for name, count in zip(names, counts, strict=True) if any(count)}

    def _truth_and_said(self, outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
        """(rows, names) bool each; see `names`."""
        place = {name: index for index, name in enumerate(self.names(label for o in outcomes for label in o.gold))}
        both = np.zeros((2, len(outcomes), len(place)), bool)
        for row, outcome in enumerate(outcomes):
            both[0, row, [place[label] for label in outcome.gold]] = True
            both[1, row, [place[label] for label in outcome.decision.labels or ()]] = True
        return both[0], both[1]

    def _from_sums(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        rows, exact = sums[:, 0], sums[:, -1]
        both, said, truth = np.split(sums[:, 1:-1], 3, axis=1)
        return {
            "micro_f1": metrics.f1(both.sum(1), said.sum(1), truth.sum(1)),
            "macro_f1": metrics.mean_where(metrics.f1(both, said, truth), said + truth > 0),
            "subset_accuracy": exact / rows,
        }

    def _row(self, labels: Sequence[str]) -> np.ndarray:
        row = np.zeros(len(self.labels), np.float32)
        row[[self.index[label] for label in labels if label in self.index]] = 1
        return row


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def _best_threshold(chances: np.ndarray, truth: np.ndarray) -> float:
    order = np.argsort(-chances, kind="stable")
    hits, said = np.cumsum(truth[order]), np.arange(1, len(order) + 1)
    scores = 2 * hits / (said + truth.sum())
    cuts = np.append(np.diff(chances[order]) != 0, True)  # no threshold lies between equal probabilities
    best = int(np.argmax(np.where(cuts, scores, -1.0)))
    below = chances[order[best + 1]] if best + 1 < len(order) else 0.0
    return float((chances[order[best]] + below) / 2)
