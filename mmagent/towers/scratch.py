"""Image and audio towers trained from scratch: small encoders that turn a picture or a sound into a few tokens."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent.config import AudioTowerConfig, ImageTowerConfig


class Block(nn.Module):
    """A pre-norm transformer layer (arXiv:2002.04745) with an attention mask over its keys and a gated feed-forward
    (GEGLU, arXiv:2002.05202): products of features are what matching a picture to a question needs."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        inner = -(-8 * width // 24) * 8  # two thirds of 4 * width, as the gate doubles the first matrix
        self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x: (batch, tokens, width); keep: (batch, tokens), True where a token may be attended to."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, width / heads) each
        drop = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :], dropout_p=drop)
        x = x + F.dropout(self.out(seen.transpose(1, 2).reshape(batch, tokens, width)), self.dropout, self.training)
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + F.dropout(self.down(F.gelu(gate) * value), self.dropout, self.training)


class EdgeStem(nn.Module):
    """Fixed filters in front of an image tower: how strong edges of each direction and scale are, at half the size.

    The modulus of complex Gabor wavelets, summed over colours: the first order of a scattering transform (Bruna &
    Mallat, arXiv:1203.1514). It learns nothing, so it costs no backward pass, and a tower behind it tells shapes apart
    after a fraction of the samples that learned first filters need (LOG.md).
    """

    RADIUS = 4  # pixels

    def __init__(self, directions: int = 8, scales: tuple[float, ...] = (1.0, 2.0)) -> None:
        super().__init__()
        grid = torch.arange(-self.RADIUS, self.RADIUS + 1.0)
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        pairs = [_gabor(x, y, math.pi * index / directions, scale) for scale in scales for index in range(directions)]
        self.filters: Tensor  # (real parts, then imaginary parts, 1, height, width)
        parts = [*(real for real, _ in pairs), *(imaginary for _, imaginary in pairs)]
        self.register_buffer("filters", torch.stack(parts)[:, None], persistent=False)
        self.channels = directions * len(scales) + 3

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (pictures, 3, height, width) -> (pictures, channels, height / 2, width / 2), colours first."""
        # Who asks what a picture's pixels do to an answer wants gradients of them; training does not.
        with torch.set_grad_enabled(torch.is_grad_enabled() and pixels.requires_grad):
            return self._filtered(pixels)

    def _filtered(self, pixels: Tensor) -> Tensor:
        pictures, colours, height, width = pixels.shape
        flat = pixels.reshape(pictures * colours, 1, height, width)
        waves = F.conv2d(F.pad(flat, (self.RADIUS,) * 4, mode="replicate"), self.filters.to(pixels.dtype), stride=2)
        # (pictures, colours, real and imaginary part, filters, height, width)
        squares = waves.square() if waves.requires_grad else waves.square_()
        waves = squares.view(pictures, colours, 2, -1, *waves.shape[-2:])
        # Additions of whole planes: one reduction over both axes takes three times as long on a CPU.
        energy = sum((waves[:, colour, part] for colour in range(colours) for part in range(2)), waves.new_tensor(1e-6))
        return torch.cat([F.avg_pool2d(pixels, 2, ceil_mode=True), energy.sqrt()], dim=1)


def _gabor(x: Tensor, y: Tensor, angle: float, scale: float) -> tuple[Tensor, Tensor]:
    """A Gabor wavelet's real part (of mean zero) and imaginary part, each of norm one: (height, width)."""
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    envelope = torch.exp(-(along.square() + (0.6 * across).square()) / (2 * (1.2 * scale) ** 2))
    real, imaginary = (
        envelope * torch.cos(math.pi / 2 / scale * along),
        envelope * torch.sin(math.pi / 2 / scale * along),
    )
    real = real - envelope * (real.sum() / envelope.sum())
    return real / real.norm(), imaginary / imaginary.norm()


class ImageTower(nn.Module):
    """Edge filters, then convolutions, each followed by a pooling to half the size, down to a grid of `tokens`."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.grid = config.grid
        stages = max(
            1, int(min(math.log2(side / 2 / cells) for side, cells in zip(config.shape, self.grid, strict=True)))
        )
        self.stem = EdgeStem()
        self.stem_norm = nn.GroupNorm(1, self.stem.channels)
        widths = [self.stem.channels, *(max(32, config.width >> (stages - 1 - stage)) for stage in range(stages))]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.GELU(), nn.MaxPool2d(2))
            for a, b in itertools.pairwise(widths)
        )
        self.places = nn.Parameter(torch.randn(config.tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, 4, config.dropout or 0.0) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.width = config.width

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (pictures, 3, height, width) in [-1, 1] -> (pictures, tokens, width)."""
        x = self.stem_norm(self.stem(pixels))
        for stage in self.stages:
            x = stage(x)
        if x.shape[-2:] != self.grid:
            x = F.adaptive_avg_pool2d(x, self.grid)
        x = x.flatten(2).transpose(1, 2) + self.places
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)


class SoundNorm(nn.Module):
    """Normalises each sound over its channels and real positions, and silences the padding behind it, so that nothing
    depends on how long the batch's longest sound is."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x: (sounds, channels, positions); keep: (sounds, positions), True where there is sound."""
        real = keep[:, None].to(x.dtype)
        x = x * real
        count = real.sum((1, 2)) * x.shape[1]  # (sounds,)
        mean = x.sum((1, 2)) / count
        variance = (torch.linalg.vector_norm(x, dim=(1, 2)).square() / count - mean.square()).clamp(min=0)
        scale = (variance + self.eps).rsqrt()[:, None] * self.weight  # (sounds, channels)
        shift = self.bias - mean[:, None] * scale
        return torch.addcmul(shift[..., None], x, scale[..., None]) * real


class AudioTower(nn.Module):
    """Three convolutions of stride 2 over log-mel frames, transformer layers, and learned queries that read them."""

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        width = config.width
        dropout = 0.1 if config.dropout is None else config.dropout
        self.convs = nn.ModuleList(nn.Conv1d(channels, width, 3, 2, 1) for channels in (config.mels, width, width))
        self.norms = nn.ModuleList(SoundNorm(width) for _ in self.convs)
        self.blocks = nn.ModuleList(Block(width, 4, dropout) for _ in range(config.layers))
        self.queries = nn.Parameter(torch.randn(config.tokens, width) * 0.02)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mix = Block(width, 4, dropout)
        self.norm_out = nn.LayerNorm(width)
        self.width = width

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """frames: (sounds, frames, mels); lengths: (sounds,) frames that are real -> (sounds, tokens, width)."""
        x, left = frames.transpose(1, 2), lengths.clamp(min=1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            left = (left + 1) // 2
            x = conv(x)
            keep = torch.arange(x.shape[2], device=x.device)[None] < left[:, None]  # (sounds, positions)
            x = F.gelu(norm(x, keep))
        x = x.transpose(1, 2)  # (sounds, positions, width)
        x = x + _sinusoids(x.shape[1], x.shape[2], x.device)
        for block in self.blocks:
            x = block(x, keep)
        x = self.norm(x)
        queries = self.queries.expand(len(x), -1, -1)
        read = F.scaled_dot_product_attention(
            _split(queries), _split(self.key(x)), _split(self.value(x)), attn_mask=keep[:, None, None, :]
        )
        tokens = queries + read.transpose(1, 2).flatten(2)
        return self.norm_out(self.mix(tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool)))


def _split(x: Tensor, heads: int = 4) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions (arXiv:1706.03762, section 3.5): (length, width)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
