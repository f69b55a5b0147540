"""Sources: how a command names one, and how rows of any of them become records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.choose import choose
from jobs.sources.delimited import Delimited
from jobs.sources.jsonl import JsonLines
from jobs.sources.table import Table


def _rows(table: Table) -> list[GoodRow | BadRow]:
    return list(table.rows(workers=1))


def test_media_are_checked_and_decoded(
    tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    (tmp_path / "ok.png").write_bytes(make_png())
    (tmp_path / "cut.png").write_bytes(make_png(size=(64, 64), format="BMP")[:5000])
    (tmp_path / "cut.flac").write_bytes(make_wav(format="FLAC")[:2000])
    (tmp_path / "long.wav").write_bytes(make_wav(seconds=61.0, rate_hz=8000))
    base: dict[str, Any] = {"text": "?", "label": "a"}
    extra: list[dict[str, Any]] = [
        {"image": "ok.png"},
        {"image": "cut.png"},
        {"audio": "cut.flac"},
        {"audio": "long.wav"},
        {"image": "gone.png"},
        {"image": "data:image/png;base64,!!"},
        {"label": None},
        {"task": "regress"},
        {"text": "\ud800"},
        {"task": "tag", "spans": [{"start": "x", "end": 1, "label": "L"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(base | more) for more in extra))
    rows = _rows(Table(JsonLines(file)))
    reasons = [row.reason if isinstance(row, BadRow) else "" for row in rows]
    assert reasons == [
        "", "image damaged", "audio damaged", "audio over a limit", "image cannot be read", "image cannot be read",
        "no label", "value cannot be read", "does not fit the schema", "span cannot be read",
    ]  # fmt: skip
    good = rows[0]
    assert isinstance(good, GoodRow)
    assert good.record.images[0].bytes == make_png()
    assert good.record.messages[0].content == "<image> ?"
    bad = rows[4]
    assert isinstance(bad, BadRow)
    assert (bad.number, bad.id, bad.raw) == (5, "rows-5", base | {"image": "gone.png"})
    assert "gone.png" in bad.message


def test_columns_are_renamed_and_others_kept_for_slices(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer,label,shop,note\nwhat?,yes,old,north," + "x" * 300 + "\n")
    table = Table(Delimited(file), columns={"text": "question", "label": "answer"}, group_by="shop")
    (row,) = _rows(table)
    assert isinstance(row, GoodRow)
    assert row.record.target.label == "yes"
    assert row.record.messages[0].content == "what?"
    assert row.record.meta == {"shop": "north", "group": "north"}


def test_the_answer_that_was_named_is_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,mood,value,labels,target\nwhat?,good,3,a|b,7\n")
    table = Table(Delimited(file), columns={"text": "question", "label": "mood"})
    [row] = [row for row in table.rows(workers=1) if isinstance(row, GoodRow)]
    target = row.record.target
    assert (target.label, target.value, target.labels) == ("good", None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": {"text": "qestion"}}, "'qestion' (--map text=qestion); it has question, answer; the nearest is"),
        ({"columns": {"text": "question", "id": "answer"}}, "no column 'label' (the right answer: one of label,"),
        ({"columns": {"label": "answer"}}, "no column 'text' (what is asked"),
        ({"columns": {"label": "answer", "text": "question"}, "group_by": "shop"}, "no column 'shop' (--group-by)"),
        ({"columns": {"lable": "answer"}}, "'lable' is no field of a record: did you mean 'label'?"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\na,b\n")
    with pytest.raises(SourceError, match=re.escape(words)):
        Table(Delimited(file), **options)


def test_two_rows_with_one_id(tmp_path: Path) -> None:
    for name, ids in (("a.jsonl", (1, 2)), ("b.jsonl", (3, 2))):
        (tmp_path / name).write_text("\n".join(json.dumps({"id": id, "text": "t", "label": "l"}) for id in ids))
    with pytest.raises(SourceError, match=r"two rows have the id '2': .*a.jsonl row 2 and .*b.jsonl row 2"):
        Table(JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "b.jsonl", "test-"))


def test_splits_that_a_source_names(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    splits = ["train", "VAL", "dev", "testing", "", "holdout"]
    file.write_text("\n".join(json.dumps({"text": "t", "label": "l", "split": split}) for split in splits))
    table = Table(JsonLines(file))
    assert table.splits == {"train", "validation", "test"}
    found = [row.record.split if isinstance(row, GoodRow) else row.reason for row in _rows(table)]
    assert found == ["train", "validation", "validation", "test", "unknown split", "unknown split"]
    with pytest.raises(SourceError, match="leave out --test"):
        Table(JsonLines(file), JsonLines(file, "test-"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("jsnol:x", "did you mean jsonl:PATH?"),
        ("easyvqa", "did you mean easy_vqa?"),
        ("csv", "did you mean csv:PATH?"),
        ("csv:not/there.csv", "not/there.csv does not exist"),
    ],
)
def test_a_source_that_is_not_known(storage: Path, source: str, words: str) -> None:
    with pytest.raises(SourceError, match=re.escape(words)):
        choose(source)


def test_relative_paths_are_below_the_root(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=f"did you mean {re.escape(str(tmp_path / 'rows.csv'))}"):
        choose("csv:rows.csv")


def test_the_task_is_the_commands_the_rows_or_what_the_answers_are(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "t", "label": "4", "value": 4}, {"text": "t", "label": "5", "value": "", "task": "classify:stars"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    tasks = [row.record.task for row in _rows(Table(JsonLines(file))) if isinstance(row, GoodRow)]
    assert tasks == ["regress", "classify:stars"]
    forced = [row.record for row in _rows(Table(JsonLines(file), task="regress")) if isinstance(row, GoodRow)]
    assert [(record.task, record.target.value) for record in forced] == [("regress", 4.0), ("regress", 5.0)]


def test_one_file_is_of_one_task_unless_its_rows_say_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [{"text": "Anna", "spans": [[0, 4, "PER"]]} for _ in range(3)]
    file.write_text("\n".join(map(json.dumps, [*rows, {"text": "Anna", "label": "x"}, {"text": "x", "spans": []}])))
    found = _rows(Table(JsonLines(file)))
    assert [row.reason if isinstance(row, BadRow) else row.record.task for row in found] == [
        "tag", "tag", "tag", "no spans", "tag",
    ]  # fmt: skip


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("classify", {"text": "", "label": "a"}, "empty text", "the row's text: empty"),
    ("classify", {"text": " \n", "label": "a"}, "empty text", "nothing to answer"),
    ("classify", {"text": "t", "label": None}, "no label", "the row has no label"),
    ("classify", {"text": "t", "label": float("nan")}, "label cannot be read", "a finite number is wanted"),
    ("regress", {"text": "t", "value": float("nan")}, "value cannot be read", "a finite number is wanted"),
    ("regress", {"text": "t", "value": "Infinity"}, "value cannot be read", "a finite number is wanted"),
    ("regress", {"text": "t", "value": ""}, "no value", "no value"),
    ("multilabel", {"text": "t"}, "no labels", "no labels"),
    ("tag", {"text": "Ann", "spans": [[0, 4, "P"]]}, "span outside the text", "0..4, but the text has 3 characters"),
    ("tag", {"text": "Ann", "spans": [[2, 2, "P"]]}, "empty span", "2..2"),
    ("tag", {"text": "Ann Lee", "spans": [[0, 7, "P"], [4, 7, "Q"]]}, "overlapping spans", "(P: 'Ann Lee') and 4..7"),
    ("tag", {"text": "Ann", "spans": "[[0, 3"}, "span cannot be read", "begins like JSON"),
    ("relate", {"text": "A b", "label": "r", "spans": [[0, 1, "head"]]}, "no head and tail", "the row has ['head']"),
    ("relate", {"text": "A b", "label": "r"}, "no head and tail", "the row has none"),
    ("match", {"text": "t", "label": "0", "candidates": []}, "no candidates", "no candidates"),
    ("match", {"text": "t", "candidates": ["a"]}, "no right candidate", "says of none"),
    ("match", {"text": "t", "label": "2", "candidates": ["a", "b"]}, "label cannot be read", "0 to 1"),
    ("generate", {"text": "t", "answer": ""}, "no answer", "no answer"),
    ("extract", {"text": "?", "context": "abc", "answers": {"text": ["x"], "answer_start": [0]}},
     "answer not at its place", "is 'a', but the answers are ('x',)"),
    ("extract", {"text": "?", "context": "abc", "answers": ["x"]}, "answer not in the text", "none of"),
    ("classify", {"messages": [{"role": "user", "content": "<image> ?"}], "label": "a"}, "image cannot be read",
     "hold 1 <image> placeholders, but images has 0 entries"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "row", "reason", "words"), BAD)
def test_a_bad_target_costs_its_row_and_says_why(
    tmp_path: Path, task: str, row: dict[str, Any], reason: str, words: str
) -> None:
    file = tmp_path / "rows.jsonl"
    answers: dict[str, None] = dict.fromkeys(("label", "labels", "value", "spans", "answer", "answers"))
    file.write_text(json.dumps({"text": "t", **answers}) + "\n" + json.dumps(row))
    found = _rows(Table(JsonLines(file), task=task))[-1]
    assert isinstance(found, BadRow)
    assert found.reason == reason
    assert words in found.message
