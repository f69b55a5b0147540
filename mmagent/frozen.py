"""The states of a frozen language model that stands outside the trained module."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mmagent import features
from mmagent.text import TextEncoder

# Of a forward pass where states must not hang on their company: texts are filled up to a multiple of so many tokens,
# and as many are taken together as make about so many in all. Small enough to waste little, large enough to be fast.
_LENGTH, _TOKENS = 8, 128


class FrozenStates:
    """The states of a frozen language model, computed once for each text and kept in memory (least recent out).

    It stands outside the trained module, so that neither gradients nor ZeRO ever see the language model. What is kept
    takes `max_mb` at most, whatever the length of the texts; a batch's own states come on top while it is made.

    A text's states differ in their last bits with what it is computed together with, and which texts are new in a batch
    hangs on where a run was stopped, and on whether its validation or its next steps come to a text first. `exact` ones
    are computed in batches of a shape that hangs on the text's own length alone, so that a CPU makes the same of a text
    every time; what is new costs a little more for it. Not on a GPU, where small batches are dear.

    May be called from several threads.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        max_mb: int = 1024,
        device: torch.device | str = "cpu",
        exact: bool = False,
    ) -> None:
        self.encoder = encoder.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self._exact = exact and self.device.type == "cpu"
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes, self._max_bytes = 0, max_mb << 20

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, given: Mapping[bytes, np.ndarray] | None = None) -> Tensor:
        """ids, mask: (batch, tokens) -> states (batch, tokens, width), zero where the mask is.

        Args:
            given: states that were computed before (see `mmagent.features`), by key.
        """
        lengths = mask.sum(1).tolist()
        keys = [
            features.key("text", row[:length].numpy().tobytes()) for row, length in zip(ids.cpu(), lengths, strict=True)
        ]
        stored = {key: torch.from_numpy(given[key]) for key in keys if key in given} if given else {}
        with self._lock:
            known = stored | {key: self._kept[key] for key in keys if key in self._kept}
        first = {key: index for index, key in enumerate(keys) if key not in known}
        for rows, width in self._batches([*first.values()], lengths):
            tokens, real = (_wide(each[rows, :width], width).to(self.device) for each in (ids, mask))
            states = self.encoder(tokens, real, packed=not self._exact).float()
            known |= {keys[row]: state[: lengths[row]] for row, state in zip(rows, states, strict=True)}
        out = torch.zeros(len(keys), ids.shape[1], self.encoder.width, device=self.device)
        for index, key in enumerate(keys):
            out[index, : lengths[index]] = known[key]
            if key not in stored:
                with self._lock:
                    self._keep(key, known[key])
        return out

    def _batches(self, rows: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Rows that are computed together, and how many tokens wide; exact ones fill up a batch with one of them."""
        if not rows:
            return
        if not self._exact:
            yield [*rows], max(1, *(lengths[row] for row in rows))
            return
        alike: dict[int, list[int]] = {}
        for row in rows:
            width = max(1, -(-lengths[row] // _LENGTH)) * _LENGTH
            alike.setdefault(min(width, self.encoder.max_tokens or width), []).append(row)
        for width, found in alike.items():
            size = max(1, _TOKENS // width)
            for start in range(0, len(found), size):
                part = found[start : start + size]
                yield part + part[-1:] * (size - len(part)), width

    def _keep(self, key: bytes, states: Tensor) -> None:
        """Puts a text's states in the first place; the least recent make room before theirs is copied."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        size = len(key) + states.nbytes
        if size > self._max_bytes:
            return
        while self._bytes + size > self._max_bytes:
            gone, freed = self._kept.popitem(last=False)
            self._bytes -= len(gone) + freed.nbytes
        self._kept[key] = states.clone()
        self._bytes += size


def _wide(tokens: Tensor, width: int) -> Tensor:
    """(rows, at most `width`) -> (rows, width), filled up with what the mask leaves out."""
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]))
