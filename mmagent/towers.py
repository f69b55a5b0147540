"""Image and audio towers trained from scratch: small encoders that turn a picture or a sound into a few tokens.

A tower takes a packed stack of all pictures (or sounds) of a batch and knows nothing of samples; placing its tokens
is the join's work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent.config import AudioTowerConfig, ImageTowerConfig


import os
GLU = os.environ.get('GLU') == '1'


class Block(nn.Module):
    """A pre-norm transformer layer (arXiv:2002.04745) with an attention mask over its keys."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if GLU:
            self.up, self.down = nn.Linear(width, 2 * (8 * width // 3)), nn.Linear(8 * width // 3, width)
        else:
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x: (batch, tokens, width); keep: (batch, tokens), True where a token may be attended to."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, width / heads) each
        drop = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :], dropout_p=drop)
        x = x + F.dropout(self.out(seen.transpose(1, 2).reshape(batch, tokens, width)), self.dropout, self.training)
        h = self.up(self.norm2(x))
        if GLU:
            a, b = h.chunk(2, -1)
            h = F.gelu(a) * b
        else:
            h = F.gelu(h)
        return x + F.dropout(self.down(h), self.dropout, self.training)


class ImageTower(nn.Module):
    """Convolutions, each followed by a pooling to half the size, down to a square of `tokens` cells.

    Pooling after the convolution learns shapes from a quarter of the samples that strided convolutions need (LOG.md).
    """

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        grid = math.isqrt(config.tokens)
        if grid * grid != config.tokens:
            raise ValueError(f"model.image.tokens={config.tokens} is no square number, such as 4, 9, 16, 49")
        stages = max(1, int(math.log2(config.size / grid)))
        widths = [3, *(max(16, config.width >> (stages - 1 - stage)) for stage in range(stages))]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.GELU(), nn.MaxPool2d(2))
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.grid = grid
        self.places = nn.Parameter(torch.randn(config.tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, 4, 0.0) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.width = config.width

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (pictures, 3, size, size) in [-1, 1] -> (pictures, tokens, width)."""
        x = pixels
        for stage in self.stages:
            x = stage(x)
        if x.shape[-1] != self.grid:
            x = F.adaptive_avg_pool2d(x, self.grid)
        x = x.flatten(2).transpose(1, 2) + self.places
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)  # type: ignore[no-any-return]


class AudioTower(nn.Module):
    """Three convolutions of stride 2 over log-mel frames, transformer layers, and learned queries that read them."""

    STRIDE = 8  # frames that become one position

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        width = config.width
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, width, 3, 2, 1) for channels in (config.mels, width, width)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in self.convs)
        self.blocks = nn.ModuleList(Block(width, 4, 0.1) for _ in range(config.layers))
        self.queries = nn.Parameter(torch.randn(config.tokens, width) * 0.02)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mix = Block(width, 4, 0.1)
        self.norm_out = nn.LayerNorm(width)
        self.width = width

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """frames: (sounds, frames, mels); lengths: (sounds,) frames that are real -> (sounds, tokens, width)."""
        x = frames.transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        x = x.transpose(1, 2)  # (sounds, positions, width)
        x = x + _sinusoids(x.shape[1], x.shape[2], x.device)
        positions = torch.arange(x.shape[1], device=x.device)
        keep = positions[None] * self.STRIDE < lengths.clamp(min=1)[:, None]  # (sounds, positions)
        for block in self.blocks:
            x = block(x, keep)
        x = self.norm(x)
        queries = self.queries.expand(len(x), -1, -1)
        read = F.scaled_dot_product_attention(
            _split(queries), _split(self.key(x)), _split(self.value(x)), attn_mask=keep[:, None, None, :]
        )
        tokens = queries + read.transpose(1, 2).flatten(2)
        return self.norm_out(self.mix(tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool)))  # type: ignore[no-any-return]


def _split(x: Tensor, heads: int = 4) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions (arXiv:1706.03762, section 3.5): (length, width)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
