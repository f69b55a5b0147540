"""From records to tensors: the one path that training, evaluation and serving share, so that they cannot differ.

`Inputs.sample` decodes and tokenises one record (pure, thread-safe, on the CPU); `Inputs.batch` stacks samples.
Augmentation happens between the two and is a function of (seed, epoch, sample), never of timing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmagent import pictures, sounds, text
from mmagent.config import AugmentConfig, DataConfig, ModelConfig
from mmagent.media import MediaError, MediaTooLarge, check_audio, check_image
from mmagent.record import Media, Record, RecordError


class PartError(ValueError):
    """A part of a record that cannot be used. `field` is its place, e.g. ``images[0]``; `too_large`: over a limit."""

    def __init__(self, message: str, field: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.too_large = too_large


@dataclass(frozen=True, slots=True)
class Sample:
    """One record, decoded."""

    id: str
    ids: np.ndarray  # (tokens,) int64
    has_words: bool
    images: tuple[np.ndarray, ...]  # (height, width, 3) uint8 each
    audios: tuple[np.ndarray, ...]  # (frames, channels) each, see `mmagent.sounds`
    label: int = -100
    weight: float = 1.0
    transcript: np.ndarray | None = None  # (tokens,) int64: the words spoken, where known


class Inputs:
    """Makes samples and batches for one model.

    Args:
        model: its section of the config.
        data: limits, text length, size of the cache of decoded media.
        tokenizer: of the model's backbone.
        labels: the classes, in the order of the head.

    Raises:
        BackboneError: a pretrained tower's processor that is missing or cannot be used.
    """

    def __init__(self, model: ModelConfig, data: DataConfig, tokenizer: Any, labels: Sequence[str]) -> None:
        self.model = model
        self.data = data
        self.tokenizer = tokenizer
        self.classes = {label: index for index, label in enumerate(labels)}
        self.pictures = pictures.of(model.image) if model.image else None
        self.sounds = sounds.of(model.audio) if model.audio else None
        self._cache = _Cache(data.cache_mb << 20)

    def check(self, record: Record) -> None:
        """Reads headers only.

        Raises:
            PartError: media that is none or over a limit, or that the model cannot take.
        """
        for kind, medias, tower, look in (
            ("images", record.images, self.model.image, check_image),
            ("audios", record.audios, self.model.audio, check_audio),
        ):
            for index, media in enumerate(medias):
                if tower is None:
                    raise PartError(f"this model takes no {kind}", f"{kind}[{index}]")
                with _named(f"{kind}[{index}]"):
                    look(media.read(), self.data.media)

    def sample(self, record: Record, ids: np.ndarray | None = None) -> Sample:
        """Decodes a record; `ids` saves tokenising where a stream did it before.

        Raises:
            PartError: media that cannot be decoded or is over a limit.
        """
        words = text.words(record)
        transcript = record.meta.get("transcript") if record.audios and self._aligns else None
        if ids is None:
            ids = self.tokenize([words])[0]
        return Sample(
            id=record.id,
            ids=ids,
            has_words=bool(words),
            images=tuple(self._image(media, f"images[{i}]") for i, media in enumerate(record.images)),
            audios=tuple(self._audio(media, f"audios[{i}]") for i, media in enumerate(record.audios)),
            label=self.classes.get(record.target.label, -100) if record.target.label is not None else -100,
            weight=record.weight,
            transcript=self.tokenize([transcript])[0] if transcript else None,
        )

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        return text.tokenize(self.tokenizer, texts, self.data.max_text_tokens)

    def batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Stacks samples. Keys and shapes (b samples, t tokens, n pictures and m sounds of all samples together):

        ids, mask, keep (b, t) · has_words, label, weight (b,) · images (n, 3, height, width), image_row, image_slot,
        image_real (n,), image_slots () · audios (m, frames, channels), audio_frames, audio_row, audio_slot,
        audio_real (m,), audio_slots () · transcript_ids, transcript_mask (m, t) where the model is taught by words
        spoken.
        Where a batch has no picture (or sound), one stand-in of zeros is there with ``real`` false.
        """
        ids, mask = self._pad([sample.ids for sample in samples])
        out = {
            "ids": ids,
            "mask": mask,
            "keep": mask.bool(),
            "has_words": torch.tensor([sample.has_words for sample in samples]),
            "label": torch.tensor([sample.label for sample in samples]),
            "weight": torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        }
        if self.pictures is not None:
            out |= _places("image", [len(sample.images) for sample in samples])
            out["images"] = self.pictures.stack([image for sample in samples for image in sample.images])
        if self.sounds is not None:
            out |= _places("audio", [len(sample.audios) for sample in samples])
            out |= self.sounds.stack([audio for sample in samples for audio in sample.audios])
            if self._aligns:
                spoken = [s.transcript if s.transcript is not None else None for s in samples for _ in s.audios]
                out["transcript_ids"], out["transcript_mask"] = self._pad(spoken or [None])
        return out

    @property
    def _aligns(self) -> bool:
        return self.model.audio is not None and self.model.audio.align > 0

    def _pad(self, rows: Sequence[np.ndarray | None]) -> tuple[Tensor, Tensor]:
        longest = max((len(row) for row in rows if row is not None), default=1)
        ids = np.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for index, row in enumerate(rows):
            if row is not None:
                ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def _image(self, media: Media, place: str) -> np.ndarray:
        made = self.pictures
        if made is None:
            raise PartError("this model takes no pictures", place)
        with _named(place):
            data = media.read()
            return self._cache.get(data, lambda: made.pixels(data, self.data.media))

    def _audio(self, media: Media, place: str) -> np.ndarray:
        made = self.sounds
        if made is None:
            raise PartError("this model takes no sound", place)
        with _named(place):
            data = media.read()
            return self._cache.get(data, lambda: made.frames(data, self.data.media))


