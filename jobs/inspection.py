"""One row group of a data set looked at: its media decoded, hashed and judged, its rows counted. Runs in a process."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmagent import media, storage, symptoms, targets
from mmagent.record import Record

_COLUMNS = ["id", "task", "messages", "images", "audios", "candidates", "target"]
_REMEMBERED = 100_000  # media whose facts a process keeps: a picture that many questions are about is decoded once
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Glass:
    """How rows are looked at: sent to the processes.

    Args:
        tokenizer: folder or hub id of the recipe's language model, whose tokens lengths are counted in; none: words.
        max_tokens: of a text, where a recipe says so.
    """

    limits: media.Limits
    tokenizer: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A row group of a split."""

    split: str
    file: str
    group: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that training cannot use."""

    file: str
    row: int  # in its row group
    group: int
    id: str
    reason: str  # a few words, the same for all rows that fail alike
    message: str


@dataclass(slots=True)
class Look:
    """What one row group holds."""

    place: Place
    keys: np.ndarray  # (rows,) uint64: hash of a row's task, words and media
    answers: np.ndarray  # (rows,) uint64: hash of its answer
    lengths: np.ndarray  # (rows,) int32: tokens or words of its text
    media: dict[str, np.ndarray]  # image, audio -> (n,) uint64: hash of what each medium decodes to
    owners: dict[str, np.ndarray]  # image, audio -> (n,) int32: the row that it belongs to
    seconds: np.ndarray  # (sounds,) float32
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # signs, rates_hz, sizes, labels of each task
    examples: dict[str, list[str]] = field(default_factory=dict)  # sign -> ids of some rows
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The facts of one medium."""

    hash: int
    sign: str = ""
    size: str = ""  # of a picture: width x height
    rate_hz: int = 0
    seconds: float = 0.0
    reason: str = ""  # why it cannot be read
    message: str = ""


def look(glass: Glass, place: Place) -> Look:
    """Decodes every medium of a row group, and sums up what its rows are."""
    table = pq.ParquetFile(storage.source(place.file)).read_row_group(place.group, columns=_COLUMNS, use_threads=False)
    records = [Record.from_row(row) for row in table.to_pylist()]
    out = Look(
        place=place,
        keys=np.zeros(len(records), np.uint64),
        answers=np.array([_answer(record) for record in records], np.uint64),
        lengths=_lengths(glass, records),
        media={},
        owners={},
        seconds=np.zeros(0, np.float32),
        counts={name: Counter() for name in ("signs", "rates_hz", "sizes")},
    )
    found: dict[str, list[int]] = {"image": [], "audio": []}
    owners: dict[str, list[int]] = {"image": [], "audio": []}
    seconds: list[float] = []
    for index, record in enumerate(records):
        kept = _media(record, glass.limits)
        out.keys[index] = _key(record, [seen.hash for _, seen in kept])
        _count(out, record)
        for kind, seen in kept:
            found[kind].append(seen.hash)
            owners[kind].append(index)
            if kind == "audio" and not seen.reason:
                seconds.append(seen.seconds)
            _note(out, record.id, seen)
        if fault := _fault(record, kept):
            out.faults.append(Fault(place.file, index, place.group, record.id, *fault))
    out.media = {kind: np.array(hashes, np.uint64) for kind, hashes in found.items()}
    out.owners = {kind: np.array(rows, np.int32) for kind, rows in owners.items()}
    out.seconds = np.array(seconds, np.float32)
    return out


def _count(out: Look, record: Record) -> None:
    try:
        labels = targets.labels_of(record)
    except targets.TargetError:
        return  # told as a fault
    out.counts.setdefault(f"labels/{record.task}", Counter()).update(labels)


def _note(out: Look, id: str, seen: _Seen) -> None:
    if seen.size:
        out.counts["sizes"][seen.size] += 1
    if seen.rate_hz:
        out.counts["rates_hz"][str(seen.rate_hz)] += 1
    if seen.sign:
        out.counts["signs"][seen.sign] += 1
        examples = out.examples.setdefault(seen.sign, [])
        if len(examples) < _EXAMPLES:
            examples.append(id)


