"""Text made speech for an answer, by a synthesiser that can be exchanged: espeak-ng, where its extra is installed.

Another one is a function ``(text, voice, speed) -> (samples float32 in [-1, 1], rate in Hz)``, named MODULE:FUNCTION in
the environment variable MMAGENT_SYNTHESISER of the replicas.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile

from mmagent import speech
from serve.errors import ApiError
from serve.keys import Profile

VARIABLE = "MMAGENT_SYNTHESISER"
_OPENAI_VOICES = {
    "alloy": "en-us", "ash": "en-us+m3", "ballad": "en-gb-x-rp+m7", "coral": "en-us+f2", "echo": "en-us+m1",
    "fable": "en-gb-x-rp", "nova": "en-us+f3", "onyx": "en-us+m5", "sage": "en-gb-x-rp+f2", "shimmer": "en-us+f4",
    "verse": "en-us+m7",
}  # fmt: skip
_FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"),
            "opus": ("OGG", "OPUS")}  # fmt: skip
MEDIA_TYPES = {
    "wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg", "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
}  # fmt: skip
_PCM_RATE_HZ = 24_000  # OpenAI's
_WORDS_PER_MINUTE = 175

Synthesiser = Callable[[str, str, float], tuple[np.ndarray, int]]
_thread = ThreadPoolExecutor(1, thread_name_prefix="speech")  # espeak-ng is not thread-safe


def voice_of(wanted: str | None, profile: Profile, default: str) -> str:
    """The voice that a request, its key's profile or the service says, in this order."""
    voice = wanted or profile.voice or profile.language or default
    return _OPENAI_VOICES.get(voice, voice)


async def speak(text: str, *, voice: str, format: str, speed: float = 1.0) -> bytes:
    """Encoded speech.

    Raises:
        ApiError: no synthesiser, or it knows the voice not.
    """
    try:
        return await asyncio.get_running_loop().run_in_executor(_thread, _spoken, text, voice, format, speed)
    except speech.SpeechError as error:
        missing = "needs the synthesiser" in str(error)
        status, code = (501, "no_synthesiser") if missing else (422, "invalid_voice")
        raise ApiError(status, str(error), code=code, param=None if missing else "voice") from error


def _spoken(text: str, voice: str, format: str, speed: float) -> bytes:
    sound, rate_hz = _synthesiser()(text, voice, speed)
    return encoded(sound, rate_hz, format)


def encoded(sound: np.ndarray, rate_hz: int, format: str) -> bytes:
    """Samples (n,) float32 in a format of OpenAI's."""
    if format in ("pcm", "pcm16", "opus"):
        import soxr

        sound, rate_hz = np.asarray(soxr.resample(sound, rate_hz, _PCM_RATE_HZ), np.float32), _PCM_RATE_HZ
    if format in ("pcm", "pcm16"):
        return (np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes()
    container, subtype = _FORMATS[format]
    out = io.BytesIO()
    soundfile.write(out, sound, rate_hz, format=container, subtype=subtype)
    return out.getvalue()


@functools.cache
def _synthesiser() -> Synthesiser:
    if path := os.environ.get(VARIABLE):
        module, _, name = path.partition(":")
        found: Synthesiser = getattr(importlib.import_module(module), name)
        return found
    made = speech.Synthesizer()

    def say(text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        rate = int(np.clip(_WORDS_PER_MINUTE * speed, 80, 450))
        return made.say(speech.Clip(text, voice, rate_wpm=rate)), speech.SAMPLE_RATE_HZ

    return say
