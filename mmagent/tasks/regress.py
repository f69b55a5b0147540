"""regress: a number. Mean squared error on standardised targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from mmagent import metrics
from mmagent.calibration import Calibration
from mmagent.metrics import Number
from mmagent.reading import View
from mmagent.record import Record
from mmagent.targets import TaskInfo
from mmagent.tasks.task import AnswerHead, Decision, Outcome, Task


class Regress(Task):
    kind: ClassVar[str] = "regress"
    pooled: ClassVar[bool] = True
    score: ClassVar[str] = "r2"
    measures: ClassVar[tuple[str, ...]] = ("mae", "rmse", "r2", "spearman")

    def __init__(self, info: TaskInfo) -> None:
        super().__init__(info)
        self.mean, self.deviation = info.mean or 0.0, info.deviation or 1.0

    def head(self, width: int) -> nn.Module:
        return AnswerHead(width, 1)

    def target(self, record: Record, view: View) -> dict[str, np.ndarray] | None:
        value = record.target.value
        return None if value is None else {"value": np.array((value - self.mean) / self.deviation)}

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        values = [0.0 if target is None else float(target["value"]) for target in targets]
        known = [float(target is not None) for target in targets]
        return {self.key("value"): torch.tensor(values), self.key("known"): torch.tensor(known)}

    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        each = (output[:, 0].float() - batch[self.key("value")]).square()
        return (each * batch[self.key("known")] * batch["weight"]).sum() / size

    def distance(self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        return (output[:, 0].float() - taught[:, 0].float()).square()

    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Answers less than half a standard deviation away."""
        known = (batch[self.key("known")] > 0) & (batch["weight"] > 0)
        return (((output[:, 0] - batch[self.key("value")]).abs() < 0.5) & known).sum(), known.sum()

    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> float:
        return float(outputs[0, 0]) * self.deviation + self.mean

    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        """The confidence is the share of validation answers that were less than half a standard deviation of the
        training values away: how often such an answer is about right."""
        return Decision(value=float(raw), confidence=calibration.near_share)

    def gold(self, record: Record) -> Any:
        return record.target.value

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        golds = np.array([self.gold(record) for record in records])
        near = np.abs(np.array(raws) - golds) < self.deviation / 2
        return Calibration(near_share=float((near.sum() + 1) / (len(near) + 2)))

    def right(self, outcome: Outcome) -> bool:
        """Less than half a standard deviation away: about right."""
        return bool(abs(outcome.decision.value - outcome.gold) < self.deviation / 2)

    def measure(self, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = 0) -> dict[str, Number]:
        """mae, rmse (in the values' own unit), r2 (1 - squared error / squared deviation from the mean of these rows),
        spearman (rank correlation)."""
        truth = np.array([o.gold for o in outcomes], dtype=np.float64)
        said = np.array([o.decision.value for o in outcomes], dtype=np.float64)
        error, middle = said - truth, truth - truth.mean()  # the shift keeps the sums of squares exact
        columns = np.stack([np.ones(len(truth)), np.abs(error), error**2, middle, middle**2], axis=1)
        groups = [o.group for o in outcomes]
        out = metrics.of_sums(columns, _from_sums, groups=groups, seed=seed, resamples=resamples)
        varied = len(truth) > 2 and np.ptp(truth) > 0 and np.ptp(said) > 0
        rank = float(stats.spearmanr(truth, said).statistic) if varied else 0.0
        return out | {"spearman": metrics.point(rank)}


def _from_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
    rows, absolute, squared, first, second = sums.T
    spread = np.maximum(second - first**2 / rows, 1e-12)
    return {"mae": absolute / rows, "rmse": np.sqrt(squared / rows), "r2": 1 - squared / spread}