def _fault(record: Record, kept: Iterable[tuple[str, _Seen]]) -> tuple[str, str] | None:
    """Why training cannot use a row: what is wrong in a few words, and exactly."""
    for kind, seen in kept:
        if seen.reason:
            return f"{kind} {seen.reason}", seen.message
    try:
        targets.check(record)
    except targets.TargetError as error:
        return error.reason, str(error)
    return None


def _media(record: Record, limits: media.Limits) -> list[tuple[str, _Seen]]:
    """Every picture of a record, then every sound, with its facts."""
    return [(kind, _see(kind, item.bytes, limits)) for kind in ("image", "audio") for item in record.media((kind,))]


_remembered: OrderedDict[bytes, _Seen] = OrderedDict()


def _see(kind: str, data: bytes | None, limits: media.Limits) -> _Seen:
    if data is None:
        return _Seen(_hash(b""), reason="damaged", message="the shard holds no bytes for it")
    name = hashlib.blake2b(data, digest_size=16, person=kind.encode()).digest()
    if name not in _remembered:
        if len(_remembered) >= _REMEMBERED:
            _remembered.popitem(last=False)
        try:
            _remembered[name] = _picture(data, limits) if kind == "image" else _sound(data, limits)
        except media.MediaError as error:
            reason = "over a limit" if isinstance(error, media.MediaTooLarge) else "damaged"
            _remembered[name] = _Seen(_hash(data), reason=reason, message=str(error))
    return _remembered[name]


def _picture(data: bytes, limits: media.Limits) -> _Seen:
    # What it decodes to is what a model sees: a copy in another lossless format is the same picture.
    pixels = np.asarray(media.decode_image(data, limits))
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    return _Seen(_hash(size.encode(), pixels.tobytes()), symptoms.of_picture(pixels), size=size)


def _sound(data: bytes, limits: media.Limits) -> _Seen:
    rate = media.check_audio(data, limits).sample_rate_hz
    wave = media.decode_audio(data, rate, limits)
    made = _hash(str(rate).encode(), wave.tobytes())
    return _Seen(made, symptoms.of_sound(wave), rate_hz=rate, seconds=len(wave) / rate)


def _lengths(glass: Glass, records: list[Record]) -> np.ndarray:
    if glass.tokenizer is None:
        return np.array([len(_words(record).split()) for record in records], np.int32)
    from mmagent import text  # brings torch, which only a recipe's tokenizer needs

    tokenizer = text.shared_tokenizer(glass.tokenizer)
    found = tokenizer([text.words(record) for record in records], verbose=False)["input_ids"] if records else []
    return np.array([len(ids) for ids in found], np.int32)


def _words(record: Record) -> str:
    return " ".join(part for kind, part in record.segments() if kind == "text")


def _key(record: Record, media_hashes: list[int]) -> int:
    """What is asked: where two rows are asked the same, the same answer is expected."""
    said = [[message.role, message.content] for message in record.messages]
    offered = [candidate.get("content") for candidate in record.candidates]
    ends = [dict(span) for span in record.target.spans or ()] if record.task.startswith("relate") else []
    return _hash(_plain([record.task, said, media_hashes, offered, ends]))


def _answer(record: Record) -> int:
    """The same of all answers that may stand beside each other: a text has many right translations and summaries."""
    if record.task.startswith("generate"):
        return 0
    target = record.target
    spans = [dict(span) for span in target.spans or ()]
    return _hash(_plain([target.label, sorted(target.labels or ()), target.value, target.text, target.texts, spans]))


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _hash(*parts: bytes) -> int:
    """64 bits: among ten million rows two different ones meet by chance once in 370,000 data sets."""
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        made.update(part)
    return int.from_bytes(made.digest(), "little")
