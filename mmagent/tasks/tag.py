"""tag: spans of a text with their types, such as named entities and slots. Cross-entropy on B-I-O tags of tokens."""

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
from mmagent.metrics import Number
from mmagent.reading import Reader, View
from mmagent.record import Record
from mmagent.tasks.task import IGNORED, Decision, Outcome, Task, TokenHead, divergence, focus, padded


class Tag(Task):
    """Classes: 0 is outside; 1 + 2 k begins a span of type k, 2 + 2 k goes on with it (Ramshaw & Marcus 1995,
    cmp-lg/9505040)."""

    kind: ClassVar[str] = "tag"
    needs_tokens: ClassVar[bool] = True
    reads_whole: ClassVar[bool] = False
    score: ClassVar[str] = "micro_f1"
    measures: ClassVar[tuple[str, ...]] = ("micro_f1", "precision", "recall", "macro_f1", "exact")

    def views(self, record: Record, reader: Reader) -> tuple[View, ...]:
        return reader.strides(record)

    def head(self, width: int) -> nn.Module:
        return TokenHead(width, 1 + 2 * len(self.labels))

    def target(self, record: Record, view: View) -> dict[str, np.ndarray] | None:
        if record.target.spans is None:
            return None
        assert view.offsets is not None
        starts, ends = view.offsets.T
        tags = np.where(starts < 0, IGNORED, 0)
        for span in record.target.spans:
            inside = np.flatnonzero((starts < span["end"]) & (ends > span["start"]) & (starts >= 0))
            if span["label"] not in self.index or not len(inside):
                continue
            first = 1 + 2 * self.index[span["label"]]
            tags[inside] = first + 1
            if starts[inside[0]] <= span["start"]:  # a stride that begins inside a span does not begin it
                tags[inside[0]] = first
        return {"tags": tags}

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        return {self.key("tags"): padded(targets, "tags", tokens, IGNORED, torch.int64)}

    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        """The mean over a text's tokens, so that a long text counts as one sample."""
        tags = batch[self.key("tags")]
        each = F.cross_entropy(
            output.float().transpose(1, 2), tags, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )  # (rows, tokens)
        count = (tags >= 0).sum(1).clamp(min=1)
        return (each.sum(1) / count * batch["weight"]).sum() / size

    def distance(self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        """The mean over a text's tokens."""
        known = (batch[self.key("tags")] >= 0).float()
        return (divergence(output, taught, temperature) * known).sum(1) / known.sum(1).clamp(min=1)

    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        tags = batch[self.key("tags")]
        known = (tags >= 0) & (batch["weight"] > 0)[:, None]
        return ((output.argmax(2) == tags) & known).sum(), known.sum()

    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> tuple[np.ndarray, np.ndarray]:
        """Places (n, 2) and logits (n, classes) of a text's tokens, each from the stride that sees most around it."""
        best: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        for output, view in zip(outputs, views, strict=True):
            assert view.offsets is not None
            inside = np.flatnonzero(view.offsets[:, 0] >= 0)
            for place, index in enumerate(inside):
                key, around = (*view.offsets[index],), min(place, len(inside) - 1 - place)
                if key not in best or around > best[key][0]:
                    best[key] = around, output[index]
        order = sorted(best)
        width = outputs.shape[-1]
        return np.array(order, np.int64).reshape(-1, 2), np.array([best[key][1] for key in order]).reshape(-1, width)

    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        """The likeliest sequence of tags that B-I-O allows. The confidence is the probability of all its tags, were
        they independent; each span has one of its own."""
        places, logits = raw
        if not len(places):
            return Decision(spans=(), confidence=0.0)
        chances = calibration.probabilities(logits, [modalities] * len(logits))
        tags = _viterbi(np.log(np.maximum(chances, 1e-12)))
        picked = chances[np.arange(len(tags)), tags]
        text, spans, at = focus(record), [], 0
        while at < len(tags):
            if tags[at] == 0:
                at += 1
                continue
            label, end = (tags[at] - 1) // 2, at + 1
            while end < len(tags) and tags[end] == 2 + 2 * label:
                end += 1
            start, stop = int(places[at, 0]), int(places[end - 1, 1])
            spans.append(
                {
                    "start": start, "end": stop, "label": self.labels[label], "text": text[start:stop],
                    "confidence": round(float(np.prod(picked[at:end])), 6),
                }
            )  # fmt: skip
            at = end
        return Decision(spans=tuple(spans), confidence=float(np.exp(np.log(np.maximum(picked, 1e-12)).sum())))

    def gold(self, record: Record) -> Any:
        if record.target.spans is None:
            return None
        return sorted([int(span["start"]), int(span["end"]), str(span["label"])] for span in record.target.spans)

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        """A temperature for the tags of single tokens."""
        logits, tags = [], []
        for (places, rows), record in zip(raws, records, strict=True):
            target = self.target(record, View(np.zeros(len(places)), places))
            assert target is not None
            logits.append(rows)
            tags.append(target["tags"])
        if not sum(map(len, tags)):
            return Calibration()
        return Calibration(temperature=calibrations.temperature(np.concatenate(logits), np.concatenate(tags)))

    def measure(self, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = 0) -> dict[str, Number]:
        """Precision, recall and F1 over spans, right where both ends and the type are (CoNLL-2003's definition, that of
        seqeval in strict mode); macro_f1 is the mean over types."""
        names = self.names(label for o in outcomes for _, _, label in o.gold)
        place, width = {name: index for index, name in enumerate(names)}, len(names)
        columns = np.zeros((len(outcomes), 3 * width + 2))
        for row, outcome in zip(columns, outcomes, strict=True):
            truth = {tuple(span) for span in outcome.gold}
            said = {(span["start"], span["end"], span["label"]) for span in outcome.decision.spans or ()}
            for block, spans in enumerate((truth & said, said, truth)):
                for span in spans:
                    row[block * width + place[span[2]]] += 1
            row[-2], row[-1] = 1, truth == said
        groups = [o.group for o in outcomes]
        return metrics.of_sums(columns, self._from_sums, groups=groups, seed=seed, resamples=resamples)

    def per_class(self, outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
        out = {}
        for label in self.names(label for o in outcomes for _, _, label in o.gold):
            truth = [{tuple(span) for span in o.gold if span[2] == label} for o in outcomes]
            said = [
                {(s["start"], s["end"], s["label"]) for s in o.decision.spans or () if s["label"] == label}
                for o in outcomes
            ]
            both = sum(len(a & b) for a, b in zip(truth, said, strict=True))
            counts = sum(map(len, said)), sum(map(len, truth))
            if any(counts):
                out[label] = metrics.precision_recall(both, *counts)
        return out

    def right(self, outcome: Outcome) -> bool:
        said = {(span["start"], span["end"], span["label"]) for span in outcome.decision.spans or ()}
        return said == {tuple(span) for span in outcome.gold}

    def _from_sums(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        both, said, truth = np.split(sums[:, :-2], 3, axis=1)
        return {
            "micro_f1": metrics.f1(both.sum(1), said.sum(1), truth.sum(1)),
            "precision": metrics.ratio(both.sum(1), said.sum(1)),
            "recall": metrics.ratio(both.sum(1), truth.sum(1)),
            "macro_f1": metrics.mean_where(metrics.f1(both, said, truth), said + truth > 0),
            "exact": sums[:, -1] / sums[:, -2],
        }


def _viterbi(scores: np.ndarray) -> np.ndarray:
    """The best allowed path through (tokens, classes): I of a type only after B or I of it."""
    tokens, classes = scores.shape
    best, back = np.empty((tokens, classes)), np.zeros((tokens, classes), np.int64)
    inner = np.arange(2, classes, 2)  # I classes; B is one below
    best[0] = scores[0]
    best[0, inner] = -np.inf
    for t in range(1, tokens):
        top = int(best[t - 1].argmax())
        best[t], back[t] = best[t - 1, top] + scores[t], top
        before = np.where(best[t - 1, inner] >= best[t - 1, inner - 1], inner, inner - 1)
        best[t, inner], back[t, inner] = best[t - 1, before] + scores[t, inner], before
    path = np.empty(tokens, np.int64)
    path[-1] = best[-1].argmax()
    for t in range(tokens - 1, 0, -1):
        path[t - 1] = back[t, path[t]]
    return path
