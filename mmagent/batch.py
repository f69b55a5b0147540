"""From records to tensors: the one path that training, evaluation and serving share, so that they cannot differ.

`Inputs.sample` decodes and tokenises one record (pure, thread-safe, on the CPU); `Inputs.batch` stacks samples.
Augmentation (`mmagent.augment`) happens between the two.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmagent import text
from mmagent.config import AudioTowerConfig, DataConfig, ImageTowerConfig, ModelConfig
from mmagent.media import Limits, MediaError, MediaTooLarge, check_audio, check_image, decode_audio, decode_image
from mmagent.reading import Reader, View
from mmagent.record import Media, Record, RecordError
from mmagent.targets import TargetError
from mmagent.tasks import Task

HOP_S = 0.010
WINDOW_S = 0.025
_FRAME_STEP = 16  # sounds are padded to a multiple of this many frames: fewer shapes, fewer slow first passes


class PartError(ValueError):
    """A part of a record that cannot be used. `field` is its place, e.g. ``images[0]``; `too_large`: over a limit."""

    def __init__(self, message: str, field: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.too_large = too_large


@dataclass(frozen=True, slots=True)
class Sample:
    """One record, decoded: what its task reads of it, in one view or several."""

    record: Record
    views: tuple[View, ...]
    has_words: bool
    images: tuple[np.ndarray, ...]  # (size, size, 3) uint8 each
    audios: tuple[np.ndarray, ...]  # (frames, mels) float16 each
    weight: float = 1.0
    transcript: np.ndarray | None = None  # (tokens,) int64: the words spoken, where known
    more: tuple[tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]], ...] = ()  # a view's own pictures and sounds

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def task(self) -> str:
        return self.record.task

    def media(self, view: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Pictures and sounds of one view: the record's, then its own."""
        images, audios = self.more[view] if self.more else ((), ())
        return (*self.images, *images), (*self.audios, *audios)


class Inputs:
    """Makes samples and batches for one model.

    Args:
        model: its section of the config.
        data: limits, text length, size of the cache of decoded media.
        tokenizer: of the model's backbone.
        tasks: what the model answers, by name.
    """

    def __init__(self, model: ModelConfig, data: DataConfig, tokenizer: Any, tasks: Mapping[str, Task]) -> None:
        self.model = model
        self.data = data
        self.tokenizer = tokenizer
        self.tasks = tasks
        self.reader = Reader(tokenizer, data.max_text_tokens)
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
            PartError: media that cannot be decoded or is over a limit, a task that the model has not, or a record that
                lacks what its task reads.
        """
        words = text.words(record)
        transcript = record.meta.get("transcript") if record.audios and self._aligns else None
        return Sample(
            record=record,
            views=self._views(record, ids),
            has_words=bool(words) or bool(record.candidates),
            images=tuple(self._image(media, f"images[{i}]") for i, media in enumerate(record.images)),
            audios=tuple(self._audio(media, f"audios[{i}]") for i, media in enumerate(record.audios)),
            weight=record.weight,
            transcript=self.tokenize([transcript])[0] if transcript else None,
            more=tuple(self._of_candidate(item, i) for i, item in enumerate(record.candidates)),
        )

    def _views(self, record: Record, ids: np.ndarray | None) -> tuple[View, ...]:
        task = self.tasks.get(record.task)
        if task is None:
            known = ", ".join(self.tasks)
            raise PartError(f"this model has no task {record.task!r}; it has {known}", "task")
        if task.reads_whole and ids is not None:
            return (View(ids),)
        try:
            return task.views(record, self.reader)
        except TargetError as error:
            raise PartError(str(error), "target") from error

    def _of_candidate(
        self, candidate: Mapping[str, Any], index: int
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        place, image, audio = f"candidates[{index}]", candidate.get("image"), candidate.get("audio")
        return (
            (self._image(Media(image["bytes"], image["path"]), f"{place}.image"),) if image else (),
            (self._audio(Media(audio["bytes"], audio["path"]), f"{place}.audio"),) if audio else (),
        )

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        return text.tokenize(self.tokenizer, texts, self.data.max_text_tokens)

    def batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Stacks the views of samples. Keys and shapes (r rows, a row for each view; t tokens, n pictures and m sounds
        of all rows together):

        ids, mask, keep (r, t) · has_words, weight (a sample's, shared out over its views), sample_row (r,) ·
        TASK/... what each task's loss and head need, by row · images (n, 3, size, size), image_row, image_slot,
        image_real (n,), image_slots () · audios (m, frames, mels), audio_frames, audio_row, audio_slot, audio_real
        (m,), audio_slots () · transcript_ids, transcript_mask (m, t) where the model is taught by words spoken.
        Where a batch has no picture (or sound), one stand-in of zeros is there with ``real`` false.
        """
        rows = [(index, sample, view) for index, sample in enumerate(samples) for view in range(len(sample.views))]
        ids, mask = self._pad([sample.views[view].ids for _, sample, view in rows])
        out = {
            "ids": ids,
            "mask": mask,
            "keep": mask.bool(),
            "has_words": torch.tensor([sample.has_words for _, sample, _ in rows]),
            "weight": torch.tensor([sample.weight / len(sample.views) for _, sample, _ in rows], dtype=torch.float32),
            "sample_row": torch.tensor([index for index, _, _ in rows]),
        }
        for name, task in self.tasks.items():
            targets = [task.target(s.record, s.views[view]) if s.task == name else None for _, s, view in rows]
            out |= task.collate(targets, ids.shape[1])
        media = [sample.media(view) for _, sample, view in rows]
        if self.model.image is not None:
            out |= _places("image", [len(images) for images, _ in media])
            blank = np.zeros((self.model.image.size, self.model.image.size, 3), np.uint8)
            stack = np.stack([image for images, _ in media for image in images] or [blank])
            out["images"] = torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        if self.model.audio is not None:
            out |= _places("audio", [len(audios) for _, audios in media])
            sounds = [audio for _, audios in media for audio in audios]
            out |= _stack_sounds(sounds or [np.zeros((1, self.model.audio.mels), np.float16)])
            if self._aligns:
                spoken = [s.transcript for (_, s, _), (_, audios) in zip(rows, media, strict=True) for _ in audios]
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
        config = self.model.image
        if config is None:
            raise PartError("this model takes no pictures", place)
        with _named(place):
            data = media.read()
            return self._cache.get(data, lambda: _pixels(data, config, self.data.media))

    def _audio(self, media: Media, place: str) -> np.ndarray:
        config = self.model.audio
        if config is None:
            raise PartError("this model takes no sound", place)
        with _named(place):
            data = media.read()
            return self._cache.get(data, lambda: _log_mel(data, config, self.data.media))


