"""Texts as vectors: the mean of a language model's states, of length 1. What knowledge is searched by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mmagent import text


class Embedder:
    """
    Args:
        backbone: a Transformers checkpoint folder, or a hub id: a bundle's ``backbone/``, for example.
        max_tokens: of one text; a longer one loses its end.

    Raises:
        BackboneError: see `mmagent.text.load_encoder`.
    """

    def __init__(self, backbone: str | Path, *, max_tokens: int = 256, device: str = "auto") -> None:
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._device = torch.device(place)
        self._encoder = text.load_encoder(str(backbone)).eval().requires_grad_(False).to(self._device)
        self._tokenizer = text.load_tokenizer(str(backbone))
        self._tokenizer.truncation_side = "right"  # of a document the beginning says what it is about
        self._max_tokens = min(max_tokens, self._encoder.max_tokens or max_tokens)

    @property
    def width(self) -> int:
        return self._encoder.width

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """(texts, width) float32."""
        out = [np.zeros((0, self.width), np.float32)]
        for at in range(0, len(texts), batch_size):
            rows = [ids for ids, _ in text.fitted(self._tokenizer, texts[at : at + batch_size], self._max_tokens)]
            longest = max(map(len, rows))
            ids = torch.full((len(rows), longest), self._tokenizer.pad_token_id)
            mask = torch.zeros(len(rows), longest, dtype=torch.int64)
            for row, found in enumerate(rows):
                ids[row, : len(found)], mask[row, : len(found)] = torch.from_numpy(found), 1
            states = self._encoder(ids.to(self._device), mask.to(self._device)).float()
            weight = mask.to(self._device)[..., None].float()
            mean = (states * weight).sum(1) / weight.sum(1)
            out.append(torch.nn.functional.normalize(mean, dim=1).cpu().numpy())
        return np.concatenate(out)
