"""A bundle's answers to tables of records: what runs in the actors of an evaluation.

A row that cannot be answered becomes a row with an `error`, so that one damaged picture never ends a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from mmagent import evaluation
from mmagent.predictor import Answer, PartError, Predictor
from mmagent.record import Record, escape, segments

_FORWARD_ROWS = 32
_REMEMBERED = 2_000_000  # probabilities: bounds the memory of answers already given
MODALITIES = ("text", "image", "audio")


class Answerer:
    """Called with a table of record rows, gives a table of `mmagent.evaluation.schema`: each row once as it is and,
    where `without` names a modality, once with that taken away.

    The same question is asked once: without its picture, a test has few different ones.
    """

    def __init__(self, bundle: str, slices: Sequence[str], without: str | None, threads: int) -> None:
        self._predictor = Predictor.load(bundle, threads=threads)
        self._slices = tuple(slices)
        self._without = without
        self._schema = evaluation.schema(slices)
        self._known: dict[bytes, Answer | str] = {}  # an answer, or why there is none

    def __call__(self, table: pa.Table) -> pa.Table:
        if len(self._known) * len(self._predictor.labels) > _REMEMBERED:
            self._known.clear()
        records = [Record.from_row(row) for row in table.to_pylist()]
        rows = self._rows(records, records, "")
        if self._without:
            rows += self._rows(records, [without(record, self._without) for record in records], self._without)
        return pa.Table.from_pylist(rows, self._schema)

    def _rows(self, records: Sequence[Record], asked: Sequence[Record], taken: str) -> list[dict[str, Any]]:
        """A row for each record; `asked` is what the model gets of it, `taken` the modality it lacks."""
        keys = [_digest(record) for record in asked]
        self._answer({key: record for key, record in zip(keys, asked, strict=True) if key not in self._known})
        return [
            self._row(record, taken, "" if rest.modalities == "empty" else key)
            for record, rest, key in zip(records, asked, keys, strict=True)
        ]

    def _answer(self, asked: dict[bytes, Record]) -> None:
        samples = {}
        for key, record in asked.items():
            try:
                samples[key] = self._predictor.prepare(record)
            except PartError as error:
                self._known[key] = str(error)
        ready = list(samples)
        for start in range(0, len(ready), _FORWARD_ROWS):
            part = ready[start : start + _FORWARD_ROWS]
            answers = self._predictor.answer([samples[key] for key in part])
            self._known.update(zip(part, answers, strict=True))

    def _row(self, record: Record, taken: str, key: bytes | str) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": record.id,
            "group": record.meta.get("group") or record.id,
            "without": taken,
            "label": record.target.label,
            **{evaluation.slice_column(name): _slice(record, name) for name in self._slices},
        }
        if record.target.label is None:
            return row | {"error": "the row has no target.label"}
        answer = self._known[key] if isinstance(key, bytes) else f"nothing is left to ask without {taken or 'media'}"
        if isinstance(answer, str):
            return row | {"error": answer}
        return row | {
            "predicted": answer.label,
            "confidence": answer.confidence,
            "probabilities": [answer.probabilities[label] for label in self._predictor.labels],
            "abstained": answer.abstained,
        }


def without(record: Record, modality: str) -> Record:
    """The record with its pictures, its sounds or its words taken away, placeholders too."""
    messages = tuple(replace(message, content=_cut(message.content, modality)) for message in record.messages)
    taken: dict[str, Any] = {"image": {"images": ()}, "audio": {"audios": ()}, "text": {}}[modality]
    return replace(record, messages=messages, **taken)


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


def _digest(record: Record) -> bytes:
    """Equal for records that a model cannot tell apart."""
    seen = hashlib.blake2b(digest_size=16)
    for part in _parts(record):
        seen.update(len(part).to_bytes(8, "little"))
        seen.update(part)
    return seen.digest()


def _parts(record: Record) -> Iterable[bytes]:
    for message in record.messages:
        yield message.role.encode()
        yield message.content.encode()
    for medias in (record.images, record.audios):
        yield len(medias).to_bytes(8, "little")
        yield from (media.bytes or (media.path or "").encode() for media in medias)
