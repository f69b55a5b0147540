"""What users said of answers, read from the segments that the service writes, and made training records.

    feedback/segments/DAY.REPLICA.jsonl     one line each: verdict, right answer, and the question as a record

A line that was cut off by a crash is no feedback: nobody was told that it was taken. One that was written twice counts
once. A line that says ``deleted`` takes back all that was said of an answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmagent import storage, targets, written
from mmagent.record import Message, Record, Target, escape
from mmagent.targets import TargetError, kind

SOURCE = "feedback"  # a record's meta source
DELETED = "deleted"
FIELD_OF = {
    "classify": "label", "relate": "label", "match": "label", "multilabel": "labels", "regress": "value",
    "generate": "text", "extract": "text", "tag": "spans",
}  # fmt: skip  # where a right answer stands, by the kind of its task


@dataclass(frozen=True, slots=True)
class Said:
    """One piece of feedback."""

    id: str
    created_ms: int
    key: str  # whose it is
    says: str  # right, wrong or other
    content: Mapping[str, Any]  # as it was sent
    answered: Mapping[str, Any]  # the trace of the answer
    question: Record | None  # as far as the policy kept it


@dataclass(frozen=True, slots=True)
class Log:
    """All that was said, the oldest first."""

    said: tuple[Said, ...]
    torn: int  # lines that cannot be read
    deleted: frozenset[str]  # answers of which nothing may be used any more


def folder() -> Path:
    return storage.root() / "feedback" / "segments"


def read(place: Path) -> Log:
    """The feedback of a folder of segments; none where there is no such folder."""
    storage.refresh(place)
    found: dict[str, Said] = {}
    torn, deleted = 0, set()
    for file in sorted(place.glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if row["says"] == DELETED:
                    deleted.add(str(row["answer"]))
                    continue
                found.setdefault(row["id"], _said(row))
            except (ValueError, KeyError, TypeError):
                torn += 1
    kept = (each for each in found.values() if each.content.get("answer") not in deleted)
    return Log(tuple(sorted(kept, key=lambda each: (each.created_ms, each.id))), torn, frozenset(deleted))


def _said(row: Mapping[str, Any]) -> Said:
    question = None if row["record"] is None else Record.from_row(restored(row["record"]))
    return Said(row["id"], int(row["created_ms"]), row["key"], row["says"], row["feedback"], row["answered"], question)


def id_of(key: str, content: Mapping[str, Any]) -> str:
    """The same for the same words of the same key: what is sent twice is one piece of feedback."""
    named = json.dumps([key, content], sort_keys=True, ensure_ascii=False)
    return "fb_" + hashlib.blake2b(named.encode(), digest_size=8).hexdigest()


def plain(value: Any) -> Any:
    """Bytes as base64, so that JSON can hold a record's row."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def restored(value: Any) -> Any:
    """What `plain` made, as it was."""
    if isinstance(value, dict):
        if set(value) == {"base64"}:
            return base64.b64decode(value["base64"])
        return {key: restored(item) for key, item in value.items()}
    return [restored(item) for item in value] if isinstance(value, list) else value


def record(said: Said) -> Record:
    """The question with the answer that is right by what was said: a row to train on.

    Raises:
        TargetError: the question was not kept, no right answer was said, or it is none for the task.
    """
    if said.question is None:
        raise TargetError("question not kept", "the policy kept no question of this answer")
    asked, content = said.question, said.content
    told = {key: content[key] for key in ("label", "labels", "text", "spans", "value") if content.get(key) is not None}
    if shown := content.get("demonstration"):
        asked, told = _demonstrated(asked, shown), {}
        if kind(asked.task) != "generate":
            raise TargetError("demonstration", f"a demonstration teaches generate, but the task is {asked.task}")
    elif said.says == "right":
        told = _as_answered(said.answered.get("understood") or {})
        asked = replace(asked, target=_target(asked, told, stored=True))
    elif not told:
        raise TargetError("no right answer", "it says that the answer is wrong, but not what is right")
    else:
        asked = replace(asked, target=_target(asked, told, stored=False))
    meta = {**asked.meta, "source": SOURCE, "key": said.key, "feedback": said.id, "answer": str(content.get("answer"))}
    made = replace(asked, id=said.id, meta=meta, origin=SOURCE, split=None, created_ms=said.created_ms)
    targets.check(made)
    return made


