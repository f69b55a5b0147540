"""The row of every shard, request log and feedback file: one Arrow schema, and how a user's own row becomes it.

Media follow the storage convention of Hugging Face ``datasets`` (``struct<bytes, path>``), so a data set published as
Parquet in this schema is readable by both. Text and media are tied by placeholders: the n-th ``<image>`` of a record's
messages stands for ``images[n]``, the n-th ``<audio>`` for ``audios[n]``. The same words typed by a user are escaped
with a backslash when a record is made (`escape`) and restored when it is read (`segments`), so media never shift.
"""

from __future__ import annotations

import base64
import binascii
import builtins
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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


def parse(
    row: Mapping[str, Any],
    *,
    root: Path | None = None,
    default_id: str = "",
    origin: str = "",
    max_media_bytes: int | None = None,
) -> Record:
    """Makes a record of a user's row: the long form (``messages``) or the short one (``text``, ``image``, ``audio``,
    ``label``). Media may be a path relative to `root`, base64, a data URI, raw bytes, or ``{"bytes", "path"}``; files
    are read here, so that a shard stands alone, but none above `max_media_bytes`. A
    long-form row with more media than placeholders gets the missing ones in front of its last user message.

    Raises:
        RecordError: what is missing or cannot be read, and where.
    """
    if row.get("messages") not in (None, ""):
        messages = _messages(row["messages"])
    elif any(row.get(key) not in (None, "") for key in ("text", "image", "images", "audio", "audios")):
        messages = (Message("user", escape(str(row["text"])) if row.get("text") not in (None, "") else ""),)
    else:
        raise RecordError(
            f"the row has the columns {sorted(row)}, but none of messages, text, image or audio holds anything; "
            "rename columns with --map text=COLUMN,image=COLUMN,audio=COLUMN,label=COLUMN"
        )
    images = _media_list(row, "image", root, max_media_bytes)
    audios = _media_list(row, "audio", root, max_media_bytes)
    messages = _place(messages, images=len(images), audios=len(audios))
    return Record(
        id=default_id if row.get("id") in (None, "") else str(row["id"]),
        split=str(row["split"]) if row.get("split") not in (None, "") else None,
        task=str(row.get("task") or "classify"),
        messages=messages,
        images=images,
        audios=audios,
        target=_target_of(row),
        weight=_number(row, "weight", 1.0),
        meta=_meta(row.get("meta")),
        origin=str(row.get("origin") or origin),
    )


def _messages(raw: Any) -> tuple[Message, ...]:
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise RecordError(f"messages is {raw!r:.80}, but a list of {{role, content}} is wanted", "messages")
    out = []
    for index, message in enumerate(raw):
        place = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RecordError(f"{place} is {message!r:.80}, but {{role, content}} is wanted", place)
        if message.get("role") not in ROLES:
            raise RecordError(
                f"{place}.role is {message.get('role')!r}, but one of {', '.join(ROLES)} is wanted", place
            )
        if not isinstance(message.get("content") or "", str):
            raise RecordError(f"{place}.content is {type(message['content']).__name__}, but text is wanted", place)
        calls = message.get("tool_calls") or ()
        if isinstance(calls, (str, Mapping)) or not all(isinstance(call, Mapping) for call in calls):
            raise RecordError(f"{place}.tool_calls is {calls!r:.80}, but a list of objects is wanted", place)
        calls = tuple(calls)
        out.append(Message(message["role"], message.get("content") or "", calls, message.get("tool_call_id")))
    if not any(message.role == "user" for message in out):
        raise RecordError("messages has no message of the user", "messages")
    return tuple(out)


def _place(messages: tuple[Message, ...], *, images: int, audios: int) -> tuple[Message, ...]:
    kinds = [kind for message in messages for kind, _ in segments(message.content)]
    missing = ""
    for kind, count in (("image", images), ("audio", audios)):
        seen = kinds.count(kind)
        if seen > count:
            raise RecordError(
                f"the messages hold {seen} <{kind}> placeholders, but {kind}s has {count} entries; "
                f"write \\<{kind}> where the words themselves are meant",
                f"{kind}s",
            )
        missing += f"<{kind}>" * (count - seen)
    if not missing:
        return messages
    last = max(index for index, message in enumerate(messages) if message.role == "user")
    content = messages[last].content
    changed = replace(messages[last], content=f"{missing} {content}" if content else missing)
    return (*messages[:last], changed, *messages[last + 1 :])


