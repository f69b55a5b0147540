"""The states of a frozen language model that stands outside the trained module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmagent import features
from mmagent.text import TextEncoder


class FrozenStates:
    """The states of a frozen language model, computed once for each text and kept in memory (least recent out).

    It stands outside the trained module, so that neither gradients nor ZeRO ever see the language model. What is kept
    takes `max_mb` at most, whatever the length of the texts; a batch's own states come on top while it is made.
    """

    def __init__(self, encoder: TextEncoder, *, max_mb: int = 1024, device: torch.device | str = "cpu") -> None:
        self.encoder = encoder.eval().requires_grad_(False).to(device)
        self.device = device
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
        known = stored | {key: self._kept[key] for key in keys if key in self._kept}
        first = {key: index for index, key in enumerate(keys) if key not in known}
        if first:
            rows = list(first.values())
            longest = max(1, *(lengths[row] for row in rows))
            states = self.encoder(ids[rows, :longest].to(self.device), mask[rows, :longest].to(self.device)).float()
            known |= {key: state[: lengths[row]] for (key, row), state in zip(first.items(), states, strict=True)}
        out = torch.zeros(len(keys), ids.shape[1], self.encoder.width, device=self.device)
        for index, key in enumerate(keys):
            out[index, : lengths[index]] = known[key]
            if key not in stored:
                self._keep(key, known[key])
        return out

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
