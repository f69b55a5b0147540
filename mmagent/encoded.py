"""What towers made of pictures and sounds, kept by content: one that is sent again, as in each turn of a conversation,
is not computed again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_NOTHING = b"stand-in"  # what stands for a picture or sound in a batch without any


class EncodedMedia:
    """Least recent out; safe among threads.

    Args:
        max_bytes: of all that is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def tokens(self, kind: str, media: Sequence[np.ndarray], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """(media, tokens, width) of decoded media; of none the stand-in's.

        Args:
            encode: makes (some, tokens, width) of the media of these numbers (some,).
        """
        keys = [_key(kind, each) for each in media] or [kind.encode() + _NOTHING]
        with self._lock:
            known = {key: self._kept[key] for key in keys if key in self._kept}
        first: dict[bytes, int] = {}
        for number, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, number)
        if first:
            made = encode(torch.tensor([*first.values()]))
            known |= zip(first, made, strict=True)
        with self._lock:
            for key in keys:
                self._keep(key, known[key])
        return torch.stack([known[key] for key in keys])

    def _keep(self, key: bytes, value: Tensor) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        size = value.numel() * value.element_size()
        if size > self._max_bytes:
            return
        self._kept[key] = value.clone()  # not the whole batch's memory for a part of it
        self._bytes += size
        while self._bytes > self._max_bytes:
            gone = self._kept.popitem(last=False)[1]
            self._bytes -= gone.numel() * gone.element_size()


def _key(kind: str, media: np.ndarray) -> bytes:
    found = hashlib.blake2b(np.ascontiguousarray(media).data, digest_size=16, person=kind.encode())
    return found.digest() + repr(media.shape).encode()
