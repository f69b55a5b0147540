"""The model: a language model's states and the towers' tokens meet in a few fusion layers, and a head answers.

A plain `nn.Module`: it names no rank, no process group and no cluster. Every forward pass runs every tower it has, on
a masked stand-in where a batch lacks the modality, so that all ranks of a distributed run take part in every
collective.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import towers
from mmagent.config import ModelConfig
from mmagent.tasks import Fused, Task
from mmagent.text import TextEncoder
from mmagent.towers import Block, audio_tower, image_tower

Batch = dict[str, Tensor]


class Join(nn.Module):
    """Fusion layers over [answer token, sentence, text states, audio tokens, image tokens]."""

    def __init__(self, config: ModelConfig, text_width: int) -> None:
        super().__init__()
        width = config.width
        self.answer = nn.Parameter(torch.randn(width) * 0.02)
        self.kinds = nn.Parameter(torch.randn(4, width) * 0.02)  # sentence, text, image, audio
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.sentence = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.image = nn.Linear(config.image.width, width) if config.image else None
        # FiLM (arXiv:1709.07871): what is asked scales and shifts what is seen, before any layer compares the two.
        self.film = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, 2 * width)) if config.image else None
        self.blocks = nn.ModuleList(Block(width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.order = nn.Parameter(torch.zeros(MAX_SLOTS, width))  # which picture or sound of the sample

    def forward(self, parts: list[tuple[Tensor, Tensor]], with_tokens: bool = False) -> Fused:
        """parts: (tokens (batch, n, width), keep (batch, n)) of each modality, the text's second.

        Args:
            with_tokens: also the states of the text's tokens; zeros where they are not kept.
        """
        batch = parts[0][0].shape[0]
        answer = self.answer.expand(batch, 1, -1)
        x = torch.cat([answer, *(tokens for tokens, _ in parts)], dim=1)
        always = torch.ones(batch, 1, dtype=torch.bool, device=x.device)
        keep = torch.cat([always, *(kept for _, kept in parts)], dim=1)
        places = x.shape[1]
        x, keep, order = _pack(x, keep)
        for block in self.blocks:
            x = block(x, keep)
        x = self.norm(x)
        if not with_tokens:
            return Fused(x[:, 0], None)
        where = order[..., None].expand_as(x)
        back = x.new_zeros(batch, places, x.shape[-1]).scatter(1, where, x * keep[..., None])
        first = 1 + parts[0][0].shape[1]
        return Fused(x[:, 0], back[:, first : first + parts[1][0].shape[1]])


_TEMPERATURE = 0.1  # of the contrast between speeches
MAX_SLOTS = 16  # pictures, and sounds, of one sample that keep their order; later ones share the last place


class MultimodalModel(nn.Module):
    """Text states + towers -> join -> a head for each task.

    Args:
        config: the model's section of a config.
        tasks: what is answered, by name.
        text_width: channels of the language model's states.
        backbone: the language model, where it is trained or computed each time; None where its states come ready
            in ``batch["text_states"]`` (see `mmagent.frozen.FrozenStates`).
        weights: whether pretrained towers get their weights here; not where a bundle's come afterwards.
    """

    def __init__(
        self,
        config: ModelConfig,
        tasks: Mapping[str, Task],
        text_width: int,
        backbone: TextEncoder | None,
        *,
        weights: bool = True,
    ) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self._with_tokens = any(task.needs_tokens for task in tasks.values())
        self.backbone = backbone
        self.image_tower = image_tower(config.image, weights=weights) if config.image else None
        self.audio_tower = audio_tower(config.audio, weights=weights) if config.audio else None
        # Speech enters as soft text: its tokens live in the space of the language model's states.
        self.speech = nn.Linear(config.audio.width, text_width) if config.audio else None
        if self.speech is not None and config.audio is not None:
            towers.begin(self.speech, config.audio, towers.PROJECTION, weights=weights)
        self.join = Join(config, text_width)
        self.dropout = nn.Dropout(config.dropout if config.head_dropout is None else config.head_dropout)
        self.heads = nn.ModuleDict({module_name(name): task.head(config.width) for name, task in tasks.items()})
        # What a picture says by itself: a second answer, which training alone reads (see `ImageTowerConfig.alone`).
        alone = config.image if config.image and config.image.alone else None
        self.image_heads = nn.ModuleDict(
            {module_name(name): task.head(alone.width) for name, task in tasks.items() if task.pooled and alone}
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """batch: see `mmagent.batch.Inputs.batch` -> for each task's name its output, rows first; under ``image:TASK``
        what the pictures alone say (pictures, ...); ``speech`` (sounds, tokens, text width) where there is an audio
        tower."""
        states = batch["text_states"] if self.backbone is None else self.backbone(batch["ids"], batch["mask"])
        has_words = batch["has_words"]  # (batch,)
        asked = _mean(states, batch["mask"].bool()) * has_words[:, None]  # (batch, text width)
        join, size = self.join, len(has_words)
        out: dict[str, Tensor] = {}
        parts = [
            ((join.sentence(asked) + join.kinds[0])[:, None], has_words[:, None]),
            (join.text(states) + join.kinds[1], batch["keep"] & has_words[:, None]),
        ]
        if self.audio_tower is not None:
            assert self.speech is not None
            speech = self.speech(heard_by(self.audio_tower, batch))
            out["speech"] = speech
            said = speech.mean(1)  # (sounds, text width)
            heard = (said * batch["audio_real"][:, None]).to(asked.dtype)  # autocast computes speech in bf16
            asked = asked.index_add(0, batch["audio_row"], heard)
            tokens = torch.cat([join.sentence(said)[:, None] + join.kinds[0], join.text(speech) + join.kinds[3]], dim=1)
            parts.append(self._place(tokens, batch, "audio", size))
        if self.image_tower is not None:
            assert join.image is not None
            assert join.film is not None
            seen = seen_by(self.image_tower, batch)
            for name in self.tasks:
                if module_name(name) in self.image_heads:
                    alone = Fused(seen.mean(1), None)
                    out[f"image:{name}"] = self.image_heads[module_name(name)](alone, batch)
            tokens = join.image(seen) + join.kinds[2]
            placed, keep = self._place(tokens, batch, "image", size)
            scale, shift = join.film(asked)[:, None].chunk(2, dim=-1)
            parts.append((placed * (1 + scale) + shift, keep))
        fused = join(parts, self._with_tokens)
        dropped = Fused(self.dropout(fused.answer), None if fused.tokens is None else self.dropout(fused.tokens))
        return out | {name: self.heads[module_name(name)](dropped, batch) for name in self.tasks}

    def features(self, batch: Batch) -> list[Tensor]:
        """Mean text states, image tokens and audio tokens of each row, (rows, channels) each: what a linear probe
        sees."""
        mask, size = batch["mask"][..., None], len(batch["mask"])
        parts = [(batch["text_states"] * mask).sum(1) / mask.sum(1)]
        if self.image_tower is not None:
            parts.append(_mean_by_row(self.image_tower(batch["images"]), batch, "image", size))
        if self.audio_tower is not None:
            parts.append(_mean_by_row(self.audio_tower(batch["audios"], batch["audio_frames"]), batch, "audio", size))
        return parts

    def _place(self, tokens: Tensor, batch: Batch, kind: str, size: int) -> tuple[Tensor, Tensor]:
        """Tokens of packed media (media, n, width), put where their samples are: (batch, slots * n, width) and what
        to keep of it (batch, slots * n). A stand-in is placed in the first sample and masked."""
        row, slot, real = batch[f"{kind}_row"], batch[f"{kind}_slot"], batch[f"{kind}_real"]
        slots = int(batch[f"{kind}_slots"])
        count, width = tokens.shape[1:]
        tokens = tokens + self.join.order[slot.clamp(max=MAX_SLOTS - 1)][:, None]
        placed = tokens.new_zeros(size * slots, count, width).index_add(0, row * slots + slot, tokens)
        kept = torch.zeros(size * slots, dtype=torch.bool, device=tokens.device)
        kept = kept.index_put((row * slots + slot,), real, accumulate=False)
        keep = kept.view(size, slots, 1).expand(-1, -1, count).reshape(size, slots * count)
        return placed.view(size, slots * count, width), keep


def seen_by(tower: nn.Module, batch: Batch) -> Tensor:
    """(pictures, tokens, width): as they come with the batch (see `mmagent.encoded`), or computed."""
    return batch["image_tokens"] if "image_tokens" in batch else tower(batch["images"])


def heard_by(tower: nn.Module, batch: Batch) -> Tensor:
    """(sounds, tokens, width), likewise."""
    return batch["audio_tokens"] if "audio_tokens" in batch else tower(batch["audios"], batch["audio_frames"])


def align_loss(speech: Tensor, states: Tensor, ids: Tensor, mask: Tensor, real: Tensor, size: int) -> Tensor:
    """Teaches an audio tower the language model's states of the words spoken: each speech token is drawn to the state
    of the token in its place (one minus the cosine), and the whole of a speech to its own words more than to those of
    the batch's other speeches (InfoNCE, arXiv:1807.03748), measured from their mean, since sentences of one form
    differ in a word or two.

    speech (sounds, n, width), states (sounds, tokens, width), ids and mask (sounds, tokens), real (sounds,).
    """
    count = min(speech.shape[1], states.shape[1])
    keep = mask[:, :count] * real[:, None].to(mask.dtype)  # (sounds, count)
    taken, wanted = speech[:, :count].float(), states[:, :count].float()
    known = (keep.sum(1) > 0).to(taken.dtype)  # (sounds,)
    place = ((1 - F.cosine_similarity(taken, wanted, dim=-1)) * keep).sum(1) / keep.sum(1).clamp(min=1)

    middle = (wanted * known[:, None, None]).sum(0) / known.sum().clamp(min=1)  # (count, width)
    said = F.normalize((taken - middle).flatten(1), dim=1)
    meant = F.normalize(((wanted - middle) * keep[..., None]).flatten(1), dim=1)
    alike = said @ meant.T / _TEMPERATURE  # (sounds, sounds)
    alike = alike.masked_fill(known[None] == 0, torch.finfo(alike.dtype).min)
    same = (ids[:, None] == ids[None]).all(-1) & (known[None] > 0)
    own = alike.masked_fill(~same, torch.finfo(alike.dtype).min)
    contrast = alike.logsumexp(1) - own.logsumexp(1)
    return ((place + contrast) * known).sum() / size


def _pack(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves each sample's kept tokens to the front and cuts what no sample needs: tokens carry their kind and place
    in themselves, so the layers compute the same on fewer. x (batch, tokens, width), keep (batch, tokens) -> both with
    fewer tokens, and where each of these was (batch, fewer)."""
    longest = int(keep.sum(1).max())
    order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])), keep.gather(1, order), order


def module_name(task: str) -> str:
    """A task's name as a module may have it."""
    return task.replace(".", "_")


def _mean(states: Tensor, keep: Tensor) -> Tensor:
    """(batch, tokens, width), (batch, tokens) -> (batch, width)."""
    weight = keep.to(states.dtype)[..., None]
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def _mean_by_row(tokens: Tensor, batch: Batch, kind: str, size: int) -> Tensor:
    """Tokens of packed media (media, n, width) -> their mean for each row (size, width), zero where it has none."""
    row, real = batch[f"{kind}_row"], batch[f"{kind}_real"].to(tokens.dtype)[:, None]
    total = tokens.new_zeros(size, tokens.shape[-1]).index_add(0, row, tokens.mean(1) * real)
    count = tokens.new_zeros(size, 1).index_add(0, row, real)
    return total / count.clamp(min=1)
