"""Pictures and sound: what a header says before anything is decoded, and the decoding itself.

A file is judged by its header first (`check_image`, `check_audio`): a picture of 50,000 x 50,000 pixels or ten minutes
of sound costs its sender an error and this process nothing. Decoding (`decode_image`, `decode_audio`) checks again.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from mmagent import mp3

# The limit is `Limits.max_image_pixels`, checked from the header; Pillow's own would only warn, in its own words.
Image.MAX_IMAGE_PIXELS = None
# Damaged EXIF of a readable picture is no reason to speak. (Once for all: catch_warnings is not for threads.)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
AUDIO_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")  # in libsndfile's words
SAMPLE_RATES_HZ = (1_000, 384_000)
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF: how a camera was held
_UNKNOWN_FRAMES = 2**62  # libsndfile gives about 2^63 where a stream's header does not say its length
_BLOCK_FRAMES = 1 << 18


class Limits(BaseModel):
    """What one picture or sound may cost; the same for a source's rows and for a request's parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_image_pixels: int = Field(16_777_216, gt=0, description="width x height of one picture, from its header")
    max_audio_s: float = Field(60.0, gt=0, description="length of one sound in seconds, from its header")
    max_media_bytes: int = Field(20_000_000, gt=0, description="encoded size of one picture or sound")


class MediaError(ValueError):
    """A picture or sound that cannot be read."""


