"""Towers learn the language model's states from pairs: a picture, or a sound, and the words that belong to it.

InfoNCE (arXiv:1807.03748) in both directions, as CLIP has it (arXiv:2103.00020): of all words of a batch those of its
own picture shall be nearest, and the other way round. The words' states are the language model's own mean states,
measured from their mean over the batch, since all texts' states point much the same way; towers come to them by a
linear layer each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent.config import ModelConfig
from mmagent.text import TextEncoder
from mmagent.towers import PROJECTION, audio_tower, begin, image_tower

KINDS = ("image", "audio")
_MOST = 100.0  # of the factor before the softmax, as in CLIP


class Alignment(nn.Module):
    """
    Args:
        config: the model's section: its towers are taught.
        text_width: channels of the language model's states.
        backbone: the language model, where it is trained; None where its states come ready in ``text_states``.
        temperature: what similarities are divided by, as it begins; it is learned.
    """

    def __init__(
        self,
        config: ModelConfig,
        text_width: int,
        backbone: TextEncoder | None,
        temperature: float,
        *,
        weights: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_tower = image_tower(config.image, weights=weights) if config.image else None
        self.audio_tower = audio_tower(config.audio, weights=weights) if config.audio else None
        self.image = nn.Linear(config.image.width, text_width) if config.image else None
        self.speech = nn.Linear(config.audio.width, text_width) if config.audio else None
        for part, section in ((self.image, config.image), (self.speech, config.audio)):
            if part is not None and section is not None:
                begin(part, section, PROJECTION, weights=weights)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """batch: of `mmagent.batch.Inputs.batch` -> words (rows, text width), and where there is such a tower image
        (pictures, text width), audio (sounds, text width); scale ()."""
        states = batch["text_states"] if self.backbone is None else self.backbone(batch["ids"], batch["mask"])
        keep = batch["mask"].to(states.dtype)[..., None]
        out = {"words": (states * keep).sum(1) / keep.sum(1).clamp(min=1)}
        if self.image_tower is not None:
            assert self.image is not None
            out["image"] = self.image(self.image_tower(batch["images"]).mean(1))
        if self.audio_tower is not None:
            assert self.speech is not None
            out["audio"] = self.speech(self.audio_tower(batch["audios"], batch["audio_frames"]).mean(1))
        return out | {"scale": self.scale.exp().clamp(max=_MOST)}


class Pairs(NamedTuple):
    """Of one kind of media."""

    media: Tensor  # (n, width)
    words: Tensor  # (n, width)
    same: Tensor  # (n, n): whether the words are the same
    weight: Tensor  # (n,)
    row: Tensor  # (n,) the sample that each is of


def likeness(media: Tensor, words: Tensor) -> Tensor:
    """Cosines (media, texts), of the words from their mean over the texts."""
    middle = words.mean(0, keepdim=True) if len(words) > 1 else torch.zeros_like(words)
    return F.normalize(media.float(), dim=-1) @ F.normalize((words - middle).float(), dim=-1).T


def loss(out: Mapping[str, Tensor], batch: Mapping[str, Tensor], size: int) -> Tensor:
    """The contrast of the pairs of a micro-batch, summed over kinds and pairs by weight, divided by its nominal size.

    Texts that are the same are no negatives of each other's media. The negatives are those of the micro-batch, so that
    the loss depends on how a batch is cut: give `train.micro_batch` what memory holds.
    """
    total = out["scale"] * 0.0
    for kind in KINDS:
        if kind not in out:
            continue
        pairs = of_kind(out, batch, kind)
        if pairs is None:  # a stand-in: the tower takes part in the backward pass, with a gradient of zero
            total = total + out[kind].sum() * 0.0
            continue
        alike = likeness(pairs.media, pairs.words) * out["scale"]
        there, back = _contrast(alike, pairs.same), _contrast(alike.T, pairs.same.T)
        total = total + ((there + back) / 2 * pairs.weight).sum() / size
    return total + out["words"].sum() * 0.0


def of_kind(out: Mapping[str, Tensor], batch: Mapping[str, Tensor], kind: str) -> Pairs | None:
    """The pairs of a micro-batch; None where it has none."""
    row = batch[f"{kind}_row"]
    real = batch[f"{kind}_real"] & (batch["weight"][row] > 0) & batch["has_words"][row]
    if not real.any():
        return None
    row = row[real]
    ids = batch["ids"][row] * batch["mask"][row]
    same = (ids[:, None] == ids[None]).all(-1)
    return Pairs(out[kind][real], out["words"][row], same, batch["weight"][row], row)


def hits(out: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How many media are nearest to their own words among the micro-batch's, and of how many."""
    right, count = out["scale"].new_zeros(()), out["scale"].new_zeros(())
    for kind in KINDS:
        if kind in out and (pairs := of_kind(out, batch, kind)) is not None:
            best = likeness(pairs.media, pairs.words).argmax(1)
            right, count = right + pairs.same[torch.arange(len(best)), best].sum(), count + len(best)
    return right, count


def _contrast(alike: Tensor, same: Tensor) -> Tensor:
    """(n,) of (n, n): minus the logarithm of the share of the softmax that lies on what is the same."""
    own = alike.masked_fill(~same, torch.finfo(alike.dtype).min)
    return alike.logsumexp(1) - own.logsumexp(1)
