"""The queue of questions to label, as files: JSONL, CSV, Label Studio; written, and read back with labels."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent import feedback, storage
from mmagent.answer import Answer
from mmagent.record import Record
from mmagent.targets import kind

FORMATS = ("jsonl", "csv", "label-studio")
_COLUMN_OF = {"text": "text_answer"}  # the question's own words have the column text
_FIELDS = ("label", "labels", "value", "text_answer", "spans")
_SUFFIXES = {
    b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg",
}  # fmt: skip


class QueueError(ValueError):
    """A queue that cannot be read back; names the row."""


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, and the trace of the answer."""

    answer: str
    told: Mapping[str, Any]
    record: Record


def write(
    chosen: Sequence[tuple[Question, Answer]], scores: Sequence[float], file: Path, form: str | None = None
) -> None:
    """Writes a queue, with its media in a folder beside it, and keeps its questions, to know them when labels come."""
    rows = [_row(each, answer, score, file) for (each, answer), score in zip(chosen, scores, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    kind_of = form or ("csv" if file.suffix == ".csv" else "jsonl")
    if kind_of == "csv":
        with open(file, "w", newline="", encoding="utf-8") as out:
            names = list(dict.fromkeys(name for row in rows for name in row)) or ["answer"]
            writer = csv.DictWriter(out, names)
            writer.writeheader()
            writer.writerows(rows)
    elif kind_of == "label-studio":
        tasks = [{"data": row, "predictions": [_predicted(row)]} for row in rows]
        storage.publish(file, json.dumps(tasks, ensure_ascii=False, indent=1) + "\n")
    else:
        storage.publish(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for each, _ in chosen:
        told = {"answer": each.answer, "trace": dict(each.told), "record": feedback.plain(each.record.to_row())}
        storage.publish_json(_held() / f"{each.answer}.json", told)


def _row(each: Question, answer: Answer, score: float, file: Path) -> dict[str, Any]:
    words = " ".join(text for what, text in each.record.segments() if what == "text").strip()
    row: dict[str, Any] = {
        "answer": each.answer, "task": each.record.task, "text": words, "answered": answer.words,
        "confidence": round(answer.confidence, 4), "score": round(score, 4),
    }  # fmt: skip
    media = file.with_name(f"{file.name}.media")
    for name, found in (("image", each.record.images), ("audio", each.record.audios)):
        for number, part in enumerate(found):
            place = media / f"{each.answer}.{name}{number}{_suffix(part.read())}"
            storage.publish(place, part.read())
            row[f"{name}{number or ''}"] = str(place)
    field = feedback.FIELD_OF[kind(each.record.task)]
    return row | {_COLUMN_OF.get(field, field): ""}


def _suffix(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for mark, suffix in _SUFFIXES.items() if data.startswith(mark)), ".bin")


def _predicted(row: Mapping[str, Any]) -> dict[str, Any]:
    """What Label Studio shows beforehand."""
    shown = {"from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": [row["answered"]]}}
    return {"model_version": "mmagent", "score": row["confidence"], "result": [shown]}


def take(file: Path, key: str) -> tuple[int, int, int]:
    """Writes a queue's labels as feedback of a key: how many, how many were known, how many rows have none.

    Raises:
        QueueError: a row that cannot be read, or is of no queue that was made here.
    """
    known = {each.id for each in feedback.read(feedback.folder()).said}
    lines, left, again = [], 0, 0
    for number, row in enumerate(_labelled(file), 1):
        content = _content(row, number)
        if content is None:
            left += 1
            continue
        asked = _held() / f"{Path(content['answer']).name}.json"
        if not asked.is_file():
            raise QueueError(f"{file}, row {number}: {content['answer']!r:.80} is of no queue that was made here")
        line = _line(json.loads(asked.read_text()), content, key)
        again += line["id"] in known
        lines.append(line)
    fresh = [line for line in lines if line["id"] not in known]
    if fresh:
        place = feedback.folder() / f"{time.strftime('%Y-%m-%d', time.gmtime())}.select-{time.time_ns()}.jsonl"
        storage.publish(place, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in fresh))
    return len(fresh), again, left


def _held() -> Path:
    return storage.folder("select", "asked")


def _line(told: Mapping[str, Any], content: Mapping[str, Any], key: str) -> dict[str, Any]:
    id = feedback.id_of(key, content)
    return {
        "id": id, "created_ms": int(time.time() * 1000), "key": key, "says": "wrong", "feedback": dict(content),
        "answered": told["trace"], "record": told["record"],
    }  # fmt: skip


def _labelled(file: Path) -> Iterator[Mapping[str, Any]]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".csv":
        yield from csv.DictReader(text.splitlines())
        return
    if text.lstrip().startswith("["):
        yield from (_of_label_studio(task) for task in json.loads(text))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise QueueError(f"{file}, line {number}: not JSON: {error}") from error


def _of_label_studio(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task as Label Studio exports it, with its first annotation."""
    row = dict(task.get("data") or {})
    results = next((each.get("result") or [] for each in task.get("annotations") or ()), [])
    field = next((name for name in _FIELDS if name in row), "label")
    spans = []
    for result in results:
        value = result.get("value") or {}
        if choices := value.get("choices"):
            row[field] = "|".join(choices) if field == "labels" else choices[0]
        elif "number" in value:
            row["value"] = value["number"]
        elif "labels" in value and "start" in value:
            spans.append({"start": value["start"], "end": value["end"], "label": value["labels"][0]})
        elif text := value.get("text"):
            row["text_answer"] = " ".join(text) if isinstance(text, list) else text
    if spans:
        row["spans"] = spans
    return row


def _content(row: Mapping[str, Any], number: int) -> dict[str, Any] | None:
    """The feedback of a row; none where it has no answer."""
    answer = str(row.get("answer") or "")
    if not answer:
        raise QueueError(f"row {number} has no answer id: the column answer of the queue is wanted")
    found = {name: row.get(name) for name in _FIELDS if row.get(name) not in (None, "", [])}
    if not found:
        return None
    name, value = next(iter(found.items()))
    try:
        made: Any = {
            "label": lambda: str(value),
            "labels": lambda: [part.strip() for part in str(value).split("|")] if isinstance(value, str) else value,
            "value": lambda: float(value),  # type: ignore[arg-type]
            "text_answer": lambda: str(value),
            "spans": lambda: json.loads(value) if isinstance(value, str) else value,
        }[name]()
    except ValueError as error:
        raise QueueError(f"row {number}: {name} is {value!r:.60}: {error}") from error
    return {"answer": answer, "text" if name == "text_answer" else name: made}
