"""A bundle's answers to tables of records: what runs in the actors of an evaluation.

A row that cannot be answered becomes a row with an `error`, so that one damaged picture never ends a run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from mmagent import predictions, targets
from mmagent.answer import Answer
from mmagent.batch import PartError
from mmagent.predictor import Predictor
from mmagent.record import Record, escape, segments
from mmagent.targets import TargetError

_REMEMBERED = 2_000_000  # probabilities: bounds the memory of answers already given
MODALITIES = ("text", "image", "audio")
_SIGN = re.compile(r"(\\*)(<(?:image|audio)>)")  # escaped by an odd number of backslashes


class Answerer:
    """Called with a table of record rows, gives a table of `mmagent.predictions.schema`: each row once as it is and,
    where `without` names a modality, once with that taken away.

    The same question is asked once: without its picture, a test has few different ones.
    """

    def __init__(
        self,
        bundle: str,
        slices: Sequence[str],
        without: str | None,
        threads: int,
        tasks: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            tasks: the bundle's task for a task of the rows that is called otherwise.
        """
        self._tasks = dict(tasks or {})
        self._predictor = Predictor.load(bundle, threads=threads)
        self._slices = tuple(slices)
        self._without = without
        self._schema = predictions.schema(slices)
        self._width = max(1, *(len(task.labels) for task in self._predictor.tasks.values()))
        self._known: dict[bytes, Answer | str] = {}  # an answer, or why there is none

    def __call__(self, table: pa.Table) -> pa.Table:
        if len(self._known) * self._width > _REMEMBERED:
            self._known.clear()
        records = [Record.from_row(row) for row in table.to_pylist()]
        records = [replace(record, task=self._tasks.get(record.task, record.task)) for record in records]
        rows = self._rows(records, records, "")
        if self._without:
            rows += self._rows(records, [without(record, self._without) for record in records], self._without)
        return pa.Table.from_pylist(rows, self._schema)

    def _rows(self, records: Sequence[Record], asked: Sequence[Record], taken: str) -> list[dict[str, Any]]:
        """A row for each record; `asked` is what the model gets of it, `taken` the modality it lacks."""
        faults = [self._fault(record) for record in records]
        keys = [question(record) if _asks(record) else None for record in asked]
        fresh = {}
        for key, record, fault in zip(keys, asked, faults, strict=True):
            if key is not None and fault is None and key not in self._known:
                fresh[key] = record
        self._answer(fresh)
        return [self._row(*row) for row in zip(records, [taken] * len(records), faults, keys, strict=True)]

    def _fault(self, record: Record) -> str | None:
        """Why a record cannot be judged, whatever is answered; the same words for all that fail alike."""
        if record.task not in self._predictor.tasks:
            return f"this bundle has no task {record.task!r}, but {', '.join(self._predictor.tasks)}"
        try:
            targets.check(record)
        except TargetError as error:
            return f"no usable right answer: {error.reason}"
        return None

    def _answer(self, asked: dict[bytes, Record]) -> None:
        given = self._predictor.attempt(list(asked.values()))
        for key, answer in zip(asked, given, strict=True):
            self._known[key] = str(answer) if isinstance(answer, PartError) else answer

    def _row(self, record: Record, taken: str, fault: str | None, key: bytes | None) -> dict[str, Any]:
        """`fault`: why it cannot be judged; `key`: of its answer, None where nothing was left to ask."""
        row: dict[str, Any] = {
            "id": record.id,
            "group": record.meta.get("group") or record.id,
            "task": record.task,
            "without": taken,
            **{predictions.slice_column(name): _slice(record, name) for name in self._slices},
        }
        if fault is not None:
            return row | {"error": fault}
        task = self._predictor.tasks[record.task]
        gold = task.gold(record)
        row |= {"label": predictions.right_words(record, task.kind), "truth": json.dumps(gold, ensure_ascii=False)}
        answer = f"nothing is left to ask without {taken or 'media'}" if key is None else self._known[key]
        if isinstance(answer, str):
            return row | {"error": answer}
        return row | predictions.judged(task, gold, answer)


def without(record: Record, modality: str) -> Record:
    """The record with its pictures, its sounds or its words taken away, placeholders too, and those of its candidates.
    Where spans count characters, spaces stand in the placeholders' place."""
    at = targets.spanned(record) if record.target.spans else None
    messages = tuple(
        replace(message, content=(_blank if index == at else _cut)(message.content, modality))
        for index, message in enumerate(record.messages)
    )
    taken: dict[str, Any] = {"image": {"images": ()}, "audio": {"audios": ()}, "text": {}}[modality]
    field = "content" if modality == "text" else modality
    candidates = tuple({**candidate, field: None} for candidate in record.candidates)
    return replace(record, messages=messages, candidates=candidates, **taken)


def _asks(record: Record) -> bool:
    """Whether there is something to answer: a question, and all of its candidates."""
    whole = all(any(candidate.get(part) for part in ("content", "image", "audio")) for candidate in record.candidates)
    return whole and record.modalities != "empty"


def _blank(content: str, modality: str) -> str:
    """As long as before: words, or the placeholders of a modality, as spaces."""
    if modality == "text":
        return " " * len(content)
    sign = f"<{modality}>"
    return _SIGN.sub(lambda m: m[0] if len(m[1]) % 2 or m[2] != sign else m[1] + " " * len(sign), content)


def _cut(content: str, modality: str) -> str:
    out, words = "", ""
    for kind, text in segments(content):
        if kind == modality:
            continue
        if kind == "text":
            words += text
            continue
        out += escape(words)
        slashes = len(out) - len(out.rstrip("\\"))  # backslashes before a placeholder are written twice
        out += "\\" * slashes + f"<{kind}>"
        words = ""
    return (out + escape(words)).strip()


def _slice(record: Record, name: str) -> str | None:
    return record.modalities if name == "modalities" else record.meta.get(name)


def question(record: Record) -> bytes:
    """A digest, equal for records that a model cannot tell apart."""
    seen = hashlib.blake2b(digest_size=16)
    for part in _parts(record):
        seen.update(len(part).to_bytes(8, "little"))
        seen.update(part)
    return seen.digest()


def _parts(record: Record) -> Iterable[bytes]:
    for message in record.messages:
        yield message.role.encode()
        yield message.content.encode()
    yield record.task.encode()
    if record.task.startswith("relate"):  # the marked spans are part of the question
        yield repr(sorted((span["start"], span["end"], span["label"]) for span in record.target.spans or ())).encode()
    for candidate in record.candidates:
        yield (candidate.get("content") or "").encode()
        for media in (candidate.get("image") or {}, candidate.get("audio") or {}):
            yield media.get("bytes") or (media.get("path") or "").encode()
    for medias in (record.images, record.audios):
        yield len(medias).to_bytes(8, "little")
        yield from (media.bytes or (media.path or "").encode() for media in medias)
