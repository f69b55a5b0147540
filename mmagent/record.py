"""The row of every shard, request log and feedback file: one Arrow schema. How a user's own row becomes it, say
`mmagent.rows` and its neighbours.

Media follow the storage convention of Hugging Face ``datasets`` (``struct<bytes, path>``), so a data set published as
Parquet in this schema is readable by both. Text and media are tied by placeholders: the n-th ``<image>`` of a record's
messages stands for ``images[n]``, the n-th ``<audio>`` for ``audios[n]``. The same words typed by a user are escaped
with a backslash when a record is made (`escape`) and restored when it is read (`segments`), so media never shift.
"""

from __future__ import annotations

import builtins
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1
ROLES = ("system", "context", "user", "assistant", "tool")

_media = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_call = pa.struct([("id", pa.string()), ("name", pa.string()), ("arguments", pa.string())])
_message = pa.struct(
    [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(_call)), ("tool_call_id", pa.string())]
)
_span = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("label", pa.string())])
_target = pa.struct(
    [
        ("label", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("value", pa.float64()),
        ("text", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("spans", pa.list_(_span)),
    ]
)
_candidate = pa.struct([("content", pa.string()), ("image", _media), ("audio", _media)])

SCHEMA = pa.schema(
    [
        ("schema_version", pa.int32()),
        ("id", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("messages", pa.list_(_message)),
        ("images", pa.list_(_media)),
        ("audios", pa.list_(_media)),
        ("candidates", pa.list_(_candidate)),
        ("target", _target),
        ("weight", pa.float32()),
        ("meta", pa.map_(pa.string(), pa.string())),
        ("origin", pa.string()),
        ("created_ms", pa.int64()),
    ]
)

_PLACEHOLDER = re.compile(r"(\\*)<(image|audio)>")


class RecordError(ValueError):
    """A row that cannot become a record. `field` names the place, e.g. ``images[0]``."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Media:
    """One encoded picture or sound, as it lay in its file."""

    bytes: bytes | None = None
    path: str | None = None

    def read(self, root: Path | None = None) -> builtins.bytes:
        """The encoded bytes; `path` is taken relative to `root`.

        Raises:
            RecordError: neither bytes nor a readable file.
        """
        if self.bytes is not None:
            return self.bytes
        if self.path is None:
            raise RecordError("media has neither bytes nor a path: give one of them")
        file = Path(self.path) if root is None else root / self.path
        try:
            return file.read_bytes()
        except OSError as error:
            raise RecordError(f"cannot read the media file {file}: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    tool_calls: tuple[Mapping[str, str], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What the right answer is; a task reads the field it needs and leaves the others empty."""

    label: str | None = None
    labels: tuple[str, ...] | None = None
    value: float | None = None
    text: str | None = None
    texts: tuple[str, ...] | None = None
    spans: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    id: str
    messages: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    audios: tuple[Media, ...] = ()
    target: Target = Target()
    split: str | None = None
    task: str = "classify"
    candidates: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    meta: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    created_ms: int = field(default_factory=lambda: int(time.time() * 1000))

    @property
    def modalities(self) -> str:
        """Which inputs the record brings, e.g. ``text+image`` or ``image+audio``: the slices of every report."""
        has_text = any(kind == "text" and text.strip() for kind, text in self.segments())
        parts = (("text", has_text), ("image", bool(self.images)), ("audio", bool(self.audios)))
        return "+".join(name for name, present in parts if present) or "empty"

    def segments(self) -> Iterator[tuple[str, str]]:
        """The messages in order, cut at the placeholders: ``("text", words)``, ``("image", "")``, ``("audio", "")``."""
        for message in self.messages:
            yield from segments(message.content)

    def media(self, kinds: Sequence[str] = ("image", "audio")) -> Iterator[Media]:
        """Every picture and sound of the record: of its messages, then of its candidates."""
        yield from (*(self.images if "image" in kinds else ()), *(self.audios if "audio" in kinds else ()))
        for candidate in self.candidates:
            for kind in kinds:
                if found := candidate.get(kind):
                    yield Media(found.get("bytes"), found.get("path"))

    def to_row(self) -> dict[str, Any]:
        """The record as a row of `SCHEMA`."""
        target = self.target
        return {
            "schema_version": SCHEMA_VERSION,
            "id": self.id,
            "split": self.split,
            "task": self.task,
            "messages": [
                {
                    "role": message.role,
                    "content": message.content,
                    "tool_calls": [dict(call) for call in message.tool_calls] or None,
                    "tool_call_id": message.tool_call_id,
                }
                for message in self.messages
            ],
            "images": [{"bytes": media.bytes, "path": media.path} for media in self.images],
            "audios": [{"bytes": media.bytes, "path": media.path} for media in self.audios],
            "candidates": [dict(candidate) for candidate in self.candidates] or None,
            "target": {
                "label": target.label,
                "labels": list(target.labels) if target.labels is not None else None,
                "value": target.value,
                "text": target.text,
                "texts": list(target.texts) if target.texts is not None else None,
                "spans": [dict(span) for span in target.spans] if target.spans is not None else None,
            },
            "weight": self.weight,
            "meta": list(self.meta.items()),
            "origin": self.origin,
            "created_ms": self.created_ms,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Record:
        """The record of a row as pyarrow gives it (`Table.to_pylist`)."""
        target = row.get("target") or {}
        labels, texts, spans = target.get("labels"), target.get("texts"), target.get("spans")
        return cls(
            id=row["id"],
            split=row.get("split"),
            task=row.get("task") or "classify",
            messages=tuple(
                Message(
                    role=message["role"],
                    content=message["content"] or "",
                    tool_calls=tuple(message.get("tool_calls") or ()),
                    tool_call_id=message.get("tool_call_id"),
                )
                for message in row["messages"] or ()
            ),
            images=tuple(Media(media["bytes"], media["path"]) for media in row.get("images") or ()),
            audios=tuple(Media(media["bytes"], media["path"]) for media in row.get("audios") or ()),
            candidates=tuple(row.get("candidates") or ()),
            target=Target(
                label=target.get("label"),
                labels=tuple(labels) if labels is not None else None,
                value=target.get("value"),
                text=target.get("text"),
                texts=tuple(texts) if texts is not None else None,
                spans=tuple(spans) if spans is not None else None,
            ),
            weight=1.0 if row.get("weight") is None else row["weight"],
            meta=dict(row.get("meta") or ()),
            origin=row.get("origin") or "",
            created_ms=row.get("created_ms") or 0,
        )


def escape(text: str) -> str:
    r"""A user's own words made safe: ``<image>`` becomes ``\<image>``, which `segments` reads back as words."""
    return _PLACEHOLDER.sub(lambda match: "\\" * (2 * len(match[1]) + 1) + f"<{match[2]}>", text)


def compose(parts: Iterable[tuple[str, str]]) -> str:
    r"""The content of a message of parts in `segments`' form: what `segments` gives back. A text that ends in a
    backslash does not escape the placeholder after it, as it would if the two were only joined."""
    content = text = ""
    for kind, words in parts:
        if kind == "text":
            text += words
            continue
        slashes = len(text) - len(text.rstrip("\\"))
        content += escape(text) + "\\" * slashes + f"<{kind}>"
        text = ""
    return content + escape(text)


def segments(content: str) -> Iterator[tuple[str, str]]:
    """Cuts a message at its placeholders; escaped ones come back as the words they were."""
    text = ""
    end = 0
    for match in _PLACEHOLDER.finditer(content):
        slashes = len(match[1])
        text += content[end : match.start()] + "\\" * (slashes // 2)
        end = match.end()
        if slashes % 2:
            text += f"<{match[2]}>"
            continue
        if text:
            yield "text", text
            text = ""
        yield match[2], ""
    text += content[end:]
    if text:
        yield "text", text


def escapes(text: str) -> list[tuple[int, int]]:
    """Where `escape` puts backslashes into a text: (place, number)."""
    return [(match.start(), len(match[1]) + 1) for match in _PLACEHOLDER.finditer(text)]
