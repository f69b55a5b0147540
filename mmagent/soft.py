"""The model that joins at the language model's input: pictures and sounds become tokens among the words (LLaVA,
arXiv:2304.08485), and the language model itself brings them together.

A plain `nn.Module`, as `mmagent.model` says. It answers with heads on the language model's states, and writes with the
language model's own output layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmagent.config import ModelConfig
from mmagent.model import Batch, heard_by, module_name, seen_by
from mmagent.reading import PLACES
from mmagent.tasks import Fused, Task
from mmagent.text import TextEncoder
from mmagent.towers import audio_tower, image_tower
from mmagent.writer import Hear, Line, Scored, Writer, Writing

_WORD_SIZE = 0.02  # deviation of an embedding's entries where the checkpoint's are not at hand


class SoftModel(nn.Module):
    """Towers -> projectors -> the language model among the words -> a head for each task, or text.

    Args:
        config: the model's section of a config.
        tasks: what is answered, by name.
        backbone: the language model; a `Writer` where a task writes.
        weights: whether pretrained towers get their weights here; not where a bundle's come afterwards.
    """

    def __init__(
        self, config: ModelConfig, tasks: Mapping[str, Task], backbone: TextEncoder, *, weights: bool = True
    ) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self._written = [name for name, task in tasks.items() if task.generates]
        self._pooling = config.pooling
        if config.pooling == "auto":
            self._pooling = "last" if backbone.decodes else "mean"
        self.backbone = backbone
        self.image_tower = image_tower(config.image, weights=weights) if config.image else None
        self.audio_tower = audio_tower(config.audio, weights=weights) if config.audio else None
        size = _word_size(backbone)
        towers = (("image", config.image), ("audio", config.audio))
        self.join = nn.ModuleDict(
            {kind: _projector(config, tower.width, backbone.width, size) for kind, tower in towers if tower}
        )
        self.dropout = nn.Dropout(config.dropout if config.head_dropout is None else config.head_dropout)
        self.heads = nn.ModuleDict(
            {module_name(name): task.head(backbone.width) for name, task in tasks.items() if not task.generates}
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """batch: see `mmagent.batch.Inputs.batch` -> for each task's name its output, rows first."""
        mask = batch["mask"]
        out: dict[str, Tensor] = {}
        states: Tensor | None
        if self._written:
            # Several tasks that write share the pass: a row has a reply of one of them at most.
            replies = torch.stack(_level([batch[f"{name}/reply"] for name in self._written])).amax(0)
            logits, states = self._score(batch, replies)
            out |= {name: logits[:, logits.shape[1] - batch[f"{name}/reply"].shape[1] :] for name in self._written}
        else:
            states = self._read(batch)
        if self.heads:
            assert states is not None
            fused = Fused(self.dropout(self._pooled(states, mask)), self.dropout(states))
            for name in self.tasks:
                if name not in out:
                    out[name] = self.heads[module_name(name)](fused, batch)
        return out

    @torch.no_grad()
    def write(self, batch: Batch, *, stops: Sequence[int], pad: int, how: Writing, hear: Hear = None) -> list[Line]:
        """What the language model writes after each row: see `Writer.write`."""
        assert isinstance(self.backbone, Writer)
        return self.backbone.write(self.embeds(batch), batch["mask"], stops=stops, pad=pad, how=how, hear=hear)

    def features(self, batch: Batch) -> list[Tensor]:
        """The mean state of each row, (rows, width): what a linear probe sees."""
        mask = batch["mask"].to(torch.float32)[..., None]
        states = self._read(batch)
        return [(states * mask).sum(1) / mask.sum(1).clamp(min=1)]

    def _read(self, batch: Batch) -> Tensor:
        """(rows, tokens, width): the language model's states."""
        return self.backbone.read(self.embeds(batch), batch["mask"])

    def _score(self, batch: Batch, replies: Tensor) -> Scored:
        assert isinstance(self.backbone, Writer)
        return self.backbone.score(self.embeds(batch), batch["mask"], replies, states=bool(self.heads))

    def embeds(self, batch: Batch) -> Tensor:
        """(rows, tokens, width): words, and the towers' tokens at their places. Towers run on a stand-in where a batch
        has nothing for them, so that all ranks of a distributed run take part in every collective."""
        ids = batch["ids"]
        embeds = self.backbone.embed(ids.clamp(min=0))
        for kind in self.join:
            if kind == "image":
                assert self.image_tower is not None
                seen = seen_by(self.image_tower, batch)
            else:
                assert self.audio_tower is not None
                seen = heard_by(self.audio_tower, batch)
            tokens = self.join[kind](seen).to(embeds.dtype)  # (media, n, width)
            embeds = embeds.masked_scatter((ids == PLACES[kind])[..., None], tokens[batch[f"{kind}_real"]])
            embeds = embeds + 0 * tokens.sum()
        return embeds

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """(rows, tokens, width), (rows, tokens) -> (rows, width)."""
        if self._pooling == "first":
            return states[:, 0]
        if self._pooling == "last":
            last = mask.sum(1).clamp(min=1) - 1
            return states[torch.arange(len(states), device=states.device), last]
        weight = mask.to(states.dtype)[..., None]
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def _projector(config: ModelConfig, tower: int, width: int, size: float) -> nn.Module:
    """From a tower's channels to the language model's; at first its tokens are as large as words are."""
    norm = nn.LayerNorm(width)
    nn.init.constant_(norm.weight, size)
    if config.projector == "linear":
        return nn.Sequential(nn.Linear(tower, width), norm)
    return nn.Sequential(nn.Linear(tower, width), nn.GELU(), nn.Linear(width, width), norm)


def _word_size(backbone: TextEncoder) -> float:
    table = backbone.model.get_input_embeddings().weight  # type: ignore[operator]
    return _WORD_SIZE if table.is_meta else float(table.detach().float().std())


def _level(replies: list[Tensor]) -> list[Tensor]:
    """Replies (rows, reply) of several tasks, as long as the longest; they are aligned at their ends."""
    longest = max(reply.shape[1] for reply in replies)
    return [nn.functional.pad(reply, (longest - reply.shape[1], 0), value=-100) for reply in replies]