def augment(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """What training hears and sees instead of the sample itself (see `AugmentConfig`)."""
    audios = tuple(_augment_sound(audio, config, rng) for audio in sample.audios)
    images = () if sample.images and rng.random() < config.image_drop else sample.images
    return Sample(
        sample.id, sample.ids, sample.has_words, images, audios, sample.label, sample.weight, sample.transcript
    )


def drop_tokens(keep: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """Hides a share of the tokens from the join: keep (batch, tokens) -> the same, with fewer True."""
    if share == 0:
        return keep
    return keep & torch.from_numpy(rng.random(tuple(keep.shape)) >= share)


def _augment_sound(frames: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """frames: (frames, channels). Changes speed by resampling the frames, the speaker's pitch and tract by shifting and
    stretching the mel axis (vocal tract length perturbation, Jaitly & Hinton 2013), adds noise, masks stripes."""
    x = frames.astype(np.float32)
    if config.audio_tempo:
        length = max(2, round(len(x) * (1 + rng.uniform(-config.audio_tempo, config.audio_tempo))))
        x = _resample(x, np.linspace(0, len(x) - 1, length))
    if config.audio_pitch:
        bins = x.shape[1]
        shift = rng.uniform(-config.audio_pitch, config.audio_pitch) * bins
        stretch = 1 + rng.uniform(-config.audio_pitch, config.audio_pitch)
        x = _resample(x.T, np.clip(np.arange(bins) * stretch + shift, 0, bins - 1)).T
    if config.audio_noise:
        x = x + rng.standard_normal(x.shape, dtype=np.float32) * rng.uniform(0, config.audio_noise)
    for axis in (0, 1) * config.audio_masks:
        width = int(rng.uniform(0, config.audio_mask_share) * x.shape[axis])
        start = rng.integers(0, x.shape[axis] - width + 1)
        x[(slice(start, start + width), slice(None)) if axis == 0 else (slice(None), slice(start, start + width))] = 0
    return x.astype(frames.dtype)


def _resample(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of x (rows, columns) at fractional places, linearly between neighbours."""
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, len(x) - 1)
    part = (at - low)[:, None].astype(np.float32)
    return x[low] * (1 - part) + x[high] * part


def _places(kind: str, counts: Sequence[int]) -> dict[str, Tensor]:
    row = [index for index, count in enumerate(counts) for _ in range(count)]
    slot = [place for count in counts for place in range(count)]
    return {
        f"{kind}_row": torch.tensor(row or [0]),
        f"{kind}_slot": torch.tensor(slot or [0]),
        f"{kind}_real": torch.tensor([True] * len(row) or [False]),
        f"{kind}_slots": torch.tensor(max(1, max(counts, default=1))),
    }


class _named:
    """Turns errors of a medium into a `PartError` that names its place."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (MediaError, RecordError)):
            too_large = isinstance(error, MediaTooLarge)
            raise PartError(f"{self.place}: {error}", self.place, too_large=too_large) from error


class _Cache:
    """Decoded media by the hash of their bytes, least recently used out first; safe among threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, data: bytes, decode: Any) -> np.ndarray:
        if not self._max_bytes:
            return decode()
        key = hashlib.blake2b(data, digest_size=16).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        value = decode()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = value
                self._bytes += value.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return value
