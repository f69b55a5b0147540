"""What a sound becomes before a tower hears it: frames of some channels, then a stack with the length of each.

A tower from scratch gets log-mel frames; a pretrained one gets what its own feature extractor makes (mel bins or the
waveform, at its sample rate, padded where it wants one length). Each sound is made alone, so that it does not depend
on the others of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmagent import pretrained
from mmagent.config import AudioTowerConfig
from mmagent.media import Limits, decode_audio
from mmagent.pictures import PROCESSOR_FILES
from mmagent.pretrained import ARGUMENTS, BackboneError

KEY = "model.audio.checkpoint"
HOP_S = 0.010
WINDOW_S = 0.025
SHORTEST_S = 0.1  # what a pretrained tower gets at least: silence behind a shorter sound
_STEP_FRAMES = 16  # sounds are padded to a multiple of this many frames: fewer shapes, fewer slow first passes
_PROBES_S = (0.2, 0.5)


class Sounds:
    """Log-mel frames for a tower from scratch, normalised over the sound to mean 0 and deviation 1."""

    def __init__(self, config: AudioTowerConfig) -> None:
        self.rate_hz, self.channels = config.sample_rate_hz, config.mels
        self._samples = int(config.max_s * self.rate_hz)

    def frames(self, data: bytes, limits: Limits) -> np.ndarray:
        """An encoded sound as (frames, channels).

        Raises:
            MediaTooLarge, MediaError: see `mmagent.media.decode_audio`.
        """
        return self._features(decode_audio(data, self.rate_hz, limits)[: self._samples])

    def stack(self, sounds: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """``audios`` (sounds, frames, channels) and ``audio_frames`` (sounds,), how many of them are real; one silent
        stand-in where there is no sound."""
        sounds = sounds or [np.zeros((1, self.channels), np.float16)]
        longest = max(len(sound) for sound in sounds)
        out = np.zeros((len(sounds), longest + -longest % _STEP_FRAMES, self.channels), np.float32)
        for index, sound in enumerate(sounds):
            out[index, : len(sound)] = sound
        return {"audios": torch.from_numpy(out), "audio_frames": torch.tensor([len(sound) for sound in sounds])}

    def _features(self, wave: np.ndarray) -> np.ndarray:
        """(samples,) -> (frames, mels) float16."""
        samples = torch.from_numpy(wave)
        window, bank = _mel_bank(self.rate_hz, self.channels)
        size = len(window)
        if len(samples) < size:
            samples = torch.nn.functional.pad(samples, (0, size - len(samples)))
        fft, hop = 512 if size <= 512 else size, int(HOP_S * self.rate_hz)
        spectrum = torch.stft(samples, fft, hop, size, window, return_complex=True, pad_mode="constant")
        power = spectrum.real.square() + spectrum.imag.square()  # (frequencies, frames); `abs` takes four times as long
        mel = bank @ power  # (mels, frames)
        log = torch.log(mel + 1e-6)
        log = (log - log.mean()) / (log.std() + 1e-5)
        return log.T.to(torch.float16).numpy()


class ExtractedSounds(Sounds):
    """Sounds as a checkpoint's own feature extractor makes them.

    The last row of a sound's frames is what stands behind it: an extractor's padding is not always zero, and a sound
    of one second is not worth the memory of thirty.

    Attributes:
        argument: what the model's forward calls it.
        raw: whether frames are samples of the waveform.
        time_last: whether the model wants (channels, frames).
        fixed: frames of every sound, where the extractor pads to one length.
        longest: frames of a sound of `max_s`.
        frames_per_s: how many frames a second has.

    Raises:
        BackboneError: no feature extractor, or one whose features are no frames of channels.
    """

    def __init__(self, config: AudioTowerConfig) -> None:
        assert config.checkpoint is not None
        self._name, self._extractor = config.checkpoint, load_extractor(config.checkpoint)
        self.rate_hz = int(self._extractor.sampling_rate)
        self._samples = max(int(config.max_s * self.rate_hz), int(SHORTEST_S * self.rate_hz))
        self.argument = next((a for a in self._extractor.model_input_names if a in ARGUMENTS["audio"]), "")
        noise = np.random.default_rng(0).standard_normal(self.rate_hz).astype(np.float32) * 0.1
        # A caller may build its model on the meta device; the extractor computes here.
        with pretrained.refusing(self._name, pretrained.locate(self._name), KEY), torch.device("cpu"):
            short, long = (self._extract(noise[: int(seconds * self.rate_hz)]) for seconds in _PROBES_S)
            self.raw = short.ndim == 1
            self.fixed = None if short.shape != long.shape else -1
            self.time_last = not self.raw and self._time_axis(short, long) == 1
            self.channels = 1 if self.raw else short.shape[0 if self.time_last else 1]
            if self.fixed is not None:
                self.fixed = short.shape[1 if self.time_last else 0]
            seconds = _PROBES_S[1] - _PROBES_S[0]
            more = np.subtract(long.shape, short.shape)[1 if self.time_last else 0]
            self.frames_per_s = round(int(more) / seconds)
            self._silence = self._features(np.zeros(int(SHORTEST_S * self.rate_hz), np.float32))
            self.longest = self.fixed or len(self._features(np.zeros(self._samples, np.float32))) - 1

    def stack(self, sounds: Sequence[np.ndarray]) -> dict[str, Tensor]:
        sounds = sounds or [self._silence]
        longest = max(len(sound) - 1 for sound in sounds)
        step = int(SHORTEST_S * self.rate_hz) if self.raw else _STEP_FRAMES
        out = np.empty((len(sounds), self.fixed or longest + -longest % step, self.channels), np.float32)
        for index, sound in enumerate(sounds):
            real = sound[: min(len(sound) - 1, out.shape[1])]
            out[index, : len(real)], out[index, len(real) :] = real, sound[-1]
        lengths = [min(len(sound) - 1, out.shape[1]) for sound in sounds]
        return {"audios": torch.from_numpy(out), "audio_frames": torch.tensor(lengths)}

    def _features(self, wave: np.ndarray) -> np.ndarray:
        """(samples,) -> (frames + 1, channels), the last row being the padding behind."""
        wave = np.pad(wave, (0, max(0, int(SHORTEST_S * self.rate_hz) - len(wave))))
        found = self._extract(wave)
        if self.raw:
            return np.append(found, np.float32(0))[:, None]
        frames = (found.T if self.time_last else found).astype(np.float16)
        if self.fixed is None:
            return np.concatenate([frames, np.zeros_like(frames[:1])])
        heard = np.flatnonzero((frames != frames[-1]).any(axis=1))
        return np.ascontiguousarray(frames[: (heard[-1] + 2 if len(heard) else 2)])

    def _extract(self, wave: np.ndarray) -> np.ndarray:
        found = self._extractor(wave, sampling_rate=self.rate_hz, return_tensors="np")
        if self.argument not in found:
            raise ValueError(
                f"its feature extractor makes {', '.join(found)}; {' or '.join(ARGUMENTS['audio'])} wanted"
            )
        features = np.asarray(found[self.argument][0], dtype=np.float32)
        if features.ndim not in (1, 2):
            raise ValueError(
                f"its feature extractor makes features of shape {features.shape}; (frames, channels) wanted"
            )
        return features

    def _time_axis(self, short: np.ndarray, long: np.ndarray) -> int:
        """Along which axis a sound goes on: the one that is longer of a longer sound, or that ends in padding."""
        if short.shape != long.shape:
            return int(np.argmax(np.not_equal(short.shape, long.shape)))
        padded = [_alike(short), _alike(short.T)]
        if padded[0] == padded[1]:
            raise ValueError(f"its feature extractor makes features of shape {short.shape}; none of their axes is time")
        return int(np.argmax(padded))


def load_extractor(name: str) -> Any:
    """A checkpoint's feature extractor.

    Raises:
        BackboneError: there is none.
    """
    from transformers import AutoFeatureExtractor

    place = pretrained.locate(name)
    if Path(place).is_dir() and not any((Path(place) / file).exists() for file in PROCESSOR_FILES):
        raise BackboneError(
            f"the model folder {place} has no feature extractor: {' or '.join(PROCESSOR_FILES)} is wanted; "
            "copy it there from where the model came from (feature_extractor.save_pretrained writes it)"
        )
    with pretrained.refusing(name, place, KEY):
        extractor = AutoFeatureExtractor.from_pretrained(place)
    if not getattr(extractor, "sampling_rate", None):
        raise BackboneError(
            f"the processor of {name!r} ({type(extractor).__name__}) has no sampling_rate: it is none of sound; "
            f"{KEY} wants an audio model"
        )
    return extractor


def of(config: AudioTowerConfig) -> Sounds:
    """
    Raises:
        BackboneError: see `ExtractedSounds`.
    """
    return ExtractedSounds(config) if config.checkpoint else Sounds(config)


def _alike(rows: np.ndarray) -> int:
    """How many rows at the end are the same."""
    differ = np.flatnonzero((rows != rows[-1]).any(axis=1))
    return len(rows) - 1 - int(differ[-1]) if len(differ) else len(rows)


@lru_cache(maxsize=8)
def _mel_bank(rate: int, mels: int) -> tuple[Tensor, Tensor]:
    """A Hann window (samples,) and triangular mel filters (mels, frequencies) on the HTK scale."""
    size = int(WINDOW_S * rate)
    bins = (512 if size <= 512 else size) // 2 + 1
    frequencies = np.linspace(0, rate / 2, bins)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), mels + 2) / 2595) - 1)
    rise = (frequencies[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - frequencies[None]) / (edges[2:] - edges[1:-1])[:, None]
    bank = np.maximum(0, np.minimum(rise, fall))
    return torch.hann_window(size), torch.from_numpy(bank).float()
