"""Media: judged by header, refused when cut off or too large, decoded to what a model wants."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmagent.media import (
    Limits,
    MediaError,
    MediaTooLarge,
    check_audio,
    check_image,
    decode_audio,
    decode_image,
)

LIMITS = Limits()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def _png_header(width: int, height: int) -> bytes:
    """A PNG that promises any size and holds nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _noise_picture(format: str) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def _sound(samples: np.ndarray, rate_hz: int, format: str, subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate_hz, format=format, subtype=subtype)
    return out.getvalue()


def _noise(seconds: float, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (int(seconds * 16_000), channels))


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (4097, 4097)])
def test_a_huge_picture_is_refused_from_its_header(size: tuple[int, int]) -> None:
    start_s = time.monotonic()
    with pytest.raises(MediaTooLarge, match="max_image_pixels is 16777216"):
        check_image(_png_header(*size), LIMITS)
    with pytest.raises(MediaTooLarge, match="max_image_pixels"):
        decode_image(_png_header(*size), LIMITS)
    assert time.monotonic() - start_s < 1


def test_a_picture_at_the_limit_passes() -> None:
    assert check_image(_png_header(4096, 4096), LIMITS).width == 4096


def test_a_header_says_how_a_picture_is_shown() -> None:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera stood on its side
    Image.new("RGB", (48, 32)).save(out, "JPEG", exif=exif)
    header = check_image(out.getvalue(), LIMITS)
    assert (header.width, header.height) == decode_image(out.getvalue(), LIMITS).size == (32, 48)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_decode_and_cut_ones_do_not(format: str) -> None:
    data = _noise_picture(format)
    assert check_image(data, LIMITS).format == format
    assert decode_image(data, LIMITS).size == (48, 48)
    for end in (0, 3, 20, len(data) // 2):
        with pytest.raises(MediaError):
            decode_image(data[:end], LIMITS)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_pictures_raise_nothing_else(format: str) -> None:
    dice = np.random.default_rng(0)
    whole = _noise_picture(format)
    for _ in range(150):
        data = bytearray(whole)
        for place in dice.integers(0, min(200, len(data)), 4):
            data[place] = dice.integers(0, 256)
        try:
            decode_image(bytes(data), LIMITS)
        except MediaError:
            pass


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"])
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(MediaError, match="not a picture"):
        check_image(data, LIMITS)


@pytest.mark.parametrize(("kind", "top"), [("uint16", 65535), ("int32", 65535), ("float32", 1)])
def test_grey_of_many_bits_keeps_its_shades(kind: str, top: float) -> None:
    grey = np.linspace(0, top, 64 * 64).reshape(64, 64).astype(kind)
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "TIFF")
    assert 126 < np.asarray(decode_image(out.getvalue(), LIMITS)).mean() < 129


def test_transparency_lies_on_white_and_exif_turns() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(out, "PNG")
    assert decode_image(out.getvalue(), LIMITS).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    out = io.BytesIO()
    Image.new("RGB", (8, 4)).save(out, "JPEG", exif=exif)
    assert decode_image(out.getvalue(), LIMITS).size == (4, 8)


def test_ten_minutes_of_sound_are_refused_from_the_header() -> None:
    for format in ("WAV", "FLAC"):
        data = _sound(np.zeros(600 * 8000), 8000, format)
        with pytest.raises(MediaTooLarge, match=r"lasts 600.0 s; the limit max_audio_s is 60 s"):
            check_audio(data, LIMITS)
        with pytest.raises(MediaTooLarge):
            decode_audio(data, 16_000, LIMITS)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_sounds_decode_and_cut_ones_do_not(format: str) -> None:
    data = _sound(_noise(3), 16_000, format)
    assert decode_audio(data, 16_000, LIMITS).shape == (48_000,)
    for end in (0, 30, 100, len(data) // 2, len(data) - 10):
        with pytest.raises(MediaError):
            decode_audio(data[:end], 16_000, LIMITS)


def test_stereo_becomes_mono_and_the_rate_changes() -> None:
    sound = np.stack([np.full(8000, 0.5), np.full(8000, -0.1)], axis=1)
    mono = decode_audio(_sound(sound, 8000, "WAV", "FLOAT"), 16_000, LIMITS)
    assert mono.dtype == np.float32
    assert mono.shape == (16_000,)
    assert abs(float(mono[4000:12_000].mean()) - 0.2) < 0.01


def test_strange_sounds(make_wav: Callable[..., bytes]) -> None:
    with pytest.raises(MediaError, match="not a sound"):
        check_audio(b"RIFFxxxxWAVE", LIMITS)
    with pytest.raises(MediaError, match="0 samples"):
        check_audio(_sound(np.zeros(0), 16_000, "WAV"), LIMITS)
    with pytest.raises(MediaError, match="not finite"):
        decode_audio(_sound(np.full(100, np.nan), 16_000, "WAV", "FLOAT"), 16_000, LIMITS)
    with pytest.raises(MediaError, match="can be read"):
        check_audio(_sound(_noise(1), 655_350, "FLAC"), LIMITS)
    with pytest.raises(MediaError, match="AIFF"):
        check_audio(_sound(_noise(1), 16_000, "AIFF"), LIMITS)
    assert decode_audio(_sound(np.full(100, 1e30), 16_000, "WAV", "FLOAT"), 16_000, LIMITS).max() == 1
    streamed = bytearray(_sound(_noise(1), 16_000, "FLAC"))
    streamed[21] &= 0xF0  # the 36 bits that hold the number of samples, none given
    streamed[22:26] = bytes(4)
    with pytest.raises(MediaError, match="does not say how long"):
        check_audio(bytes(streamed), LIMITS)
    streamed_wav = bytearray(make_wav())
    streamed_wav[40:44] = b"\xff\xff\xff\xff"  # as ffmpeg writes to a pipe
    assert len(decode_audio(bytes(streamed_wav), 16_000, LIMITS)) == 4000


def test_too_many_bytes() -> None:
    small = Limits(max_media_bytes=10)
    for check in (check_image, check_audio):
        with pytest.raises(MediaTooLarge, match="max_media_bytes is 10"):
            check(b"x" * 11, small)
