"""A user's row made a record: the long form (``messages``, ``target``) or the short one (``text``, ``image``,
``audio``, ``context``, and the columns of the right answer, see `mmagent.truth`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmagent import spans, truth
from mmagent.attachments import attached, unpacked
from mmagent.record import ROLES, Message, Record, RecordError, Target, escape, escapes, segments
from mmagent.targets import TargetError, infer, kind, spanned

INPUTS = ("messages", "text", "image", "images", "audio", "audios", "tokens")


def parse(
    row: Mapping[str, Any],
    *,
    root: Path | None = None,
    default_id: str = "",
    origin: str = "",
    max_media_bytes: int | None = None,
) -> Record:
    """Makes a record of a user's row. Media may be a path relative to `root`, base64, a data URI, raw bytes, or
    ``{"bytes", "path"}``; files are read here, so that a shard stands alone, but none above `max_media_bytes`. A row
    with more media than placeholders gets the missing ones in front of its last user message.

    A row's spans count characters of its ``context``, or else of its ``text``, as the user wrote it; in the long form,
    of the message's content as it stands. A row that names no task is of the kind that its answer is of.

    Raises:
        RecordError: what is missing or cannot be read, and where.
    """
    task = _task(row)
    row = _unfolded(row, task)
    messages = _messages_of(row)
    images = attached(row, "image", root, max_media_bytes)
    audios = attached(row, "audio", root, max_media_bytes)
    target, candidates = _answer(row, task, root, max_media_bytes)
    made = Record(
        id=default_id if row.get("id") in (None, "") else str(row["id"]),
        split=str(row["split"]) if row.get("split") not in (None, "") else None,
        task=task or infer(target, candidates=bool(candidates)) or "classify",
        messages=_place(messages, images=len(images), audios=len(audios)),
        images=images,
        audios=audios,
        candidates=candidates,
        weight=_weight(row),
        meta=_meta(row.get("meta")),
        origin=str(row.get("origin") or origin),
    )
    return replace(made, target=_placed(target, row, messages, made))


def guess(row: Mapping[str, Any]) -> str | None:
    """The kind of task that a row's answer is of; None: it has no answer that can be read."""
    readable = dict(row)
    for column in ("value", "labels", "spans", "answers"):  # a column of such a name may mean something else
        try:
            truth.answer_of({column: row.get(column)})
        except RecordError:
            del readable[column]
    try:
        found = truth.answer_of(_unfolded(readable, None))
    except RecordError:
        return None
    return infer(found, candidates=row.get("candidates") not in (None, "", []))


def _task(row: Mapping[str, Any]) -> str | None:
    task = str(row.get("task") or "").strip()
    try:
        return task if task and kind(task) else None
    except TargetError as error:
        raise RecordError(str(error), "task") from error


def _unfolded(row: Mapping[str, Any], task: str | None) -> Mapping[str, Any]:
    """Tokens and their tags, and a relation's marks in the text, as a text and spans."""
    if row.get("tokens") not in (None, ""):
        tokens, tags = _tokens(row["tokens"]), row.get("tags")
        if tags in (None, ""):
            return {**row, "text": " ".join(tokens)} if row.get("text") in (None, "") else row
        text, found = spans.of_tags(tokens, _tokens(tags))
        return {**row, "text": text, "spans": found}
    related = kind(task) == "relate" if task else row.get("label") not in (None, "")
    if related and all(row.get(column) in (None, "") for column in ("spans", "target", "messages")):
        column = "context" if row.get("context") not in (None, "") else "text"
        text, found = spans.of_marks(str(row.get(column) or ""))
        if task or len(found) == 2:
            return {**row, column: text, "spans": found} if found else row
    return row


def _tokens(raw: Any) -> list[str]:
    """Words in a list, or in a text with spaces between them."""
    raw = unpacked(raw, "tokens")
    if isinstance(raw, str):
        return raw.split()
    if not isinstance(raw, Sequence) or isinstance(raw, bytes):
        raise RecordError(f"tokens and tags are lists of words, but one is {raw!r:.80}", "tokens")
    return [str(word) for word in raw]


def _answer(
    row: Mapping[str, Any], task: str | None, root: Path | None, limit: int | None
) -> tuple[Target, tuple[Mapping[str, Any], ...]]:
    target = truth.answer_of(row, task)
    candidates = truth.candidates_of(row, root, limit)
    if candidates and (task is None or kind(task) == "match"):
        labels = truth.chosen(target, row["candidates"], candidates)
        target = replace(target, label=None, labels=labels)
    return target, candidates


def _placed(target: Target, row: Mapping[str, Any], before: tuple[Message, ...], made: Record) -> Target:
    """The target with its spans counted as the record's messages are stored; where answers are to be found in a context
    and only their words are given, with the place of each that occurs there."""
    long = row.get("messages") not in (None, "")
    index = spanned(made)
    ahead = len(made.messages[index].content) - len(before[index].content)
    if target.spans:
        raw = "" if long else str(row.get("context") or row.get("text") or "")
        marks = escapes(raw)
        return replace(target, spans=tuple(spans.moved(dict(span), marks, ahead) for span in target.spans))
    if kind(made.task) == "extract" and target.texts and target.spans is None:
        content = made.messages[index].content
        found = ((content.find(words), words) for words in map(escape, target.texts))
        places = tuple({"start": at, "end": at + len(words), "label": None} for at, words in found if at >= 0 and words)
        return replace(target, spans=places or None)
    return target


def _weight(row: Mapping[str, Any]) -> float:
    found: float = truth.number(row, "weight", 1.0)
    if found < 0:
        raise RecordError(
            f"weight is {found:g}, but 0 or more is wanted: how much the row counts in training. A column that means "
            "something else wants another name",
            "weight",
        )
    return found


def _messages_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if row.get("messages") not in (None, ""):
        return _messages(unpacked(row["messages"], "messages"))
    if not any(row.get(key) not in (None, "") for key in INPUTS):
        raise RecordError(
            f"the row has the columns {sorted(row)}, but none of messages, text, image or audio holds anything; "
            "rename columns with --map text=COLUMN,image=COLUMN,audio=COLUMN,label=COLUMN"
        )
    asked = Message("user", escape(truth.one(row, "text") or ""))
    context = truth.one(row, "context")
    return (asked,) if context is None else (Message("context", escape(context)), asked)


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
    parts = [part for message in messages for part, _ in segments(message.content)]
    missing = ""
    for part, count in (("image", images), ("audio", audios)):
        seen = parts.count(part)
        if seen > count:
            raise RecordError(
                f"the messages hold {seen} <{part}> placeholders, but {part}s has {count} entries; "
                f"write \\<{part}> where the words themselves are meant",
                f"{part}s",
            )
        missing += f"<{part}>" * (count - seen)
    if not missing:
        return messages
    last = max(index for index, message in enumerate(messages) if message.role == "user")
    content = messages[last].content
    changed = replace(messages[last], content=f"{missing} {content}" if content else missing)
    return (*messages[:last], changed, *messages[last + 1 :])


def _meta(raw: Any) -> dict[str, str]:
    try:
        return {str(key): str(value) for key, value in dict(raw or {}).items() if value is not None}
    except (TypeError, ValueError) as error:
        raise RecordError(f"meta is {raw!r:.80}, but an object of words is wanted", "meta") from error
