"""A pretrained image tower: any Transformers vision model, known by the shape of its states alone."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import pictures, pretrained
from mmagent.config import ImageTowerConfig
from mmagent.pretrained import BackboneError
from mmagent.towers.projector import Projector

_MOST_EXTRA = 16  # states before the grid's: a class token, a distillation token, registers


class PretrainedImageTower(nn.Module):
    """A checkpoint's last states, averaged over a grid of `tokens` and mapped to `width`.

    Attributes:
        model: the Transformers model.
        project: what is ours (`Projector`).
        stored: whether what comes in are states that `states` made before, not pixels.
        shape: of a picture's states, (states, channels).

    Raises:
        BackboneError: a checkpoint that cannot be used.
    """

    def __init__(self, config: ImageTowerConfig, *, weights: bool = True) -> None:
        super().__init__()
        assert config.checkpoint is not None
        height, width = pictures.of(config).shape
        part = pretrained.load(config.checkpoint, "image", key=pictures.KEY, weights=weights, dropout=config.dropout)
        states = _states(part.outline, (height, width), config.checkpoint)
        unread = pretrained.unread(part.outline, states)
        part.require({name for name, _ in part.model.named_parameters()} - unread)
        pretrained.hold(part.model, unread)
        self.model: nn.Module = part.model
        self.extra, self.grid = _layout(states, (height, width), getattr(part.outline.config, "patch_size", None))
        side = math.isqrt(config.tokens)
        self.pooled = (min(side, self.grid[0]), min(side, self.grid[1]))
        channels = states.shape[1] if states.ndim == 4 else states.shape[2]
        self.project = Projector(channels, config.width, math.prod(self.pooled), summary=self.extra > 0)
        self.width = config.width
        self.stored = False
        self.shape = (math.prod(self.pooled) + (self.extra > 0), channels)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        pretrained.still(self.model)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (pictures, 3, height, width), normalised as the checkpoint wants, or their states where those are
        `stored` -> (pictures, tokens, width)."""
        states = pixels if self.stored else self.states(pixels)
        return self.project(states[:, 1:], states[:, 0]) if self.extra else self.project(states, None)

    def states(self, pixels: Tensor) -> Tensor:
        """What the checkpoint alone makes of pictures: (pictures, states, channels), the whole's before the grid's."""
        states = self.model(pixel_values=pixels).last_hidden_state
        whole = None
        if states.ndim == 3:  # (pictures, extra + height * width of the grid, channels)
            whole = states[:, 0] if self.extra else None
            states = states[:, self.extra :].transpose(1, 2).unflatten(2, self.grid)
        if self.pooled != self.grid:
            states = F.adaptive_avg_pool2d(states, self.pooled)
        states = states.flatten(2).transpose(1, 2)
        return states if whole is None else torch.cat([whole[:, None], states], dim=1)


def _states(outline: nn.Module, size: tuple[int, int], name: str) -> Tensor:
    """The states of one picture, without numbers: (1, states, channels) or (1, channels, height, width)."""
    with pretrained.refusing(name, pretrained.locate(name), pictures.KEY), torch.enable_grad():
        try:
            out = outline.eval()(pixel_values=torch.empty(1, 3, *size, device="meta"))
        except TypeError as error:  # it takes more than pictures
            raise BackboneError(f"{name!r} is no vision model for a tower: {error}") from error
    states = getattr(out, "last_hidden_state", None)
    if states is None or states.ndim not in (3, 4):
        raise BackboneError(
            f"{name!r} is no vision model for a tower: it gives {', '.join(out.keys())}, but a last_hidden_state of "
            "(pictures, states, channels) or (pictures, channels, height, width) is wanted"
        )
    return states


def _layout(states: Tensor, size: tuple[int, int], patch: int | list[int] | None) -> tuple[int, tuple[int, int]]:
    """How many states stand before the grid's, and the grid's height and width."""
    if states.ndim == 4:
        return 0, (states.shape[2], states.shape[3])
    count = states.shape[1]
    if patch is not None:
        high, wide = (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])
        grid = (size[0] // high, size[1] // wide)
        if 0 <= count - math.prod(grid) <= _MOST_EXTRA:
            return count - math.prod(grid), grid
    side = math.isqrt(count)
    return (count - side * side, (side, side)) if count - side * side <= _MOST_EXTRA else (0, (1, count))
