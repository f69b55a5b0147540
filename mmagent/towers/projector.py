"""From a pretrained tower's states to the join's tokens: what a tower of someone else's width learns first."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Normalises and maps states to tokens, and tells each token its place.

    Args:
        states: channels of the tower's states.
        width: of the tokens.
        tokens: how many there are.
        summary: whether the tower has a state of the whole, as a class token's; each token is told of it.
    """

    def __init__(self, states: int, width: int, tokens: int, *, summary: bool) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.LayerNorm(states), nn.Linear(states, width))
        self.whole = nn.Sequential(nn.LayerNorm(states), nn.Linear(states, width)) if summary else None
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.02)

    def forward(self, states: Tensor, whole: Tensor | None) -> Tensor:
        """states: (media, tokens, channels); whole: (media, channels) -> (media, tokens, width)."""
        out: Tensor = self.tokens(states) + self.places
        if self.whole is not None:
            assert whole is not None
            out = out + self.whole(whole)[:, None]
        return out