def _media_list(row: Mapping[str, Any], kind: str, root: Path | None, limit: int | None) -> tuple[Media, ...]:
    many = row.get(f"{kind}s")
    if many is None or many == "":
        one = row.get(kind)
        return () if one is None or one == "" else (_one_media(one, kind, root, limit),)
    if isinstance(many, (str, bytes, Mapping)):
        many = [many]
    if not isinstance(many, Sequence):
        raise RecordError(f"{kind}s is {many!r:.80}, but a list is wanted", f"{kind}s")
    return tuple(_one_media(value, f"{kind}s[{index}]", root, limit) for index, value in enumerate(many))


def _one_media(value: Any, place: str, root: Path | None, limit: int | None) -> Media:
    if isinstance(value, bytes):
        return Media(value)
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            raw = value["bytes"]
            return Media(raw if isinstance(raw, bytes) else decode_base64(raw, place), value.get("path"))
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise RecordError(f"{place} is {value!r:.80}, but a path, base64 or {{bytes, path}} is wanted", place)
    if value.startswith("data:"):
        return Media(decode_base64(value.partition(",")[2], place))
    file = Path(value) if root is None else root / value
    # Base64 of any real picture or sound is far longer than a path may be, so a short value is always a path.
    if len(value) < 1024 or file.suffix:
        try:
            return Media(_read_file(file, place, limit), value)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            if isinstance(error, RecordError):
                raise
            if len(value) < 1024:
                reason = getattr(error, "strerror", None) or error
                raise RecordError(f"{place}: cannot read the file {file}: {reason}", place) from error
    return Media(decode_base64(value, place))


def _read_file(file: Path, place: str, limit: int | None) -> bytes:
    size = file.stat().st_size
    if not file.is_file():
        raise RecordError(f"{place}: {file} is a folder or a device, but a file is wanted", place)
    if limit is not None and size > limit:
        raise RecordError(f"{place}: {file} has {size} bytes; the limit max_media_bytes is {limit}", place)
    return file.read_bytes()


def decode_base64(text: str, place: str) -> bytes:
    """Strict base64 (white space allowed).

    Raises:
        RecordError: naming `place`.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"{place} is not valid base64: {error}", place) from error


def _target_of(row: Mapping[str, Any]) -> Target:
    raw = row.get("target")
    if raw is None:
        raw = {key: row[key] for key in ("label", "labels", "value", "texts", "spans") if row.get(key) is not None}
    if not isinstance(raw, Mapping):
        raise RecordError(f"target is {raw!r:.80}, but an object such as {{'label': ...}} is wanted", "target")
    label = raw.get("label")
    if isinstance(label, (Mapping, list, tuple, bytes)):
        raise RecordError(f"label is {label!r:.80}, but one word or number is wanted", "label")
    labels, texts, spans = raw.get("labels"), raw.get("texts"), raw.get("spans")
    for key, many in (("labels", labels), ("texts", texts), ("spans", spans)):
        if many is not None and (isinstance(many, (str, bytes)) or not isinstance(many, Sequence)):
            raise RecordError(f"{key} is {many!r:.80}, but a list is wanted", key)
    if any(not isinstance(span, Mapping) for span in spans or ()):
        raise RecordError(f"spans is {spans!r:.80}, but a list of {{start, end, label}} is wanted", "spans")
    return Target(
        label=None if label is None or label == "" else str(label),
        labels=tuple(map(str, labels)) if labels is not None else None,
        value=_number(raw, "value", None),
        text=None if raw.get("text") is None else str(raw["text"]),
        texts=tuple(map(str, texts)) if texts is not None else None,
        spans=tuple(spans) if spans is not None else None,
    )


def _meta(raw: Any) -> dict[str, str]:
    try:
        return {str(key): str(value) for key, value in dict(raw or {}).items() if value is not None}
    except (TypeError, ValueError) as error:
        raise RecordError(f"meta is {raw!r:.80}, but an object of words is wanted", "meta") from error


def _number(row: Mapping[str, Any], key: str, default: float | None) -> Any:
    value = row.get(key)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{key} is {value!r:.80}, but a number is wanted", key) from error
    if not math.isfinite(number):
        raise RecordError(f"{key} is {value!r:.80}, but a finite number is wanted", key)
    return number
