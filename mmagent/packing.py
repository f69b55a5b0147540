"""Texts of different lengths laid behind each other in fewer, fuller rows: a language model computes no padding.

Attention stays inside each text, and places begin anew in each: by Transformers' own support where the model decodes
(it takes places that begin anew for texts of their own), by a mask of blocks where it encodes. Whether a model says the
same of packed texts is asked of the model itself when it is made (`holds`): one with a recurrent state, or without
places to give, does not, and is computed row by row with padding.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

# By places that begin anew; by a mask of blocks, of true and false or added to the scores.
Style = Literal["places", "blocks", "added"]

_CANDIDATES = 12  # numbers of rows that are tried
_LONGER = 2  # times the longest text: a packed row at most, since attention costs its square
_GAIN = 0.9  # of the padded cost: what does not fall below is not worth the moving
_PROBE, _ROWS = (5, 3, 4, 2), ((0, 2), (1, 3))  # lengths of the texts by which a model is asked, and those of a row
_TOLERANCE = 1e-4  # of the largest state
# What a layer may see of a text besides all of it; in a mask of blocks such a window would be lost.
_WINDOWS = ("sliding_window", "local_attention", "attention_window", "block_size")


@dataclass(frozen=True, slots=True)
class Packed:
    """Where the tokens of some texts went. Kept tokens are those of all texts, text by text."""

    keep: Tensor  # (texts, tokens) bool: which of the padded places hold a token
    slot: Tensor  # (kept,) the place of each among all packed ones, row by row
    places: Tensor  # (rows, size) counted from the beginning of each text; what is left over is a text of its own
    owner: Tensor  # (rows, size) which text

    def put(self, x: Tensor) -> Tensor:
        """Kept tokens (kept, ...) -> packed (rows, size, ...), zeros where nothing is."""
        out = x.new_zeros(self.places.numel(), *x.shape[1:])
        return out.index_copy(0, self.slot, x).unflatten(0, self.places.shape)

    def back(self, x: Tensor) -> Tensor:
        """Packed (rows, size, ...) -> padded (texts, tokens, ...), zeros where nothing is."""
        out = x.new_zeros(*self.keep.shape, *x.shape[2:])
        return out.masked_scatter(self.keep.view(*self.keep.shape, *[1] * (x.ndim - 2)), x.flatten(0, 1)[self.slot])

    def blocks(self) -> Tensor:
        """(rows, 1, size, size) bool: which token sees which."""
        return (self.owner[:, :, None] == self.owner[:, None, :])[:, None]


def pack(keep: Tensor, *, width: int, most: int | None) -> Packed | None:
    """Lays texts into rows; None where that saves little.

    Args:
        keep: (texts, tokens) bool.
        width: channels of the language model, by which attention is weighed against the rest.
        most: tokens that a row may have; none: any number.
    """
    lengths: list[int] = keep.sum(1).tolist()
    bins = plan(lengths, width=width, most=most)
    return None if bins is None else laid_out(keep, lengths, bins)


def plan(lengths: Sequence[int], *, width: int, most: int | None = None) -> list[list[int]] | None:
    """Which texts share a row; None where padding all to the longest costs about as little.

    Tried are rows as long as the longest text, filled one by one, and fewer, longer ones, filled evenly. Cost: a layer
    of `width` d takes 24 d^2 + 4 n d operations for a token that sees n, so tokens x (6 d + n).
    """
    longest, total = max(lengths, default=0), sum(lengths)
    if not total or longest * len(lengths) == total:
        return None
    limit = longest * _LONGER if most is None else max(longest, min(most, longest * _LONGER))
    fewest, enough = math.ceil(total / limit), min(len(lengths), math.ceil(total / longest) + 1)
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    counts = sorted({round(each) for each in np.linspace(fewest, enough, _CANDIDATES)})
    best, least = None, _GAIN * len(lengths) * longest * (6 * width + longest)
    for bins in (_filled(lengths, order, longest), *(_evenly(lengths, order, count) for count in counts)):
        size = max(sum(lengths[text] for text in row) for row in bins)
        cost = len(bins) * size * (6 * width + size)
        if size <= limit and cost <= least:
            best, least = bins, cost
    return best


def _filled(lengths: Sequence[int], order: Sequence[int], size: int) -> list[list[int]]:
    """Each text into the first row that has room (first fit decreasing, Johnson, 1973)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for text in order:
        row = next((row for row, left in enumerate(room) if left >= lengths[text]), len(bins))
        if row == len(bins):
            bins.append([])
            room.append(size)
        bins[row].append(text)
        room[row] -= lengths[text]
    return bins


def _evenly(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    """Each text into the row that is emptiest (the longest first, Graham, 1969)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for text in order:
        filled, row = heap[0]
        bins[row].append(text)
        heapq.heapreplace(heap, (filled + lengths[text], row))
    return bins


def laid_out(keep: Tensor, lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> Packed:
    """The texts of each bin behind each other."""
    size = max(sum(lengths[text] for text in row) for row in bins)
    places = np.zeros((len(bins), size), np.int64)
    owner = np.full((len(bins), size), -1, np.int64)
    starts = np.zeros(len(lengths), np.int64)
    for number, row in enumerate(bins):
        at = 0
        for text in row:
            end = at + lengths[text]
            places[number, at:end], owner[number, at:end] = np.arange(end - at), text
            starts[text], at = number * size + at, end
        places[number, at:] = np.arange(size - at)
    counts = np.asarray(lengths)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    slot = np.repeat(starts, counts) + within
    moved = (torch.from_numpy(each).to(keep.device, non_blocking=True) for each in (slot, places, owner))
    return Packed(keep, *moved)


def given(packed: Packed, style: Style, *, first: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a Transformers model is told of packed texts beside their tokens.

    Args:
        first: the number of a text's first place; none: the model takes no places.
        dtype: of a mask that is added to scores.
    """
    told = {} if first is None else {"position_ids": packed.places + first}
    if style == "places":
        return told
    mask = packed.blocks()
    if style == "added":
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return told | {"attention_mask": mask}


def styles(config: Any, *, decodes: bool, first: int | None) -> tuple[Style, ...]:
    """How a model of this config may be told of packed texts; it is to be asked which it understands (`holds`)."""
    if decodes:
        return () if first is None else ("places",)
    return () if windowed(config) else ("blocks", "added")


def windowed(config: Any) -> bool:
    """Whether some layers of a config see a window of the text alone."""
    kinds = getattr(config, "layer_types", None) or ()
    return any(getattr(config, name, None) for name in _WINDOWS) or any("full" not in kind for kind in kinds)


@torch.no_grad()
def holds(
    padded: Callable[[Tensor, Tensor], Tensor], packed: Callable[[Tensor, Packed], Tensor], vocabulary: int, pad: int
) -> bool:
    """Whether a model, in evaluation, says the same of a few packed texts as of padded ones.

    Args:
        padded: ids, mask (texts, tokens) -> states (texts, tokens, width).
        packed: ids (texts, tokens) and how they are packed -> the same states.
        pad: an id that is left out.
    """
    longest = max(_PROBE)
    ids = torch.arange(len(_PROBE) * longest).view(len(_PROBE), longest) * 7 % max(1, vocabulary - 1)
    ids = ids + (ids >= pad).long() if 0 <= pad < vocabulary else ids
    keep = torch.arange(longest) < torch.tensor(_PROBE)[:, None]
    layout = laid_out(keep, _PROBE, _ROWS)
    try:
        wanted, found = padded(ids, keep.long())[keep], packed(ids, layout)[keep]
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, AttributeError):
        return False  # what a model raises of places or a mask that it does not know
    return bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