class MediaTooLarge(MediaError):
    """A picture or sound over a limit; the message names the limit."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    format: str
    width: int  # as it is shown
    height: int


@dataclass(frozen=True, slots=True)
class AudioHeader:
    format: str
    frames: int
    sample_rate_hz: int
    channels: int

    @property
    def duration_s(self) -> float:
        return self.frames / self.sample_rate_hz


def check_image(data: bytes, limits: Limits) -> ImageHeader:
    """Reads a picture's header only.

    Raises:
        MediaTooLarge: over a limit.
        MediaError: not a picture, or of a format not in `IMAGE_FORMATS`.
    """
    _check_size(data, limits)
    with _open_image(data) as image:
        return _image_header(image, limits)


def decode_image(data: bytes, limits: Limits) -> Image.Image:
    """The picture as RGB, turned as its EXIF says, transparency on white; of an animation the first frame.

    Raises:
        MediaTooLarge, MediaError: see `check_image`; also where the pixels are cut off or damaged.
    """
    _check_size(data, limits)
    try:
        with _open_image(data) as image:
            _image_header(image, limits)
            image.load()
            turned = _eight_bits(ImageOps.exif_transpose(image))
            if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
                rgba = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return turned.convert("RGB")
    except MediaError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError ...
        raise MediaError(f"the image is damaged or cut off: {error}") from error


def check_audio(data: bytes, limits: Limits) -> AudioHeader:
    """Reads a sound's header only (wav, flac, ogg, mp3).

    Raises:
        MediaTooLarge: over a limit.
        MediaError: not a sound, or empty.
    """
    with _open_sound(data, limits) as file:
        return _audio_header(file, data, limits)


def decode_audio(data: bytes, sample_rate_hz: int, limits: Limits) -> np.ndarray:
    """The sound as mono float32 in [-1, 1], resampled to `sample_rate_hz`: (samples,).

    Raises:
        MediaTooLarge, MediaError: see `check_audio`; also where samples that the header promises are missing.
    """
    try:
        with _open_sound(data, limits) as file:
            header = _audio_header(file, data, limits)
            # Read in blocks, (samples, channels): all channels at full rate would be many times what is kept.
            parts = [np.zeros(0, np.float32)]
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                parts.append(block.mean(axis=1) if header.channels > 1 else block[:, 0])
            mono = np.concatenate(parts)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise MediaError(f"the sound is damaged or cut off: {error}") from error
    if len(mono) < header.frames:
        raise MediaError(f"the sound is cut off: {len(mono)} of {header.frames} samples are there")
    if not np.isfinite(mono).all():
        raise MediaError("the sound holds values that are not finite numbers")
    if header.sample_rate_hz != sample_rate_hz:
        mono = soxr.resample(mono, header.sample_rate_hz, sample_rate_hz)
    return np.ascontiguousarray(mono.clip(-1, 1), dtype=np.float32)


def _open_image(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise MediaError(
            f"not a picture that can be read ({', '.join(IMAGE_FORMATS).lower()}): {_first_words(data)}"
        ) from error


def _image_header(image: Image.Image, limits: Limits) -> ImageHeader:
    width, height = image.size
    if image.format == "JPEG" and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE:
        width, height = height, width
    header = ImageHeader(image.format or "?", width, height)
    if header.width * header.height > limits.max_image_pixels:
        raise MediaTooLarge(
            f"the image has {header.width} x {header.height} = {header.width * header.height} pixels; "
            f"the limit max_image_pixels is {limits.max_image_pixels}"
        )
    return header


def _open_sound(data: bytes, limits: Limits) -> soundfile.SoundFile:
    _check_size(data, limits)
    try:
        return soundfile.SoundFile(io.BytesIO(mp3.counted(data)))
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise MediaError(f"not a sound that can be read (wav, flac, ogg, mp3): {_first_words(data)}") from error


def _audio_header(file: soundfile.SoundFile, data: bytes, limits: Limits) -> AudioHeader:
    header = AudioHeader(file.format, int(file.frames), int(file.samplerate), int(file.channels))
    if header.format not in AUDIO_FORMATS:
        raise MediaError(f"the sound is of the format {header.format}; wav, flac, ogg or mp3 is wanted")
    if header.frames <= 0:
        raise MediaError("the sound is empty: its header says 0 samples")
    if header.frames >= _UNKNOWN_FRAMES:
        raise MediaError("the sound's header does not say how long it is: write it to a file, not to a stream")
    if not SAMPLE_RATES_HZ[0] <= header.sample_rate_hz <= SAMPLE_RATES_HZ[1]:
        raise MediaError(
            f"the sound has {header.sample_rate_hz} samples a second; "
            f"{SAMPLE_RATES_HZ[0]} to {SAMPLE_RATES_HZ[1]} can be read"
        )
    if header.duration_s > limits.max_audio_s:
        raise MediaTooLarge(
            f"the sound lasts {header.duration_s:.1f} s; the limit max_audio_s is {limits.max_audio_s:g} s"
        )
    # libsndfile corrects the length of a cut file in silence.
    if _cut_wav(data) or _cut_ogg(data):
        raise MediaError("the sound is cut off: its header promises more bytes than there are")
    return header


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, and of 32 bits stretched: Pillow's own conversion only clips, to a white picture."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = grey.min(), grey.max()
        return Image.fromarray(((grey - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8))
    return image


def _check_size(data: bytes, limits: Limits) -> None:
    if len(data) > limits.max_media_bytes:
        raise MediaTooLarge(f"{len(data)} bytes; the limit max_media_bytes is {limits.max_media_bytes}")


def _first_words(data: bytes) -> str:
    return f"{len(data)} bytes that begin with {data[:8]!r}" if data else "0 bytes"


def _cut_wav(data: bytes) -> bool:
    """Whether a RIFF wav promises more bytes than there are; streamed files write 0 or 0xFFFFFFFF and are whole."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return False
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name == b"data":
            return size not in (0, 0xFFFFFFFF, 0x7FFFF000) and place + 8 + size > len(data)
        place += 8 + size + size % 2
    return False


def _cut_ogg(data: bytes) -> bool:
    """Whether the last page of an Ogg file promises more bytes than there are."""
    if data[:4] != b"OggS":
        return False
    page = data.rfind(b"OggS")
    lacing = data[page + 27 : page + 27 + data[page + 26]] if page + 27 <= len(data) else b""
    return not lacing or page + 27 + len(lacing) + sum(lacing) > len(data) or len(lacing) < data[page + 26]
