"""A pretrained audio tower: any Transformers audio model, known by what it takes and the shape of its states alone."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import pretrained, sounds
from mmagent.config import AudioTowerConfig
from mmagent.pretrained import BackboneError
from mmagent.sounds import ExtractedSounds
from mmagent.towers.projector import Projector

Conv = tuple[int, int, int]  # along time: how far the kernel reaches, stride, padding of both sides together
_MOST_EXTRA = 16  # states before the grid's: a class token, a distillation token


class TimeNorm(nn.Module):
    """A group norm whose statistics count a sound's real positions only, so that padding changes nothing.

    Takes the place of an `nn.GroupNorm` behind convolutions over time. `lengths` is set before each pass of the tower.
    """

    def __init__(self, norm: nn.GroupNorm, convs: list[Conv]) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps
        self.convs = convs
        self.lengths: Tensor | None = None  # (sounds,) frames of the tower's input

    def forward(self, x: Tensor) -> Tensor:
        """x: (sounds, channels, positions)."""
        if self.lengths is None:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        left = self.lengths
        for conv in self.convs:
            left = _after(left, conv)
        keep = (torch.arange(x.shape[2], device=x.device) < left.clamp(min=1)[:, None])[:, None, None]
        grouped = x.float().unflatten(1, (self.groups, -1))  # (sounds, groups, channels of one, positions)
        count = keep.sum((2, 3), keepdim=True) * grouped.shape[2]
        mean = (grouped * keep).sum((2, 3), keepdim=True) / count
        centred = grouped - mean
        variance = (centred * keep).square().sum((2, 3), keepdim=True) / count
        out = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        if self.weight is not None:
            out = out * self.weight[:, None] + self.bias[:, None]
        return out.to(x.dtype)


class PretrainedAudioTower(nn.Module):
    """A checkpoint's last states, averaged over time to `tokens` for each sound's own length and mapped to `width`.

    Attributes:
        model: the Transformers model.
        project: what is ours (`Projector`).
        stored: whether what comes in are states that `states` made before, not frames.
        shape: of a sound's states, (states, channels).

    Raises:
        BackboneError: a checkpoint that cannot be used.
    """

    def __init__(self, config: AudioTowerConfig, *, weights: bool = True) -> None:
        super().__init__()
        assert config.checkpoint is not None
        self.heard = ExtractedSounds(config)
        part = pretrained.load(config.checkpoint, "audio", key=sounds.KEY, weights=weights, dropout=config.dropout)
        if self.heard.argument not in pretrained.takes(part.outline):
            raise BackboneError(
                f"the feature extractor of {config.checkpoint!r} makes {self.heard.argument}, which its model does "
                "not take: copy preprocessor_config.json and config.json from one place"
            )
        self.masked = self.heard.fixed is None and "attention_mask" in pretrained.takes(part.outline)
        frames = self.heard.fixed or self.heard.frames_per_s
        states, convs = _trace(part.outline, self.heard, frames, config.checkpoint)
        unread = pretrained.unread(part.outline, states)
        part.require({name for name, _ in part.model.named_parameters()} - unread)
        pretrained.hold(part.model, unread)
        self.model: Any = part.model
        self.norms = [] if self.heard.fixed else _replace_norms(part.model, convs)
        self.grid = _grid(states, frames, self.heard.channels, part.outline.config)
        self.hop = frames / (self.grid[1] if self.grid else _flat(states).shape[1])  # frames of a position
        positions = self.grid[1] if self.grid else _flat(states).shape[1]
        self.tokens = min(config.tokens, positions) if self.heard.fixed else config.tokens
        extra = _flat(states).shape[1] - math.prod(self.grid) if self.grid else 0
        self.extra, self.maps = extra, states.ndim == 4
        self.project = Projector(_flat(states).shape[2], config.width, self.tokens, summary=extra > 0)
        self.width = config.width
        self.stored = False
        self.shape = (self.tokens + (extra > 0), _flat(states).shape[2])
        self.padded = 0  # frames that every sound is padded to, where the model would hear how long its batch is
        if self.heard.fixed is None and not next(self.model.parameters()).is_meta and self._hears_padding():
            self.padded = self.heard.longest

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        pretrained.still(self.model)
        return self

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """frames: (sounds, frames, channels), or their states where those are `stored`; lengths: (sounds,) frames that
        are real -> (sounds, tokens, width).

        A sound of fewer positions than tokens gives some of them several times.
        """
        states = frames if self.stored else self.states(frames, lengths)
        return self.project(states[:, 1:], states[:, 0]) if self.extra else self.project(states, None)

    def states(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """What the checkpoint alone makes of sounds: (sounds, states, channels), the whole's before those in time."""
        states, whole, positions = self._states(frames, lengths)
        pooled = pool(states, positions, self.tokens)
        return pooled if whole is None else torch.cat([whole[:, None], pooled], dim=1)

    def _states(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """States (sounds, positions, channels), the state of the whole where there is one, and how many are real."""
        if self.padded > frames.shape[1]:
            frames = F.pad(frames, (0, 0, 0, self.padded - frames.shape[1]))
        options = {}
        if self.masked:
            options["attention_mask"] = (torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]).long()
        for norm in self.norms:
            norm.lengths = lengths
        out = self.model(**{self.heard.argument: _arranged(frames, self.heard)}, **options)
        states = _flat(out.last_hidden_state)
        whole = states[:, 0] if self.extra else None
        if self.grid:  # over the pitches of each time
            states = states[:, self.extra :].unflatten(1, self.grid).mean(1)
        return states, whole, self._positions(lengths, states.shape[1])

    def _positions(self, lengths: Tensor, most: int) -> Tensor:
        """How many of `most` positions are real, of sounds of so many real frames."""
        if self.maps:
            return torch.full_like(lengths, most)
        count = getattr(self.model, "_get_feat_extract_output_lengths", None)
        real = count(lengths) if count is not None and not self.grid else torch.ceil(lengths / self.hop)
        return real.long().clamp(1, most)

    @torch.no_grad()
    def _hears_padding(self) -> bool:
        """Whether a sound's states change beside a longer one. True of models with a norm or a convolution that sees
        padding and a mask that does not reach it."""
        long = min(self.heard.longest, self.heard.frames_per_s)
        short = max(1, long // 3)
        noise = torch.randn(2, long, self.heard.channels, generator=torch.Generator().manual_seed(0))
        noise[0, short:] = 0
        training = self.training
        self.eval()
        alone, _, count = self._states(noise[:1, :short], torch.tensor([short]))
        beside, _, _ = self._states(noise, torch.tensor([short, long]))
        self.train(training)
        alone, beside = alone[0, : count[0]], beside[0, : count[0]]
        return alone.shape != beside.shape or not torch.allclose(alone, beside, rtol=1e-3, atol=1e-3)


def pool(states: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """Adaptive average pooling (as `nn.AdaptiveAvgPool1d`) over each row's own length.

    states: (rows, positions, channels); lengths: (rows,) of at least one -> (rows, tokens, channels).
    """
    place = torch.arange(states.shape[1], device=states.device)  # (positions,)
    index = torch.arange(tokens, device=states.device)  # (tokens,)
    start = index * lengths[:, None] // tokens  # (rows, tokens)
    end = -(-(index + 1) * lengths[:, None] // tokens)
    within = (place >= start[..., None]) & (place < end[..., None])  # (rows, tokens, positions)
    real = place < lengths[:, None]
    total = within.to(states.dtype) @ states.masked_fill(~real[..., None], 0)
    return total / (end - start)[..., None]


def _trace(outline: nn.Module, heard: ExtractedSounds, frames: int, name: str) -> tuple[Tensor, dict[str, list[Conv]]]:
    """The states of one sound, without numbers, and for each group norm the convolutions before it."""
    path: list[Conv] = []
    convs: dict[str, list[Conv]] = {}
    hooks = []
    for place, module in outline.named_modules():
        if isinstance(module, nn.Conv1d):
            hooks.append(module.register_forward_pre_hook(lambda conv, _: path.append(_shape(conv))))
        elif isinstance(module, nn.GroupNorm):
            hooks.append(module.register_forward_pre_hook(lambda *_, place=place: convs.update({place: list(path)})))
    x = _arranged(torch.empty(1, frames, heard.channels, device="meta"), heard)
    with pretrained.refusing(name, pretrained.locate(name), sounds.KEY), torch.enable_grad():
        try:
            out = outline.eval()(**{heard.argument: x})
        except TypeError as error:  # it takes more than sound
            raise BackboneError(f"{name!r} is no audio model for a tower: {error}") from error
    for hook in hooks:
        hook.remove()
    states = getattr(out, "last_hidden_state", None)
    if states is None or states.ndim not in (3, 4):
        raise BackboneError(
            f"{name!r} is no audio model for a tower: it gives {', '.join(out.keys())}, but a last_hidden_state of "
            "(sounds, states, channels) is wanted"
        )
    return states, convs


def _replace_norms(model: nn.Module, convs: dict[str, list[Conv]]) -> list[TimeNorm]:
    norms = []
    for place, path in convs.items():
        owner, _, leaf = place.rpartition(".")
        norm = model.get_submodule(place)
        assert isinstance(norm, nn.GroupNorm)
        norms.append(TimeNorm(norm, path))
        setattr(model.get_submodule(owner), leaf, norms[-1])
    return norms


def _grid(states: Tensor, frames: int, channels: int, config: Any) -> tuple[int, int] | None:
    """(pitches, times) of a model that cuts a spectrogram into patches, as its config says; none: positions in time."""
    high, wide = getattr(config, "frequency_stride", None), getattr(config, "time_stride", None)
    patch = getattr(config, "patch_size", None)
    if states.ndim == 3 and isinstance(high, int) and isinstance(wide, int) and isinstance(patch, int):
        grid = ((channels - patch) // high + 1, (frames - patch) // wide + 1)
        if 0 <= states.shape[1] - math.prod(grid) <= _MOST_EXTRA:
            return grid
    return None


def _arranged(frames: Tensor, heard: ExtractedSounds) -> Tensor:
    """(sounds, frames, channels) as the model wants it."""
    if heard.raw:
        return frames[..., 0]
    return frames.transpose(1, 2) if heard.time_last else frames


def _flat(states: Tensor) -> Tensor:
    """(sounds, states, channels), of a map (sounds, channels, height, width) too."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


def _shape(conv: nn.Conv1d) -> Conv:
    reach, padding = conv.dilation[0] * (conv.kernel_size[0] - 1), conv.padding
    both = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * int(padding[0])
    return reach, conv.stride[0], both


def _after(lengths: Tensor, conv: Conv) -> Tensor:
    reach, stride, padding = conv
    return torch.div(lengths + padding - reach - 1, stride, rounding_mode="floor") + 1
