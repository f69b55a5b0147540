"""What speaks for an answer: words, regions of pictures and stretches of sound, each with a weight."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmagent.media import Limits, decode_image

GRID = 8  # regions of a picture, in each direction
BINS = 20  # stretches of a sound
_SHOWN_PIXELS = 512  # of a drawn picture's longer side


class ExplainError(ValueError):
    """A model or task for which no evidence can be found; says why."""


class Place(NamedTuple):
    """Where words stand in a record: characters of a text among a message's parts (see `mmagent.record.segments`)."""

    message: int
    part: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Word:
    """A word of what was read (or a few that stand together in a long text), and what it is made of: tokens of the
    view, or, where the model reads words among other things, a place of the record."""

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    weight: float
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The largest weight of all is 1; what speaks against the answer, or is nothing to it, has none."""

    method: str
    target: str
    words: tuple[Word, ...]
    images: tuple[np.ndarray, ...]  # (GRID, GRID) each
    audios: tuple[np.ndarray, ...]  # (BINS,) each

    def units(self) -> list[tuple[float, tuple[str, int, int]]]:
        """Weight, and (kind, which, place), of all that can be taken away."""
        found = [(word.weight, ("word", 0, place)) for place, word in enumerate(self.words)]
        for which, grid in enumerate(self.images):
            found += [(float(weight), ("image", which, place)) for place, weight in enumerate(grid.ravel())]
        for which, bins in enumerate(self.audios):
            found += [(float(weight), ("audio", which, place)) for place, weight in enumerate(bins)]
        return found

    def to_dict(self, seconds: Sequence[float], pictures: Sequence[bytes], limits: Limits) -> dict[str, Any]:
        """As the service says it.

        Args:
            seconds: how long each sound is.
            pictures: the encoded pictures, to draw on.
        """
        return {
            "method": self.method,
            "target": self.target,
            "tokens": [
                {"text": word.text, "start": word.start, "end": word.end, "weight": round(word.weight, 4)}
                for word in self.words
            ],
            "images": [
                {"grid": np.round(grid, 4).tolist(), "picture": drawn(data, grid, limits)}
                for grid, data in zip(self.images, pictures, strict=True)
            ],
            "audios": [
                {
                    "spans": [
                        [round(long * at / BINS, 3), round(long * (at + 1) / BINS, 3), round(float(weight), 4)]
                        for at, weight in enumerate(bins)
                    ]
                }
                for bins, long in zip(self.audios, seconds, strict=True)
            ],
        }


def scaled(
    method: str, target: str, words: Sequence[Word], images: Sequence[np.ndarray], audios: Sequence[np.ndarray]
) -> Evidence:
    """With the largest weight of all made 1."""
    most = max([1e-12, *(word.weight for word in words), *(float(each.max()) for each in (*images, *audios))])
    return Evidence(
        method,
        target,
        tuple(replace(word, weight=word.weight / most) for word in words),
        tuple(grid / most for grid in images),
        tuple(bins / most for bins in audios),
    )


def drawn(data: bytes, grid: np.ndarray, limits: Limits) -> str:
    """A picture with evidence laid over it, as a data URI: what has none is dimmed, what has much stands out in warm
    colour."""
    image = decode_image(data, limits).convert("RGB")
    image.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS))
    if max(image.size) < _SHOWN_PIXELS // 2:
        scale = _SHOWN_PIXELS // 2 / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
    heat = Image.fromarray((np.clip(grid, 0, 1) * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    weight = np.asarray(heat, np.float32)[..., None] / 255  # (height, width, 1)
    pixels = np.asarray(image, np.float32)
    warm = np.array([255.0, 96.0, 0.0])
    shown = pixels * (0.55 + 0.45 * weight) * (1 - 0.45 * weight) + warm * 0.45 * weight
    out = io.BytesIO()
    Image.fromarray(shown.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def part(size: int, at: int, parts: int) -> slice:
    """The `at`-th of so many equal parts of a length."""
    return slice(size * at // parts, max(size * (at + 1) // parts, size * at // parts + (size >= parts)))
