"""Speech from text by espeak-ng: mono, 16 kHz.

espeak-ng is GPL-3, so it is an optional extra, loaded where speech is asked for: ``pip install 'mmagent[speech]'``.
A voice is an accent and a variant, ``en-us+f3``. espeak falls back to another voice in silence where it knows either
of them not; here that is an error.
"""

from __future__ import annotations

import ctypes
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

SAMPLE_RATE_HZ = 16_000
INSTALL = "pip install espeakng-loader   (or: pip install 'mmagent[speech]'; espeak-ng is GPL-3, so it is optional)"

# The constants of espeak-ng's speak_lib.h (version 1.52).
_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_CHARS_UTF8, _END_PAUSE, _POSITION_CHARACTER = 1, 0x1000, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_SILENCE = 1e-3  # of full scale: what is below it at the end of a clip is cut off
_TAIL_S = 0.05
_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class SpeechError(RuntimeError):
    """The synthesiser is not there, or knows a voice not; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Clip:
    """What is to be said, by whom and how: the same clip is the same sound."""

    text: str
    voice: str
    rate_wpm: int = 175
    pitch: int = 50
    pitch_range: int = 50


class Synthesizer:
    """The shared library, loaded once in a process; it is not thread-safe.

    Raises:
        SpeechError: the library is not installed, or does not start.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise SpeechError(f"speech needs the synthesiser espeak-ng: {INSTALL}") from error
        self._data = Path(espeakng_loader.get_data_path())
        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise SpeechError(f"espeak-ng cannot be loaded: {error}; try: {INSTALL}") from error
        self._rate_hz = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(self._data), _DONT_EXIT))
        if self._rate_hz <= 0:
            raise SpeechError(f"espeak-ng does not start with its data in {self._data}; try: {INSTALL}")
        self._parts: list[np.ndarray] = []
        self._callback = _SynthCallback(self._take)  # kept: the library holds only a bare pointer to it

    def check_voice(self, voice: str) -> None:
        """Raises SpeechError where espeak does not know the accent or the variant of a voice."""
        accent, _, variant = voice.partition("+")
        variants = self.variants()
        if "+" in voice and variant not in variants:
            raise SpeechError(
                f"espeak-ng has no variant {variant!r} (voice {voice!r}); it has {', '.join(sorted(variants))}"
            )
        if not accent or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SpeechError(
                f"espeak-ng has no voice {accent!r} (voice {voice!r}); its English ones are {', '.join(self.accents())}"
            )

    def variants(self) -> set[str]:
        return {file.name for file in (self._data / "voices" / "!v").iterdir()}

    def accents(self) -> list[str]:
        return sorted(file.name.lower() for file in (self._data / "lang").rglob("en*"))

    def say(self, clip: Clip) -> np.ndarray:
        """The sound of a clip: float32 in [-1, 1] at `SAMPLE_RATE_HZ`, (samples,).

        Raises:
            SpeechError: an unknown voice, or nothing was said.
        """
        self.check_voice(clip.voice)
        for parameter, value in ((_RATE, clip.rate_wpm), (_PITCH, clip.pitch), (_RANGE, clip.pitch_range)):
            if self._library.espeak_SetParameter(parameter, value, 0) != 0:
                raise SpeechError(f"espeak-ng refuses the value {value} of parameter {parameter} for {clip}")
        self._parts.clear()
        # At each clip: the library has one callback in a process, and another synthesizer may have come and gone.
        self._library.espeak_SetSynthCallback(self._callback)
        text = clip.text.encode()
        # Without the pause the last sound is cut off in its middle.
        flags = _CHARS_UTF8 | _END_PAUSE
        code = self._library.espeak_Synth(text, len(text) + 1, 0, _POSITION_CHARACTER, 0, flags, None, None)
        if code != 0 or not self._parts:
            raise SpeechError(f"espeak-ng said nothing for {clip} (code {code})")
        sound = np.concatenate(self._parts).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(sound) > _SILENCE)
        if not len(loud):
            raise SpeechError(f"espeak-ng gave only silence for {clip}")
        sound = sound[: loud[-1] + int(_TAIL_S * self._rate_hz)]
        return np.asarray(soxr.resample(sound, self._rate_hz, SAMPLE_RATE_HZ), dtype=np.float32)

    def _take(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on


def encode(sound: np.ndarray) -> bytes:
    """Sound as FLAC of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, sound, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()
