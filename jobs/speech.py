"""The speech of a data set: each distinct clip made once, as FLAC, on all cores (see `mmagent.speech`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from jobs import pool
from mmagent.speech import Clip, Synthesizer, encode

_CHUNK = 32  # clips that a worker makes at a time


def render(clips: Iterable[Clip], workers: int) -> Iterator[tuple[Clip, bytes]]:
    """Each clip with its FLAC file, in order, made by `workers` processes.

    Raises:
        SpeechError: see `Synthesizer`; voices are checked before work begins.
    """
    wanted = list(clips)
    synthesizer = _synthesizer()
    for voice in sorted({clip.voice for clip in wanted}):
        synthesizer.check_voice(voice)
    chunks = [wanted[start : start + _CHUNK] for start in range(0, len(wanted), _CHUNK)]
    sounds = pool.ordered(_render, chunks, workers if len(chunks) > workers else 1)
    for chunk, files in zip(chunks, sounds, strict=True):
        yield from zip(chunk, files, strict=True)


def _render(clips: list[Clip]) -> list[bytes]:
    return [encode(_synthesizer().say(clip)) for clip in clips]


@functools.cache
def _synthesizer() -> Synthesizer:
    """One for each process: the library keeps its state in globals."""
    return Synthesizer()