def _pixels(data: bytes, config: ImageTowerConfig, limits: Limits) -> np.ndarray:
    image = decode_image(data, limits)
    if image.size != (config.size, config.size):
        image = image.resize((config.size, config.size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image, dtype=np.uint8)


def _log_mel(data: bytes, config: AudioTowerConfig, limits: Limits) -> np.ndarray:
    """Log-mel frames, normalised over the sound to mean 0 and deviation 1: (frames, mels) float16."""
    rate = config.sample_rate_hz
    samples = torch.from_numpy(decode_audio(data, rate, limits)[: int(config.max_s * rate)])
    window, bank = _mel_bank(rate, config.mels)
    size = len(window)
    if len(samples) < size:
        samples = torch.nn.functional.pad(samples, (0, size - len(samples)))
    spectrum = torch.stft(
        samples, 512 if size <= 512 else size, int(HOP_S * rate), size, window, return_complex=True, pad_mode="constant"
    )
    mel = bank @ spectrum.abs().square()  # (mels, frames)
    log = torch.log(mel + 1e-6)
    log = (log - log.mean()) / (log.std() + 1e-5)
    return log.T.to(torch.float16).numpy()


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


def _places(kind: str, counts: Sequence[int]) -> dict[str, Tensor]:
    row = [index for index, count in enumerate(counts) for _ in range(count)]
    slot = [place for count in counts for place in range(count)]
    return {
        f"{kind}_row": torch.tensor(row or [0]),
        f"{kind}_slot": torch.tensor(slot or [0]),
        f"{kind}_real": torch.tensor([True] * len(row) or [False]),
        f"{kind}_slots": torch.tensor(max(1, max(counts, default=1))),
    }


def _stack_sounds(sounds: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
    longest = max(len(sound) for sound in sounds)
    longest += -longest % _FRAME_STEP
    out = np.zeros((len(sounds), longest, sounds[0].shape[1]), np.float32)
    for index, sound in enumerate(sounds):
        out[index, : len(sound)] = sound
    return {"audios": torch.from_numpy(out), "audio_frames": torch.tensor([len(sound) for sound in sounds])}


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
