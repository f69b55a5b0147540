"""From records to tensors: the one path that training, evaluation and serving share, so that they cannot differ.

`Inputs.sample` decodes and tokenises one record (pure, thread-safe, on the CPU); `Inputs.batch` stacks samples.
Augmentation (`mmagent.augment`) happens between the two.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from mmagent import features, pictures, pretrained, sounds, text
from mmagent.config import DataConfig, ModelConfig
from mmagent.conversations import Conversations, Row
from mmagent.media import MediaError, MediaTooLarge, check_audio, check_image
from mmagent.reading import MADE, Reader, TooLongError, View, opened, without
from mmagent.record import Media, Message, Record, RecordError
from mmagent.targets import TargetError, check_question
from mmagent.tasks import Task
from mmagent.text import TextEncoder
from mmagent.writer import Writing

_READ_BESIDES = {"match": "candidates", "relate": "spans"}  # the field that a kind of task reads besides messages


class PartError(ValueError):
    """A part of a record that cannot be used. `field` is its place, e.g. ``images[0]``; `too_large`: over a limit."""

    def __init__(self, message: str, field: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.too_large = too_large


class Processed(NamedTuple):
    """What a native model's processor made for a view, and of which pictures and sounds: augmentation may change them
    after. Where the view has ids of its own, what comes before its words alone, at the places that wait for it."""

    row: Row
    media: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        return int(self.row["input_ids"].shape[1])

    def of(self, images: Sequence[np.ndarray], audios: Sequence[np.ndarray]) -> bool:
        """Whether it was made of these."""
        media = (*images, *audios)
        return len(media) == len(self.media) and all(map(operator.is_, self.media, media))


@dataclass(frozen=True, slots=True)
class Sample:
    """One record, decoded: what its task reads of it, in one view or several."""

    record: Record
    views: tuple[View, ...]
    has_words: bool  # of its messages
    images: tuple[np.ndarray, ...]  # (height, width, 3) uint8 each; (states, channels) where those are stored
    audios: tuple[np.ndarray, ...]  # (frames, channels) each, see `mmagent.sounds`; likewise
    weight: float = 1.0
    transcript: np.ndarray | None = None  # (tokens,) int64: the words spoken, where known
    more: tuple[tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]], ...] = ()  # a view's own pictures and sounds
    processed: tuple[Processed, ...] = ()  # of a native model, for each view
    known: Mapping[bytes, np.ndarray] = field(default_factory=dict)  # states of frozen parts (see `mmagent.features`)
    hear: Callable[[str], None] | None = field(default=None, compare=False)  # is told a text as it is written
    writing: Writing | None = None  # how a text is to be written; none: the likeliest, as long as the config allows

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def task(self) -> str:
        return self.record.task

    @property
    def cut(self) -> int:
        """Tokens of its text that no view has room for."""
        return sum(view.cut for view in self.views)

    @property
    def tokens(self) -> int:
        """What is read of it, over all views, pictures and sounds with it where they stand among the words."""
        if self.rendered:
            return sum(each.tokens for each in self.processed)
        return sum(len(view.ids) for view in self.views)

    @property
    def rendered(self) -> bool:
        """Whether its words are in what a native model's processor made, by the chat template."""
        return bool(self.processed) and not any(len(view.ids) for view in self.views)

    def media(self, view: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Pictures and sounds of one view: the record's, then those of its candidate."""
        read = self.views[view]
        images, audios = self.more[read.index] if self.more and read.index >= 0 else ((), ())
        return (images, audios) if read.alone else ((*self.images, *images), (*self.audios, *audios))

    def speaks(self, view: int) -> bool:
        """Whether there are words in a view."""
        read = self.views[view]
        return read.offers or (self.has_words and not read.alone)


class Inputs:
    """Makes samples and batches for one model.

    Args:
        model: its section of the config.
        data: limits, text length, size of the cache of decoded media.
        tokenizer: of the model's backbone; of a native model its processor.
        tasks: what the model answers, by name.
        encoder: the backbone, which says how long a text may be and whether it decodes, where the join is at its input.

    Attributes:
        stored: (states, channels) of a picture or sound, where the states of a frozen tower come with the rows: they
            take the place of pixels and frames.

    Raises:
        BackboneError: a pretrained tower's processor that is missing or cannot be used.
    """

    def __init__(
        self, model: ModelConfig, data: DataConfig, tokenizer: Any, tasks: Mapping[str, Task],
        encoder: TextEncoder | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.data = data
        self.conversations: Conversations | None = None
        if model.join == "native":
            with pretrained.refusing(model.backbone, model.backbone, "model.backbone"):
                self.conversations = Conversations(tokenizer, data.max_text_tokens)
            tokenizer = tokenizer.tokenizer
        self.tokenizer = tokenizer
        self.tasks = tasks
        self._positions = encoder.max_tokens if encoder is not None else None
        self.reader = _reader(model, data, tokenizer, encoder, any(task.generates for task in tasks.values()))
        self.pictures = pictures.of(model.image) if model.image else None
        self.sounds = sounds.of(model.audio) if model.audio else None
        takes = {"image": self.pictures, "audio": self.sounds}
        own = self.conversations.kinds if self.conversations else ()
        self.modalities = ("text", *(kind for kind, made in takes.items() if made is not None or kind in own))
        self.stored: dict[str, tuple[int, int]] = {}
        self._cache = _Cache(data.cache_mb << 20)
        self._tokenizing = threading.Lock()  # a tokenizer keeps its truncation as state, which differs between tasks

    def check(self, record: Record) -> None:
        """Reads headers only.

        Raises:
            PartError: media that is none or over a limit, or that the model cannot take.
        """
        for kind, medias, modality, look in (
            ("images", record.images, "image", check_image),
            ("audios", record.audios, "audio", check_audio),
        ):
            for index, media in enumerate(medias):
                if modality not in self.modalities:
                    raise PartError(f"this model takes no {kind}", f"{kind}[{index}]")
                with _named(f"{kind}[{index}]"):
                    look(media.read(), self.data.media)

    def sample(
        self, record: Record, read: View | None = None, known: Mapping[bytes, np.ndarray] | None = None
    ) -> Sample:
        """Decodes a record; `read` saves tokenising where a stream did it before, and `known` what frozen parts would
        compute (see `mmagent.features`).

        Raises:
            PartError: media that cannot be decoded or is over a limit, a task that the model has not, or a record that
                lacks what its task reads.
        """
        words = text.words(record)
        views = self._views(record, read)
        transcript = record.meta.get("transcript") if record.audios and self._aligns else None
        sample = Sample(
            record=record,
            views=views,
            has_words=bool(words),
            images=tuple(self._image(media, f"images[{i}]", known) for i, media in enumerate(record.images)),
            audios=tuple(self._audio(media, f"audios[{i}]", known) for i, media in enumerate(record.audios)),
            weight=record.weight,
            transcript=self.tokenize([transcript])[0] if transcript else None,
            more=tuple(self._of_candidate(item, i, known) for i, item in enumerate(self._offered(record))),
            known=known or {},
        )
        return sample if self.conversations is None else self._conversed(sample, self.conversations)

    def _conversed(self, sample: Sample, made: Conversations) -> Sample:
        """A sample of a native model. The views of a task that reads the whole hold what is to be written alone."""
        try:
            with self._tokenizing:
                if self.tasks[sample.task].reads_whole:
                    return self._whole(sample, made)
                return self._fronted_by(made, sample)
        except (TemplateError, ValueError) as error:
            raise PartError(f"the model's own processor refuses it: {error}", "messages") from error

    def _whole(self, sample: Sample, made: Conversations) -> Sample:
        [view] = sample.views
        places = self._places_for(sample)
        row, cut = made.row(sample.record, sample.images, sample.audios, places)
        found = Processed(row, (*sample.images, *sample.audios))
        if places is not None and found.tokens > places:
            raise self._no_room(found.tokens)
        return replace(sample, views=(replace(view, cut=cut + view.cut),), processed=(found,))

    def _fronted_by(self, made: Conversations, sample: Sample) -> Sample:
        """A sample whose views begin with what the processor makes of their pictures and sounds; of words that the
        model has no places for beside it, the views hold fewer."""
        task, places = self.tasks[sample.task], self._positions
        fronts = self._fronts(sample, made)
        longest = max(front.tokens for front in fronts)
        if places is not None and longest + max(len(view.ids) for view in sample.views) > places:
            room = min(self.reader.max_tokens, places - longest)
            if room < self.reader.fewest:
                raise self._no_room(longest)
            sample = replace(sample, views=task.views(sample.record, replace(self.reader, max_tokens=room)))
            fronts = self._fronts(sample, made)
        pairs = zip(sample.views, fronts, strict=True)
        views = tuple(opened(view, [MADE] * front.tokens, made.at) for view, front in pairs)
        return replace(sample, views=views, processed=fronts)

    def _fronts(self, sample: Sample, made: Conversations) -> tuple[Processed, ...]:
        """For each view; strides show the same pictures and sounds, which are processed once."""
        known: dict[tuple[int, ...], Processed] = {}
        out = []
        for view in range(len(sample.views)):
            images, audios = sample.media(view)
            key = tuple(map(id, (*images, *audios)))
            if key not in known:
                known[key] = Processed(made.front(images, audios), (*images, *audios))
            out.append(known[key])
        return tuple(out)

    def _places_for(self, sample: Sample) -> int | None:
        """How many tokens of a native model what is read may take; a decoder's reply needs places too."""
        writes = self.tasks[sample.task].generates and self.reader.decodes
        return None if self._positions is None else self._positions - (self.data.max_answer_tokens if writes else 0)

    def _no_room(self, tokens: int) -> PartError:
        return PartError(
            f"with its pictures and sounds it takes {tokens} tokens, which leaves too little of the "
            f"{self._positions} that the language model has places for: send fewer or smaller ones",
            "messages",
        )

    def _views(self, record: Record, read: View | None) -> tuple[View, ...]:
        task = self.tasks.get(record.task)
        if task is None:
            known = ", ".join(self.tasks)
            raise PartError(f"this model has no task {record.task!r}; it has {known}", "task")
        soft = self.model.join == "input"
        if self.conversations is not None and task.reads_whole:
            return (task.replied(record, self.reader),)
        if task.reads_whole and read is not None and not soft:
            return (read,)
        try:
            check_question(record)
            with self._tokenizing:
                views = task.views(record, self.reader)
                if soft and not task.reads_whole:
                    views = tuple(self._fronted(record, view) for view in views)
                return views
        except TemplateError as error:
            raise PartError(f"the model's chat template refuses it: {error}", "messages") from error
        except (TargetError, TooLongError) as error:
            raise PartError(str(error), _READ_BESIDES.get(task.kind, "messages")) from error

    def _fronted(self, record: Record, view: View) -> View:
        offered = self._offered(record)
        own = offered[view.index] if offered and view.index >= 0 else {}
        asked = (0, 0) if view.alone else (len(record.images), len(record.audios))
        images, audios = asked[0] + bool(own.get("image")), asked[1] + bool(own.get("audio"))
        return self.reader.fronted(view, images if self.pictures else 0, audios if self.sounds else 0)

    def _offered(self, record: Record) -> Sequence[Mapping[str, Any]]:
        """The candidates, for tasks that read them."""
        return record.candidates if self.tasks[record.task].kind == "match" else ()

    def _of_candidate(
        self, candidate: Mapping[str, Any], index: int, known: Mapping[bytes, np.ndarray] | None
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        place, image, audio = f"candidates[{index}]", candidate.get("image"), candidate.get("audio")
        return (
            (self._image(Media(image["bytes"], image["path"]), f"{place}.image", known),) if image else (),
            (self._audio(Media(audio["bytes"], audio["path"]), f"{place}.audio", known),) if audio else (),
        )

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        with self._tokenizing:
            return text.tokenize(self.tokenizer, texts, self.data.max_text_tokens)

    def pieces(self, words: str) -> list[tuple[int, int]]:
        """Where each token of some words begins and ends, signs of the tokenizer's own left out."""
        with self._tokenizing:
            shown = text.legible(self.tokenizer, words)
            if not self.tokenizer.is_fast or len(shown) != len(words):
                return []
            options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
            return list(self.tokenizer(shown, verbose=False, **options)["offset_mapping"])

    def count(self, words: str) -> int:
        """How many tokens some words are, signs of the tokenizer's own left out."""
        with self._tokenizing:
            return len(self.tokenizer.tokenize(words))

    def batch(self, samples: Sequence[Sample], *, stand_ins: bool = True) -> dict[str, Tensor]:
        """Stacks the views of samples. Keys and shapes (r rows, a row for each view; t tokens, n pictures and m sounds
        of all rows together):

        ids, mask, keep (r, t) · has_words, weight (a sample's, shared out over its views), sample_row (r,) ·
        TASK/... what each task's loss and head need, by row · images (n, 3, height, width), image_row, image_slot,
        image_real (n,), image_slots () · audios (m, frames, channels), audio_frames, audio_row, audio_slot, audio_real
        (m,), audio_slots () · both of
        (n, states, channels) where states are stored · transcript_ids, transcript_mask (m, t) where the model is taught
        by words spoken.
        Where a batch has no picture (or sound), one stand-in of zeros is there with ``real`` false.

        Of a native model there are ids, mask and ``media/NAME``, what its processor makes, in place of images and
        audios, and the stand-in is a row of weight 0 behind all.

        Args:
            stand_ins: of a native model: whether there are such rows. Without them its towers run where there is
                something for them alone, which ranks that share weights cannot.
        """
        if self.conversations is not None:
            return self._conversed_batch(samples, self.conversations, stand_ins)
        rows = [(index, sample, view) for index, sample in enumerate(samples) for view in range(len(sample.views))]
        ids, mask = self._pad([sample.views[view].ids for _, sample, view in rows])
        out = {
            "ids": ids,
            "mask": mask,
            "keep": mask.bool(),
            "has_words": torch.tensor([sample.speaks(view) for _, sample, view in rows]),
            "weight": torch.tensor([sample.weight / len(sample.views) for _, sample, _ in rows], dtype=torch.float32),
            "sample_row": torch.tensor([index for index, _, _ in rows]),
        }
        for name, task in self.tasks.items():
            targets = [task.target(s.record, s.views[view]) if s.task == name else None for _, s, view in rows]
            out |= task.collate(targets, ids.shape[1])
        media = [sample.media(view) for _, sample, view in rows]
        if self.pictures is not None:
            out |= _places("image", [len(images) for images, _ in media])
            images = [image for each, _ in media for image in each]
            out["images"] = self._rows("image", images) if "image" in self.stored else self.pictures.stack(images)
        if self.sounds is not None:
            out |= _places("audio", [len(audios) for _, audios in media])
            audios = [audio for _, each in media for audio in each]
            if "audio" in self.stored:
                states = self._rows("audio", audios)
                out |= {"audios": states, "audio_frames": torch.full((len(states),), states.shape[1])}
            else:
                out |= self.sounds.stack(audios)
            if self._aligns:
                spoken = [s.transcript for (_, s, _), (_, each) in zip(rows, media, strict=True) for _ in each]
                out["transcript_ids"], out["transcript_mask"] = self._pad(spoken or [None])
        return out

    def _conversed_batch(self, samples: Sequence[Sample], made: Conversations, stand_ins: bool) -> dict[str, Tensor]:
        rows = [(index, sample, view) for index, sample in enumerate(samples) for view in range(len(sample.views))]
        found = [self._row(sample, view, made) for _, sample, view in rows]
        given = [row for row, _ in found]
        weights = [sample.weight / len(sample.views) for _, sample, _ in rows]
        sample_row = [index for index, _, _ in rows]
        media = [sample.media(view) for _, sample, view in rows]
        for side, kind in enumerate(("image", "audio")):
            if not stand_ins or kind not in made.kinds or any(each[side] for each in media):
                continue
            one = [made.stand_in(kind)]
            record = Record("", (Message("user", f"<{kind}>"),))
            with self._tokenizing:
                given.append(made.row(record, one if kind == "image" else [], one if kind == "audio" else [])[0])
            weights.append(0.0)
            sample_row.append(sample_row[-1] + 1)
        out = made.collate(given, self.tokenizer.pad_token_id)
        out |= {
            "keep": out["mask"].bool(),
            "has_words": torch.tensor([True] * len(given)),
            "weight": torch.tensor(weights, dtype=torch.float32),
            "sample_row": torch.tensor(sample_row),
        }
        shown = [(sample, view) for (_, sample, _), (_, view) in zip(rows, found, strict=True)]
        for name, task in self.tasks.items():
            targets = [task.target(s.record, view) if s.task == name else None for s, view in shown]
            out |= task.collate([*targets, *[None] * (len(given) - len(rows))], out["ids"].shape[1])
        return out

    def _row(self, sample: Sample, number: int, made: Conversations) -> tuple[Row, View]:
        """What a native model reads of a view, and the view as it is read: of pictures and sounds that augmentation
        changed the processor makes another row, where the model has places for it."""
        view, (images, audios) = sample.views[number], sample.media(number)
        known = sample.processed[number] if sample.processed else Processed(made.front((), ()), ())
        if not known.of(images, audios):
            with self._tokenizing:
                if sample.rendered:
                    anew = made.row(sample.record, images, audios, places := self._places_for(sample))[0]
                else:
                    anew, places = made.front(images, audios), self._positions
            words = 0 if sample.rendered else len(view.ids) - known.tokens
            known_or_new = Processed(anew, (*images, *audios))
            if places is None or known_or_new.tokens + words <= places:
                known = known_or_new
                if not sample.rendered:
                    view = opened(without(view, MADE), [MADE] * known.tokens, made.at)
        return (known.row if sample.rendered else made.filled(view.ids, known.row)), view

    @property
    def _aligns(self) -> bool:
        return self.model.join == "output" and self.model.audio is not None and self.model.audio.align > 0

    def _pad(self, rows: Sequence[np.ndarray | None]) -> tuple[Tensor, Tensor]:
        longest = max((len(row) for row in rows if row is not None), default=1)
        ids = np.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for index, row in enumerate(rows):
            if row is not None:
                ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def _image(self, media: Media, place: str, known: Mapping[bytes, np.ndarray] | None) -> np.ndarray:
        made = self.conversations or self.pictures
        if made is None or "image" not in self.modalities:
            raise PartError("this model takes no pictures", place)
        with _named(place):
            data = media.read()
            return self._made("image", data, lambda: made.pixels(data, self.data.media), known)

    def _audio(self, media: Media, place: str, known: Mapping[bytes, np.ndarray] | None) -> np.ndarray:
        made = self.conversations or self.sounds
        if made is None or "audio" not in self.modalities:
            raise PartError("this model takes no sound", place)
        with _named(place):
            data = media.read()
            return self._made("audio", data, lambda: made.frames(data, self.data.media), known)

    def _made(
        self,
        kind: features.Kind,
        data: bytes,
        decode: Callable[[], np.ndarray],
        known: Mapping[bytes, np.ndarray] | None,
    ) -> np.ndarray:
        """What stands for a medium in a sample: its states where they are stored, else what is decoded of it."""
        if kind not in self.stored:
            return self._cache.get(data, decode)
        found = (known or {}).get(features.key(kind, data))
        if found is None:
            decode()  # which says why nothing could be computed of it
            raise MediaError("its states were not stored with the others of its shard: remove ROOT/features")
        return found

    def _rows(self, kind: str, states: Sequence[np.ndarray]) -> Tensor:
        """(media, states, channels); of nothing a stand-in of zeros."""
        return torch.from_numpy(np.stack(states)) if states else torch.zeros(1, *self.stored[kind])


def _reader(model: ModelConfig, data: DataConfig, tokenizer: Any, encoder: TextEncoder | None, writes: bool) -> Reader:
    if model.join == "output":
        return Reader(tokenizer, data.max_text_tokens)
    assert encoder is not None, "how long a text may be is the language model's to say"
    table = encoder.model.get_input_embeddings().weight  # type: ignore[operator]
    if writes and (stop := text.stop_id(tokenizer)) >= table.shape[0]:
        raise text.BackboneError(
            f"the tokenizer ends a text with {tokenizer.convert_ids_to_tokens(stop)!r}, number {stop}, but the "
            f"language model has embeddings for {table.shape[0]} tokens: set eos_token to one that it knows"
        )
    if model.join == "native":
        return Reader(tokenizer, data.max_text_tokens, data.max_answer_tokens, decodes=encoder.decodes)
    soft = {"image": model.image.tokens if model.image else 0, "audio": model.audio.tokens if model.audio else 0}
    return Reader(
        tokenizer, data.max_text_tokens, data.max_answer_tokens, soft, encoder.max_tokens, encoder.decodes
    )  # fmt: skip


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
