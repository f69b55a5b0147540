"""match, read apart: what is asked and what is offered become vectors, and the nearest is the answer (a dual encoder).

It learns from the candidates of other rows: those of a micro-batch are wrong ones, where no row says otherwise
(arXiv:2004.04906, section 3.2). So rows that bring one candidate, the right one, are enough: pairs of a picture and its
caption, or of a question and its answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import text
from mmagent.calibration import Calibration
from mmagent.reading import Reader, View
from mmagent.record import Record
from mmagent.targets import TargetError
from mmagent.tasks.match import Match, content_of
from mmagent.tasks.task import Decision, Fused, Outcome, Placed, divergence

_CHANNELS = 128  # of a vector
_SCALE = 10.0  # of the cosines at first; it is learnt
_LARGEST_SCALE = 100.0  # as CLIP's (arXiv:2103.00020, section 2.5)
_CHUNK = 1024  # questions that are ranked at once


class Apart(NamedTuple):
    """The model's output of a record."""

    asked: np.ndarray  # (channels,)
    offered: np.ndarray  # (candidates, channels)
    keys: tuple[int, ...]  # of what is asked, and of each candidate

    @property
    def scores(self) -> np.ndarray:
        return self.offered @ self.asked


class DualMatch(Match):
    """The first view is what is asked, then one for each candidate."""

    def views(self, record: Record, reader: Reader) -> tuple[View, ...]:
        if not record.candidates:
            raise TargetError("no candidates", "the row has no candidates to choose from: give `candidates`, a list")
        first = View(**_fields(reader.alone(text.words(record))), index=-1, key=_key(_asked_parts(record)))
        return (first, *(self._offered(record, index, reader) for index in range(len(record.candidates))))

    def _offered(self, record: Record, index: int, reader: Reader) -> View:
        words = content_of(record, index) or ""
        key = _key(_offered_parts(words, record.candidates[index]))
        return View(**_fields(reader.alone(words)), index=index, offers=bool(words), alone=True, key=key)

    def head(self, width: int) -> nn.Module:
        return ApartHead(self.name, width)

    def target(self, record: Record, view: View) -> dict[str, np.ndarray]:
        """Also for rows without a right answer: the head has to know what is asked and what is offered."""
        known = record.target.labels is not None
        right = str(view.index) in (record.target.labels or ())
        return {
            "offered": np.array(view.alone), "known": np.array(known), "right": np.array(right),
            "key": np.array(view.key, np.int64),
        }  # fmt: skip

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        out = {
            self.key(name): torch.tensor([target is not None and bool(target[name]) for target in targets])
            for name in ("offered", "known", "right")
        }
        keys = torch.tensor([0 if target is None else int(target["key"]) for target in targets])
        mine = torch.tensor([target is not None for target in targets])
        return {**out, self.key("key"): keys, self.key("mine"): mine}

    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        """For each record with a right candidate the negative log of the share that right ones have of a softmax over
        its own candidates and those of the micro-batch's other records (InfoNCE, arXiv:1807.03748). No wrong one is
        what is the same as a right one, or right for another record that asks the same."""
        asked, scores, own, there = self._compared(output.float(), batch)
        weight = torch.zeros_like(batch["weight"]).index_add(0, batch["sample_row"], batch["weight"])
        weight = weight[batch["sample_row"]][asked] * batch[self.key("known")][asked] * own.any(1)
        lowest = torch.finfo(scores.dtype).min
        whole = scores.masked_fill(~there, lowest).logsumexp(1)
        right = scores.masked_fill(~own, lowest).logsumexp(1)
        each = torch.where(own.any(1), whole - right, torch.zeros_like(whole))
        return (each * weight).sum() / size + output.sum() * 0.0

    def distance(self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        """The divergence of which of the micro-batch's candidates is nearest to what a record asks."""
        asked, said, _, _ = self._compared(output.float(), batch)
        wanted = self._compared(taught.float(), batch)[1]
        out = torch.zeros_like(batch["weight"])
        if said.numel():
            # A row's weight is its share of the record's, which the row that asks speaks for.
            whole = torch.zeros_like(out).index_add(0, batch["sample_row"], batch["weight"])[batch["sample_row"]]
            share = whole[asked] / batch["weight"][asked]
            out = out.index_put((asked,), divergence(said, wanted, temperature) * share)
        return out

    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Whether a right candidate is the nearest among those of the micro-batch."""
        asked, scores, own, there = self._compared(output.float(), batch)
        known = (batch["weight"][asked] > 0) & own.any(1)
        if not scores.numel():
            return known.sum(), known.sum()
        best = scores.masked_fill(~there, torch.finfo(scores.dtype).min).argmax(1)
        return (own[torch.arange(len(best), device=best.device), best] & known).sum(), known.sum()

    def _compared(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows that ask (asked,); and for each of them and each candidate of the batch (asked, offered) the score, and
        whether it is its own and right, and whether it counts at all."""
        mine, offered = batch[self.key("mine")] & (batch["weight"] > 0), batch[self.key("offered")]
        asked, found = (mine & ~offered).nonzero()[:, 0], (mine & offered).nonzero()[:, 0]
        scores = output[asked] @ output[found].T
        record, key = batch["sample_row"], batch[self.key("key")]
        right = batch[self.key("right")][found][None]
        belongs = record[asked][:, None] == record[found][None]
        own = belongs & right
        alike = (key[asked][:, None] == key[asked][None]).to(scores.dtype)
        same = (key[found][:, None] == key[found][None]).to(scores.dtype)
        # Right for any record that asks the same, or the same as such a one.
        good = (alike @ own.to(scores.dtype) @ same) > 0
        return asked, scores, own, own | ~good

    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> Apart:  # type: ignore[override]
        return Apart(outputs[0], outputs[1:], tuple(view.key for view in views))

    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        """As where candidates are read beside what is asked; a lone one fits from the calibration's least score on."""
        if len(raw.offered) > 1:
            return super().decide(raw.scores, record, calibration, modalities)
        said = super().decide(raw.scores - calibration.least, record, calibration, modalities)
        placed = Placed(raw.asked, raw.offered[0], (raw.keys[0], raw.keys[1]))
        return Decision(
            label=said.label, text=said.text, probabilities=said.probabilities, confidence=said.confidence,
            placed=placed,
        )  # fmt: skip

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        """The temperature of the rows with several candidates; where all have one, temperature and least score are
        those of a logistic fit that tells each row's own candidate from another row's (Platt, 1999)."""
        found = super().calibrate([raw.scores for raw in raws], records, modalities)
        lone = [raw for raw, record in zip(raws, records, strict=True) if len(raw.offered) == 1 and self.gold(record)]
        if len(lone) < 2 or len(lone) < len(raws):
            return found
        scale, least = _fit([(raw.asked, raw.offered[0], raw.keys) for raw in lone])
        return Calibration(temperature=float(np.clip(1 / max(scale, 1e-6), 0.05, 20.0)), least=least)

    def ranks(self, outcomes: Sequence[Outcome]) -> list[int]:
        """A lone candidate is ranked among those of all rows: of equal ones the first counts, and what is right for a
        row that asks the same does not stand before it."""
        lone = [index for index, outcome in enumerate(outcomes) if outcome.decision.placed is not None]
        found = dict(zip(lone, _pooled_ranks([outcomes[i].decision.placed for i in lone]), strict=True))  # type: ignore[misc]
        others = iter(super().ranks([outcome for index, outcome in enumerate(outcomes) if index not in found]))
        return [found[index] if index in found else next(others) for index in range(len(outcomes))]


class ApartHead(nn.Module):
    """A projection of the answer token's state for what is asked, and one for what is offered, to unit length, each
    times the square root of the learnt scale: their products are the scores."""

    def __init__(self, task: str, width: int) -> None:
        super().__init__()
        self._offered = f"{task}/offered"
        self.asked, self.offered = nn.Linear(width, _CHANNELS), nn.Linear(width, _CHANNELS)
        self.scale = nn.Parameter(torch.tensor([float(np.log(_SCALE))]))

    def forward(self, fused: Fused, batch: Mapping[str, Tensor]) -> Tensor:
        """-> (rows, channels)."""
        offered = batch[self._offered][:, None]
        made = torch.where(offered, self.offered(fused.answer), self.asked(fused.answer)).float()
        scale = self.scale.float().clamp(max=float(np.log(_LARGEST_SCALE)))
        return F.normalize(made, dim=1) * (scale / 2).exp()


def _pooled_ranks(placed: Sequence[Placed]) -> list[int]:
    """The rank of each one's own candidate among the different ones of all."""
    if not placed:
        return []
    first: dict[int, int] = {}
    for index, each in enumerate(placed):
        first.setdefault(each.keys[1], index)
    column = {key: place for place, key in enumerate(first)}
    asked = np.array([each.asked for each in placed], np.float32)
    offered = np.array([placed[index].offered for index in first.values()], np.float32)
    own = np.array([column[each.keys[1]] for each in placed])
    right: dict[int, set[int]] = {}
    for each, place in zip(placed, own.tolist(), strict=True):
        right.setdefault(each.keys[0], set()).add(place)
    ranks: list[int] = []
    for at in range(0, len(placed), _CHUNK):
        part = slice(at, at + _CHUNK)
        scores = asked[part] @ offered.T
        mine = scores[np.arange(len(scores)), own[part]]
        before = scores > mine[:, None]
        for row, each in enumerate(placed[part]):
            before[row, list(right[each.keys[0]])] = False
        ranks += (1 + before.sum(1)).tolist()
    return ranks


def _fit(lone: Sequence[tuple[np.ndarray, np.ndarray, tuple[int, ...]]]) -> tuple[float, float]:
    """Scale and least score of a logistic regression of whether a pair belongs together on its score."""
    from sklearn.linear_model import LogisticRegression

    scores, truth = [], []
    for index, (asked, offered, keys) in enumerate(lone):
        scores.append(float(asked @ offered))
        truth.append(True)
        _, other, others = lone[(index + 1) % len(lone)]
        if keys[0] != others[0] and keys[1] != others[1]:
            scores.append(float(asked @ other))
            truth.append(False)
    if all(truth):
        return 1.0, 0.0
    fitted = LogisticRegression().fit(np.array(scores)[:, None], truth)
    scale = float(fitted.coef_[0, 0])
    if scale <= 0:  # the scores say nothing
        return 1e-6, 0.0
    return scale, float(-fitted.intercept_[0] / scale)


def _fields(view: View) -> dict[str, Any]:
    return {"ids": view.ids, "cut": view.cut}


def _key(parts: Iterable[bytes]) -> int:
    seen = hashlib.blake2b(digest_size=8)
    for part in parts:
        seen.update(len(part).to_bytes(8, "little"))
        seen.update(part)
    return int.from_bytes(seen.digest(), "little", signed=True)


def _asked_parts(record: Record) -> Iterable[bytes]:
    yield from (f"{message.role}\0{message.content}".encode() for message in record.messages)
    yield from (media.bytes or (media.path or "").encode() for media in (*record.images, *record.audios))


def _offered_parts(words: str, candidate: Mapping[str, Any]) -> Iterable[bytes]:
    yield words.encode()
    for kind in ("image", "audio"):
        media = candidate.get(kind) or {}
        yield media.get("bytes") or (media.get("path") or "").encode()
