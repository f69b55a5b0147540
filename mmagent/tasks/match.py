"""match: which of several candidates fits best. Each is read together with what was asked (a cross-encoder)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import calibration as calibrations
from mmagent import metrics, text
from mmagent.calibration import Calibration
from mmagent.metrics import Number
from mmagent.reading import Reader, View
from mmagent.record import Record, segments
from mmagent.targets import TargetError
from mmagent.tasks.task import AnswerHead, Decision, Outcome, Task, divergence

_CUTS = (1, 5)  # of recall


class Match(Task):
    kind: ClassVar[str] = "match"
    reads_whole: ClassVar[bool] = False
    score: ClassVar[str] = "mrr"
    measures: ClassVar[tuple[str, ...]] = ("mrr", "recall_at_1", "recall_at_5", "auc")

    def views(self, record: Record, reader: Reader) -> tuple[View, ...]:
        if not record.candidates:
            raise TargetError("no candidates", "the row has no candidates to choose from: give `candidates`, a list")
        words = text.words(record)
        return tuple(
            reader.beside(words, content_of(record, index) or "", index) for index in range(len(record.candidates))
        )

    def head(self, width: int) -> nn.Module:
        return AnswerHead(width, 1)

    def target(self, record: Record, view: View) -> dict[str, np.ndarray] | None:
        if record.target.labels is None:
            return None
        return {"right": np.array(float(str(view.index) in record.target.labels))}

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        right = [0.0 if target is None else float(target["right"]) for target in targets]
        known = [float(target is not None) for target in targets]
        return {self.key("right"): torch.tensor(right), self.key("known"): torch.tensor(known)}

    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        """For each record the mean of two: whether each candidate fits (binary cross-entropy), and which of them fits
        best (softmax over the record's candidates; the log of the summed probability of the right ones)."""
        scores, right = output[:, 0].float(), batch[self.key("right")]
        weight = batch["weight"] * batch[self.key("known")]  # (rows,): a record's share, over its candidates
        single = (F.binary_cross_entropy_with_logits(scores, right, reduction="none") * weight).sum()
        record = batch["sample_row"]
        listed = torch.zeros_like(scores)
        for index in record[weight > 0].unique():
            mine = record == index
            if bool(right[mine].any()) and not bool(right[mine].all()):
                whole = scores[mine].logsumexp(0) - scores[mine & (right > 0)].logsumexp(0)
                listed = listed + mine * whole
        return (single + (listed * weight).sum()) / 2 / size

    def distance(self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        """As the loss the mean of two: the divergence of whether each candidate fits, and of which of a record's fits
        best."""
        mine, record = batch[self.key("known")], batch["sample_row"]
        said, wanted = output[:, 0].float(), taught[:, 0].float()
        single = divergence(_odds(said), _odds(wanted), temperature)
        listed = torch.zeros_like(single)
        for index in record[mine > 0].unique():
            own = record == index
            listed = listed + own * divergence(said[own], wanted[own], temperature)
        return (single + listed) / 2 * mine

    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        known = (batch[self.key("known")] > 0) & (batch["weight"] > 0)
        return (((output[:, 0] > 0) == (batch[self.key("right")] > 0)) & known).sum(), known.sum()

    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> np.ndarray:
        return outputs[:, 0]

    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        """The probabilities are a softmax over the candidates, by their indexes; of one candidate alone, whether it
        fits."""
        if len(raw) == 1:
            fits = float(1 / (1 + np.exp(-raw[0] / calibration.temperature)))
            return Decision(
                label="0",
                text=content_of(record, 0),
                probabilities={"0": round(fits, 6)},
                confidence=max(fits, 1 - fits),
            )
        chances = calibration.probabilities(raw[None], [modalities])[0]
        order = np.argsort(-chances, kind="stable")
        return Decision(
            label=str(order[0]),
            text=content_of(record, int(order[0])),
            probabilities={str(index): round(float(chances[index]), 6) for index in order},
            confidence=float(chances[order[0]]),
        )

    def gold(self, record: Record) -> Any:
        return None if record.target.labels is None else list(record.target.labels)

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        """One temperature, from the records that have one right candidate among several."""
        known = zip(raws, map(self.gold, records), strict=True)
        rows = [(raw, int(gold[0])) for raw, gold in known if len(gold) == 1 and len(raw) > 1]
        if not rows:
            return Calibration()
        width = max(len(raw) for raw, _ in rows)
        low = min(float(raw.min()) for raw, _ in rows) - 30.0  # a place without a candidate
        logits = np.stack([np.pad(raw, (0, width - len(raw)), constant_values=low) for raw, _ in rows])
        return Calibration(temperature=calibrations.temperature(logits, np.array([right for _, right in rows])))

    def right(self, outcome: Outcome) -> bool:
        chances = outcome.decision.probabilities
        if len(chances) == 1:
            return bool((chances["0"] >= 0.5) == ("0" in outcome.gold))
        return outcome.decision.label in outcome.gold

    def measure(self, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = 0) -> dict[str, Number]:
        """Mrr (mean of 1 / rank of the first right candidate), recall_at_k (a right one among the first k), over the
        records with a right candidate; auc over all pairs of a record and a candidate."""
        ranked = [o for o in outcomes if o.gold]
        columns = np.zeros((len(ranked), 2 + len(_CUTS)))
        for row, rank in zip(columns, self.ranks(ranked), strict=True):
            row[:] = (1, 1 / rank, *(rank <= cut for cut in _CUTS))
        groups = [o.group for o in ranked]
        out = metrics.of_sums(columns, _from_sums, groups=groups, seed=seed, resamples=resamples) if ranked else {}
        pairs = [
            (label in outcome.gold, chance)
            for outcome in outcomes
            for label, chance in outcome.decision.probabilities.items()
        ]
        truth, chances = np.array([right for right, _ in pairs]), np.array([chance for _, chance in pairs])
        if truth.any() and not truth.all():
            out["auc"] = metrics.point(float(roc_auc_score(truth, chances)))
        return out

    def ranks(self, outcomes: Sequence[Outcome]) -> list[int]:
        """Of each record's first right candidate among its own."""
        out = []
        for outcome in outcomes:
            order = list(outcome.decision.probabilities)
            out.append(1 + min(order.index(label) for label in outcome.gold))
        return out


def _odds(scores: Tensor) -> Tensor:
    """(rows,) -> (rows, 2): logits of yes and no."""
    return torch.stack([scores, torch.zeros_like(scores)], -1)


def _from_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "mrr": sums[:, 1] / sums[:, 0],
        **{f"recall_at_{cut}": sums[:, 2 + index] / sums[:, 0] for index, cut in enumerate(_CUTS)},
    }


def content_of(record: Record, index: int) -> str | None:
    """The words of a candidate; the places of its pictures and sounds are left out."""
    parts = segments(record.candidates[index].get("content") or "")
    return "".join(words for part, words in parts if part == "text").strip() or None
