"""relate: how two marked spans of a text stand to each other. Cross-entropy over the pair's states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmagent import text
from mmagent.metrics import Number, Outcomes
from mmagent.reading import Reader, View
from mmagent.record import Record
from mmagent.targets import HEAD, TAIL, TargetError, spanned
from mmagent.tasks.classify import Classify
from mmagent.tasks.task import IGNORED, Fused, padded

MARKS = {HEAD: "@", TAIL: "#"}  # around the spans in the text: words that every vocabulary has (arXiv:2102.01373)


class Relate(Classify):
    """Reads a text in which `mark` has put signs around the two spans."""

    kind: ClassVar[str] = "relate"
    needs_tokens: ClassVar[bool] = True
    pooled: ClassVar[bool] = False
    reads_whole: ClassVar[bool] = False
    score: ClassVar[str] = "micro_f1"
    measures: ClassVar[tuple[str, ...]] = (*Classify.measures, "micro_f1")

    def views(self, record: Record, reader: Reader) -> tuple[View, ...]:
        """One view; of a text in strides the one that holds most of both spans."""
        at, spans = spanned(record), pair(record)
        others = replace(record, messages=record.messages[:at] + record.messages[at + 1 :])
        marked, places = mark(record.messages[at].content, spans)
        views = reader.placed(text.words(others), marked, places)

        def held(view: View) -> int:
            assert view.offsets is not None
            starts, ends = view.offsets.T
            return min(int(((starts < end) & (ends > start)).sum()) for start, end in spans.values())

        return (replace(max(views, key=held), index=0),)

    def head(self, width: int) -> nn.Module:
        return PairHead(self.name, width, len(self.labels))

    def target(self, record: Record, view: View) -> dict[str, np.ndarray]:
        """The two spans' tokens are wanted for an answer too; the label may be missing."""
        assert view.offsets is not None
        found = super().target(record, view) or {"label": np.array(IGNORED)}
        starts, ends = view.offsets.T
        for name, (start, end) in pair(record).items():
            found[name] = ((starts < end) & (ends > start) & (starts >= 0)).astype(np.float32)
        return found

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        masks = {self.key(name): padded(targets, name, tokens, 0.0, torch.float32) for name in MARKS}
        return super().collate(targets, tokens) | masks

    def summary(self, outcomes: Outcomes, *, seed: int | Sequence[int] = 0, resamples: int = 0) -> dict[str, Number]:
        """Those of classify, and micro_f1: with one label for each row it equals the accuracy."""
        out = super().summary(outcomes, seed=seed, resamples=resamples)
        return out | {"micro_f1": out["accuracy"]}


class PairHead(nn.Module):
    """Two layers on [answer, mean of the head span, mean of the tail span]."""

    def __init__(self, task: str, width: int, outputs: int) -> None:
        super().__init__()
        self._keys = tuple(f"{task}/{name}" for name in MARKS)
        self.mix, self.layer = nn.Linear(3 * width, width), nn.Linear(width, outputs)

    def forward(self, fused: Fused, batch: Mapping[str, Tensor]) -> Tensor:
        """-> (rows, outputs)."""
        assert fused.tokens is not None
        means = [_mean(fused.tokens, batch[key]) for key in self._keys]
        return self.layer(torch.tanh(self.mix(torch.cat([fused.answer, *means], dim=1))))


def pair(record: Record) -> dict[str, tuple[int, int]]:
    """The head and the tail: their characters in the text that spans count in.

    Raises:
        TargetError: there are not these two.
    """
    spans = {str(span["label"]): (int(span["start"]), int(span["end"])) for span in record.target.spans or ()}
    if set(spans) != set(MARKS):
        raise TargetError(
            "no head and tail", f"a relation wants two spans, labelled head and tail, but got {sorted(spans) or 'none'}"
        )
    return {name: spans[name] for name in MARKS}


def mark(text: str, spans: Mapping[str, tuple[int, int]]) -> tuple[str, np.ndarray]:
    """The text with its two spans between signs, and for each of its characters the one it was before (length + 1
    entries, so that ends are found too)."""
    signs: dict[int, list[str]] = {}
    for name, (start, end) in spans.items():
        signs.setdefault(start, []).append(f"{MARKS[name]} ")
        signs.setdefault(end, []).insert(0, f" {MARKS[name]}")
    out, place = "", []
    for index in range(len(text) + 1):
        for sign in signs.get(index, ()):
            out += sign
            place += [index] * len(sign)
        out += text[index : index + 1]
        place.append(index)
    return out, np.array(place, np.int64)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(states.dtype)[..., None]
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
