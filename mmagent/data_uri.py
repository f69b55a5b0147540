"""Pictures and sounds small enough to stand inside a page, as data URIs."""

from __future__ import annotations

import base64
import io

import soundfile

from mmagent.media import Limits, check_image, decode_audio, decode_image

_IMAGE_BYTES = 60_000  # encoded media up to this size are shown as they are, larger ones anew and smaller
_IMAGE_SIDE = 320
_AUDIO_BYTES = 90_000
_AUDIO_S = 10.0
_AUDIO_RATE_HZ = 16_000
_BROWSER_IMAGES = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}
_LOUD = {b"RIFF": "audio/wav", b"fLaC": "audio/flac", b"OggS": "audio/ogg"}


def image_uri(data: bytes, limits: Limits) -> str:
    """The picture as a data URI; a large one, or of a format that browsers do not know, as a smaller WebP.

    Raises:
        MediaError: it cannot be read.
    """
    kind = _BROWSER_IMAGES.get(check_image(data, limits).format)
    if kind and len(data) <= _IMAGE_BYTES:
        return _uri(kind, data)
    picture = decode_image(data, limits)
    picture.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80)
    return _uri("image/webp", out.getvalue())


def audio_uri(data: bytes, limits: Limits) -> str:
    """The sound as a data URI; a large one as its first ten seconds in Ogg Vorbis.

    Raises:
        MediaError: it cannot be read.
    """
    kind = _LOUD.get(data[:4])
    if kind and len(data) <= _AUDIO_BYTES:
        return _uri(kind, data)
    samples = decode_audio(data, _AUDIO_RATE_HZ, limits)[: int(_AUDIO_S * _AUDIO_RATE_HZ)]
    out = io.BytesIO()
    soundfile.write(out, samples, _AUDIO_RATE_HZ, format="OGG", subtype="VORBIS")
    return _uri("audio/ogg", out.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
