"""SQuAD's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.choose import choose
from mmagent.targets import spanned, words_of

CONTEXT = "Beyoncé rose to fame in the late 1990s as lead singer of <image>."


def _write(file: Path, questions: list[dict[str, Any]]) -> str:
    paragraphs = [{"context": CONTEXT, "qas": questions}]
    file.write_text(json.dumps({"version": "v2.0", "data": [{"title": "Beyoncé", "paragraphs": paragraphs}]}))
    return f"squad:{file}"


def _answer(text: str) -> dict[str, Any]:
    return {"text": text, "answer_start": CONTEXT.index(text)}


def test_questions_answered_by_the_text_or_not_at_all(tmp_path: Path) -> None:
    answers = [_answer("in the late 1990s"), _answer("late 1990s"), _answer("late 1990s"), _answer("<image>.")]
    questions: list[dict[str, Any]] = [
        {"id": "a", "question": "When?", "answers": answers},
        {"id": "b", "question": "Where?", "answers": [], "is_impossible": True, "plausible_answers": [_answer("fame")]},
    ]
    source = choose(_write(tmp_path / "dev.json", questions))
    first, second = (row.record for row in source.rows(1) if isinstance(row, GoodRow))
    assert (first.id, first.task, first.meta["title"]) == ("a", "extract", "Beyoncé")
    assert [message.role for message in first.messages] == ["context", "user"]
    assert first.target.texts == ("in the late 1990s", "late 1990s", "<image>.")
    content = first.messages[spanned(first)].content
    assert tuple(words_of(content, span) for span in first.target.spans or ()) == first.target.texts
    assert (second.target.texts, second.target.spans) == ((), ())


def test_bad_questions_and_files(tmp_path: Path) -> None:
    shifted = {"id": "a", "question": "When?", "answers": [{"text": "late 1990s", "answer_start": 0}]}
    source = choose(_write(tmp_path / "a.json", [shifted, {"id": "b", "question": "Who?"}]))
    rows = [row for row in source.rows(1) if isinstance(row, BadRow)]
    assert [row.reason for row in rows] == ["answer not at its place", "not SQuAD"]
    assert "question 2: a key is missing" in rows[1].message
    for text, words in (
        ('{\n"data": [,]}', r"a.json line 2: not JSON"),
        ('{"text": "a"}\n{"text": "b"}\n', r"a.json line 2: not JSON: Extra data; .* jsonl:FILE"),
        ("[]", "not as SQuAD writes it"),
        ('{"data": [{"paragraphs": 1}]}', "no list 'paragraphs'"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(SourceError, match=words):
            choose(f"squad:{tmp_path / 'a.json'}")


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        _write(tmp_path / name, [{"id": name, "question": "?", "answers": [_answer("fame")]}])
    source = choose(f"squad:{tmp_path}")
    splits = {row.record.split for row in source.rows(1) if isinstance(row, GoodRow)}
    assert splits == source.splits == {"train", "validation"}
