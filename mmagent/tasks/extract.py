"""extract: the part of a text that answers a question, or that it holds no answer. Start and end over its tokens."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import metrics
from mmagent.calibration import Calibration
from mmagent.metrics import Number
from mmagent.reading import Reader, View
from mmagent.record import Record
from mmagent.tasks.task import IGNORED, Decision, Fused, Outcome, Task, divergence, focus, indexes

_MAX_TOKENS = 40  # of an answer
_BEST = 20  # starts and ends that are paired


class Extract(Task):
    """The output's place 0 stands for "no answer", place 1 + t for token t (arXiv:1810.04805, section 4.3)."""

    kind: ClassVar[str] = "extract"
    needs_tokens: ClassVar[bool] = True
    reads_whole: ClassVar[bool] = False
    score: ClassVar[str] = "f1"
    measures: ClassVar[tuple[str, ...]] = ("f1", "exact")

    def views(self, record: Record, reader: Reader) -> tuple[View, ...]:
        return reader.strides(record)

    def head(self, width: int) -> nn.Module:
        return EndsHead(self.name, width)

    def target(self, record: Record, view: View) -> dict[str, np.ndarray]:
        """Start and end; 0 for both where this stride holds no answer; ignored where none is known."""
        assert view.offsets is not None
        inside = (view.offsets[:, 0] >= 0).astype(np.float32)
        start, end = IGNORED, IGNORED
        if (spans := spans_of(record)) is not None:
            start = end = 0
            for first, last in spans:
                found = np.flatnonzero((view.offsets[:, 0] < last) & (view.offsets[:, 1] > first) & (inside > 0))
                whole = len(found) and view.offsets[found[0], 0] <= first and view.offsets[found[-1], 1] >= last
                if whole:
                    start, end = 1 + int(found[0]), 1 + int(found[-1])
                    break
        return {"start": np.array(start), "end": np.array(end), "inside": inside}

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        inside = torch.zeros(len(targets), tokens, dtype=torch.bool)
        for row, target in enumerate(targets):
            if target is not None:
                inside[row, : len(target["inside"])] = torch.from_numpy(target["inside"] > 0)
        ends = {self.key(name): indexes(targets, name) for name in ("start", "end")}
        return {**ends, self.key("inside"): inside}

    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        each = [
            F.cross_entropy(output[..., side].float(), batch[self.key(name)], ignore_index=IGNORED, reduction="none")
            for side, name in enumerate(("start", "end"))
        ]
        return ((each[0] + each[1]) / 2 * batch["weight"]).sum() / size

    def distance(self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        """The mean of the starts' divergence and the ends'."""
        mine = batch[self.key("inside")].any(1).float()
        each = [divergence(output[..., side], taught[..., side], temperature) for side in range(2)]
        return (each[0] + each[1]) / 2 * mine

    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        known = (batch[self.key("start")] >= 0) & (batch["weight"] > 0)
        ends = [output[..., side].argmax(1) == batch[self.key(name)] for side, name in enumerate(("start", "end"))]
        return (ends[0] & ends[1] & known).sum(), known.sum()

    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> list[tuple[float, int, int]]:
        """The best spans, (score above the stride's own "no answer", first character, last + 1), best first."""
        found: dict[tuple[int, int], float] = {}
        for output, view in zip(outputs, views, strict=True):
            assert view.offsets is not None
            count = len(view.offsets)
            start, end = output[1 : count + 1, 0], output[1 : count + 1, 1]
            none = float(output[0].sum())
            inside = view.offsets[:, 0] >= 0
            for a in np.argsort(-np.where(inside, start, -np.inf), kind="stable")[:_BEST]:
                for b in np.argsort(-np.where(inside, end, -np.inf), kind="stable")[:_BEST]:
                    if inside[a] and inside[b] and a <= b < a + _MAX_TOKENS:
                        place = int(view.offsets[a, 0]), int(view.offsets[b, 1])
                        found[place] = max(found.get(place, -np.inf), float(start[a] + end[b]) - none)
        return sorted(((score, *place) for place, score in found.items()), reverse=True)[:_BEST]

    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        """The likeliest span, or no answer (an empty text); the confidence is its share among the best and none."""
        least = calibration.least
        scores = np.array([least, *(score for score, _, _ in raw)]) / calibration.temperature
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        if not len(raw) or raw[0][0] <= least:
            return Decision(text="", spans=(), confidence=float(chances[0]))
        _, start, end = raw[0]
        text = focus(record)[start:end]
        span = {"start": start, "end": end, "label": "answer", "text": text}
        return Decision(text=text, spans=(span,), confidence=float(chances[1]))

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        """By how much a span must beat "no answer" for the best F1 on the validation rows, as SQuAD 2.0 tunes it
        (arXiv:1806.03822, section 5); of thresholds that serve alike, the one nearest to none."""
        said = [
            (raw[0][0], _gain(focus(record)[raw[0][1] : raw[0][2]], self.gold(record) or [""]))
            for raw, record in zip(raws, records, strict=True)
            if len(raw)
        ]
        return Calibration(least=_best_margin(np.array(said))) if said else Calibration()

    def gold(self, record: Record) -> Any:
        return None if record.target.texts is None else list(record.target.texts)

    def right(self, outcome: Outcome) -> bool:
        said = outcome.decision.text or ""
        return any(exact_match(said, gold) for gold in outcome.gold or [""])

    def measure(self, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = 0) -> dict[str, Number]:
        """Exact and f1 as SQuAD 2.0 defines them (arXiv:1606.05250, section 6.1): the best over the right answers; a
        question without an answer is right where none is given."""
        columns = np.zeros((len(outcomes), 3))
        for row, outcome in zip(columns, outcomes, strict=True):
            said, golds = outcome.decision.text or "", outcome.gold or [""]
            row[:] = 1, max(exact_match(said, gold) for gold in golds), max(overlap_f1(said, gold) for gold in golds)
        groups = [o.group for o in outcomes]
        return metrics.of_sums(columns, _from_sums, groups=groups, seed=seed, resamples=resamples)


class EndsHead(nn.Module):
    """Start and end logits of every token, and of "no answer" from the answer token's state."""

    def __init__(self, task: str, width: int) -> None:
        super().__init__()
        self._inside = f"{task}/inside"
        self.tokens, self.none = nn.Linear(width, 2), nn.Linear(width, 2)

    def forward(self, fused: Fused, batch: Mapping[str, Tensor]) -> Tensor:
        """-> (rows, 1 + tokens, 2); what is not the text has no chance."""
        assert fused.tokens is not None
        ends = self.tokens(fused.tokens).float()
        ends = ends.masked_fill(~batch[self._inside][..., None], -1e4)
        return torch.cat([self.none(fused.answer).float()[:, None], ends], dim=1)


def spans_of(record: Record) -> list[tuple[int, int]] | None:
    """Where the right answers stand: as given, or the first place of each text; none of them: no answer. None where
    nothing is known."""
    if record.target.texts is None:
        return None
    if record.target.spans:
        return [(int(span["start"]), int(span["end"])) for span in record.target.spans]
    text = focus(record)
    places = [(text.find(answer), len(answer)) for answer in record.target.texts if answer]
    return [(place, place + length) for place, length in places if place >= 0]


def _gain(said: str, golds: Sequence[str]) -> float:
    """By how much F1 is better where something is said than where nothing is."""
    spoken, silent = (max(overlap_f1(words, gold) for gold in golds) for words in (said, ""))
    return spoken - silent


def _best_margin(said: np.ndarray) -> float:
    """(rows, 2) of a span's score and what is gained by saying it -> the score above which most is gained in all."""
    scores, gains = said[np.argsort(said[:, 0], kind="stable")].T
    edges = np.concatenate([[min(scores[0] - 2, 0.0)], scores, [max(scores[-1] + 2, 0.0)]])
    low, high = edges[:-1], edges[1:]  # between two neighbours lies the same set of spans
    limits = np.where((low <= 0) & (high > 0), 0.0, (low + high) / 2)
    totals = np.append(np.cumsum(gains[::-1])[::-1], 0.0)
    totals[1:-1][np.diff(scores) == 0] = -np.inf  # no limit lies between equal scores
    best = np.flatnonzero(totals >= totals.max() - 1e-9)
    return float(limits[best[np.abs(limits[best]).argmin()]])


def exact_match(said: str, gold: str) -> float:
    return float(_normal(said) == _normal(gold))


def overlap_f1(said: str, gold: str) -> float:
    """F1 of the words that two answers share."""
    a, b = _normal(said).split(), _normal(gold).split()
    if not a or not b:
        return float(a == b)
    both = sum((Counter(a) & Counter(b)).values())
    return 2 * both / (len(a) + len(b))


def _normal(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _from_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"f1": sums[:, 2] / sums[:, 0], "exact": sums[:, 1] / sums[:, 0]}
