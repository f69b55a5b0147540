"""What was said of answers, read back and made training rows of every kind of task; torn lines, repeats, deletions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmagent import feedback
from mmagent.feedback import Said
from mmagent.record import Message, Record
from mmagent.rows import parse
from mmagent.targets import TargetError


def line(id: str, record: Record | None, content: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A line as the service writes it."""
    says = content.get("verdict") or ("other" if set(content) <= {"answer", "comment", "score"} else "wrong")
    row = None if record is None else feedback.plain(record.to_row())
    base = {"id": id, "created_ms": 1, "key": "k", "says": says, "feedback": {"answer": f"ans_{id}", **content}}
    return {**base, "answered": {}, "record": row, **more}


def made(row: dict[str, Any], content: dict[str, Any], understood: dict[str, Any] | None = None) -> Record:
    """The training row of feedback on the answer to a row."""
    told = line("x", parse(row), content, answered={"understood": understood or {}})
    return feedback.record(feedback._said(told))


def test_lines_come_back_with_their_media(tmp_path: Path, make_records: Callable[..., list[Record]]) -> None:
    records = make_records(8)
    rows = [line(f"fb_{n}", record, {"label": "red"}, created_ms=9 - n) for n, record in enumerate(records)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[4:], rows[0]]) + '{"id": "torn')
    found = feedback.read(tmp_path)
    assert [each.id for each in found.said] == [f"fb_{n}" for n in reversed(range(8))]  # by time, the repeat once
    assert found.torn == 1
    back = {each.id: feedback.record(each) for each in found.said}
    for n, record in enumerate(records):
        assert back[f"fb_{n}"].images == record.images
        assert back[f"fb_{n}"].audios == record.audios
        assert back[f"fb_{n}"].target.label == "red"
        assert back[f"fb_{n}"].meta["source"] == "feedback"


def test_what_was_deleted_is_gone(tmp_path: Path, make_records: Callable[..., list[Record]]) -> None:
    rows = [line(f"fb_{n}", record, {"label": "red"}) for n, record in enumerate(make_records(2))]
    gone = {"says": "deleted", "answer": "ans_fb_0", "created_ms": 5, "key": "k"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [gone, *rows]))
    found = feedback.read(tmp_path)
    assert [each.id for each in found.said] == ["fb_1"]
    assert found.deleted == {"ans_fb_0"}


def test_no_folder_is_no_feedback(tmp_path: Path) -> None:
    assert feedback.read(tmp_path / "nowhere") == feedback.Log((), 0, frozenset())


TEXT = {"text": "a small town by the sea"}


@pytest.mark.parametrize(
    ("row", "content", "field", "wanted"),
    [
        ({**TEXT, "task": "classify"}, {"label": "town"}, "label", "town"),
        ({**TEXT, "task": "multilabel"}, {"labels": ["sea", "town"]}, "labels", ("sea", "town")),
        ({**TEXT, "task": "multilabel"}, {"label": "sea"}, "labels", ("sea",)),
        ({**TEXT, "task": "regress"}, {"value": 2.5}, "value", 2.5),
        ({**TEXT, "task": "generate"}, {"text": "a harbour"}, "text", "a harbour"),
        ({**TEXT, "task": "match", "candidates": ["one", "two"]}, {"label": "two"}, "labels", ("1",)),
        ({**TEXT, "task": "match", "candidates": ["one", "two"]}, {"labels": ["0"]}, "labels", ("0",)),
    ],
)
def test_a_right_answer_becomes_the_target(
    row: dict[str, Any], content: dict[str, Any], field: str, wanted: Any
) -> None:
    assert getattr(made(row, content).target, field) == wanted


def test_a_right_verdict_teaches_what_was_answered() -> None:
    assert made({**TEXT, "task": "classify"}, {"verdict": "right"}, {"label": "town"}).target.label == "town"


def test_spans_count_the_words_as_they_were_written() -> None:
    """The client's text holds words that look like a placeholder, which a record stores escaped."""
    words = "see <image> in Paris now"
    record = Record("x", (Message("user", r"see \<image> in Paris now"),), task="tag")
    at = words.index("Paris")
    said = Said(
        "f", 1, "k", "wrong", {"answer": "a", "spans": [{"start": at, "end": at + 5, "label": "city"}]}, {}, record
    )
    [span] = feedback.record(said).target.spans or ()
    assert record.messages[0].content[span["start"] : span["end"]] == "Paris"


def test_an_answer_in_a_text_is_found_there_or_is_none() -> None:
    row = {"context": "the sea is near the town", "text": "what is near?", "task": "extract"}
    found = made(row, {"text": "the sea"}).target
    assert (found.texts, [(s["start"], s["end"]) for s in found.spans or ()]) == (("the sea",), [(0, 7)])
    assert made(row, {"text": ""}).target.texts == ()
    with pytest.raises(TargetError, match="does not stand in the text"):
        made(row, {"text": "a lake"})


def test_a_relation_keeps_its_spans() -> None:
    head, tail = {"start": 2, "end": 7, "label": "head"}, {"start": 8, "end": 12, "label": "tail"}
    record = replace(parse({**TEXT}), task="relate")
    record = replace(record, target=replace(record.target, spans=(head, tail)))
    said = Said("f", 1, "k", "wrong", {"answer": "a", "label": "is"}, {}, record)
    made_of = feedback.record(said)
    assert (made_of.target.label, made_of.target.spans) == ("is", (head, tail))


def test_a_demonstration_teaches_its_last_answer() -> None:
    shown = [{"role": "user", "content": "hello <image>"}, {"role": "assistant", "content": "good day"}]
    found = made({**TEXT, "task": "generate"}, {"demonstration": shown})
    assert found.target.text == "good day"
    assert [kind for kind, _ in found.segments()] == ["text"]


@pytest.mark.parametrize(
    ("record", "content", "reason"),
    [
        (None, {"label": "red"}, "question not kept"),
        ({**TEXT, "task": "classify"}, {"verdict": "wrong"}, "no right answer"),
        ({**TEXT, "task": "classify"}, {"comment": "hm"}, "no right answer"),
        ({**TEXT, "task": "classify"}, {"value": 3.0}, "no label"),
        ({**TEXT, "task": "regress"}, {"label": "red"}, "no value"),
        ({**TEXT, "task": "tag"}, {"spans": [{"start": 3, "end": 99, "label": "x"}]}, "span outside the text"),
        ({**TEXT, "task": "match", "candidates": ["a"]}, {"label": "7"}, "no such candidate"),
        ({**TEXT, "task": "classify"}, {"demonstration": [{"role": "assistant", "content": "x"}]}, "demonstration"),
    ],
)
def test_what_is_no_training_row_says_why(record: dict[str, Any] | None, content: dict[str, Any], reason: str) -> None:
    told = line("x", None if record is None else parse(record), content)
    with pytest.raises(TargetError) as error:
        feedback.record(feedback._said(told))
    assert error.value.reason == reason