def _as_answered(understood: Mapping[str, Any]) -> dict[str, Any]:
    """The answer that was given, in the fields of feedback."""
    keys = ("label", "labels", "value", "text", "spans")
    return {key: understood[key] for key in keys if understood.get(key) is not None}


def _target(asked: Record, told: Mapping[str, Any], *, stored: bool) -> Target:
    """The right answer in the fields that the task reads; what it was asked with (head and tail) stays.

    Args:
        stored: whether spans count characters as a record stores them; else of the words as the client wrote them.
    """
    found, was = kind(asked.task), asked.target
    spans = [_placed(asked, span, stored=stored) for span in told.get("spans") or ()]
    if found in ("classify", "relate"):
        return replace(was, label=told.get("label"))
    if found == "multilabel":
        labels = told.get("labels", [told["label"]] if "label" in told else None)
        return replace(was, labels=None if labels is None else tuple(labels))
    if found == "regress":
        return replace(was, value=told.get("value"))
    if found == "match":
        return replace(was, labels=_chosen(asked, told))
    if found == "tag":
        return replace(was, spans=tuple(spans) if "spans" in told else None)
    if found == "extract":
        return _extracted(asked, told, spans)
    return replace(was, text=told.get("text"))


def _placed(asked: Record, span: Mapping[str, Any], *, stored: bool) -> dict[str, Any]:
    start, end = int(span["start"]), int(span["end"])
    if not stored:
        wording = written.of(asked.messages[targets.spanned(asked)])
        if not 0 <= start < end <= len(wording.words):
            raise TargetError(
                "span outside the text", f"a span is {start}..{end}, but the text has {len(wording.words)} characters"
            )
        start, end = wording.stored(start), wording.stored(end - 1) + 1
    return {"start": start, "end": end, "label": span.get("label") or ""}


def _chosen(asked: Record, told: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Candidates by their index, or by their words."""
    said = told.get("labels", [told["label"]] if "label" in told else None)
    if said is None:
        return None
    words = {str(each.get("content")): str(index) for index, each in enumerate(asked.candidates)}
    return tuple(words.get(each, each) for each in said)


def _extracted(asked: Record, told: Mapping[str, Any], spans: list[dict[str, Any]]) -> Target:
    """Places in the context, or words that stand there; an empty text says that there is no answer."""
    content = asked.messages[targets.spanned(asked)].content
    text = told.get("text")
    if not spans and text:
        place = content.find(escape(text))
        if place < 0:
            raise TargetError("answer not in the text", f"the right answer {text!r:.80} does not stand in the text")
        spans = [{"start": place, "end": place + len(escape(text)), "label": ""}]
    if not spans and text is None:
        return replace(asked.target, texts=None)
    return replace(asked.target, texts=tuple(targets.words_of(content, each) for each in spans), spans=tuple(spans))


def _demonstrated(asked: Record, shown: list[Mapping[str, Any]]) -> Record:
    """The conversation as it should have gone: its last answer is what is to be written."""
    messages = [Message(each["role"], _plain(each.get("content"))) for each in shown]
    if not messages or messages[-1].role != "assistant":
        raise TargetError("demonstration", "a demonstration ends with the assistant's answer, but this one does not")
    before = tuple(replace(each, content=escape(each.content)) for each in messages[:-1])
    return replace(asked, messages=before, images=(), audios=(), target=Target(text=messages[-1].content))


def _plain(content: Any) -> str:
    """The words of a message of a chat."""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise TargetError("demonstration", "a demonstration of pictures or sound cannot be learned from yet")
        return " ".join(part["text"] for part in content)
    return str(content or "")
