"""A question as it comes from a worse camera, microphone or keyboard: the same for everybody who asks with one seed.

image   each value has normal noise of a tenth of the range added, after a blur (normal, of a 64th of the longer
        side)
audio   has white noise added, 10 dB below its own power
text    has lost a fifth of its words, at random; what spans mark stays, with spaces in the place of what goes
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageFilter

from mmagent import targets
from mmagent.media import Limits, MediaError, decode_image
from mmagent.record import Media, Message, Record, compose, segments

KINDS = ("image", "audio", "text")
NOISE, BLUR = 0.1, 1 / 64
SNR_DB = 10.0
DROPPED = 0.2
_WORD = re.compile(r"\S+")


def disturbed(record: Record, kind: str, limits: Limits, seed: int) -> Record | None:
    """The record with one kind of input made worse; none where it has none of it, or it cannot be read."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{record.id}:{kind}".encode())])
    try:
        if kind == "text":
            made = replace(record, messages=_thinned(record, rng))
        elif kind == "image":
            made = replace(
                record,
                images=tuple(Media(picture(each.read(), limits, rng), None) for each in record.images),
                candidates=tuple(_candidate(each, kind, limits, rng) for each in record.candidates),
            )
        else:
            made = replace(
                record,
                audios=tuple(Media(sound(each.read(), rng), None) for each in record.audios),
                candidates=tuple(_candidate(each, kind, limits, rng) for each in record.candidates),
            )
    except (MediaError, OSError, soundfile.SoundFileError):
        return None
    return made if made != record else None


def _candidate(each: Mapping[str, Any], kind: str, limits: Limits, rng: np.random.Generator) -> Mapping[str, Any]:
    if not each.get(kind):
        return each
    data = each[kind]["bytes"]
    return {**each, kind: {"bytes": picture(data, limits, rng) if kind == "image" else sound(data, rng), "path": None}}


def picture(data: bytes, limits: Limits, rng: np.random.Generator) -> bytes:
    """An encoded picture, blurred and noisy, as PNG."""
    image = decode_image(data, limits)
    blurred = image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size)))
    values = np.asarray(blurred, np.float64)
    noisy = np.clip(values + rng.normal(0, 255 * NOISE, values.shape), 0, 255).round().astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noisy, image.mode).save(out, "PNG")
    return out.getvalue()


def sound(data: bytes, rng: np.random.Generator) -> bytes:
    """An encoded sound with white noise of `SNR_DB` below its power, as WAV of its own rate."""
    wave, rate_hz = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)
    power = float((wave**2).mean())
    noise = rng.normal(size=wave.shape) * np.sqrt(power / 10 ** (SNR_DB / 10))
    out = io.BytesIO()
    soundfile.write(out, wave + noise, rate_hz, format="WAV", subtype="FLOAT")
    return out.getvalue()


def _thinned(record: Record, rng: np.random.Generator) -> tuple[Message, ...]:
    """Words lost of what users and contexts say; one stays at least."""
    marked = targets.spanned(record) if record.target.spans else None
    out = []
    for index, message in enumerate(record.messages):
        if message.role not in ("user", "context"):
            out.append(message)
        elif index == marked:
            out.append(replace(message, content=_blanked(message.content, record, rng)))
        else:
            parts = [
                (kind, _lost(words, rng) if kind == "text" else words) for kind, words in segments(message.content)
            ]
            out.append(replace(message, content=compose(parts)))
    return tuple(out)


def _lost(words: str, rng: np.random.Generator) -> str:
    found = list(_WORD.finditer(words))
    if not found:
        return words
    gone = _drawn(len(found), rng)
    return words[: found[0].start()] + "".join(
        words[each.start() : found[place + 1].start() if place + 1 < len(found) else len(words)]
        for place, each in enumerate(found)
        if not gone[place]
    )


def _blanked(content: str, record: Record, rng: np.random.Generator) -> str:
    """As long as before, so that spans stay where they are; words of spans, and placeholders, stay."""
    spans = [(span["start"], span["end"]) for span in record.target.spans or ()]
    found = list(_WORD.finditer(content))
    gone = _drawn(len(found), rng)
    out = content
    for lost, each in zip(gone, found, strict=True):
        free = all(each.end() <= start or each.start() >= end for start, end in spans)
        if lost and free and "<" not in each[0]:
            out = out[: each.start()] + " " * len(each[0]) + out[each.end() :]
    return out


def _drawn(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) bool: what is lost; never all."""
    gone = rng.random(count) < DROPPED
    if count and gone.all():
        gone[int(rng.integers(count))] = False
    return np.asarray(gone)
