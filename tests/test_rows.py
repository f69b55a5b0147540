"""Users' rows: short and long, and what is wrong with them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmagent.record import Media, Record, RecordError, Target
from mmagent.rows import guess, parse
from mmagent.targets import spanned, words_of


def test_a_placeholder_that_a_user_typed_is_text(make_png: Callable[..., bytes]) -> None:
    record = parse({"text": "what does <image> mean in <audio>?", "image": make_png(), "label": "x"})
    assert list(record.segments()) == [("image", ""), ("text", " what does <image> mean in <audio>?")]
    assert record.modalities == "text+image"


def test_long_form(tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "17.png").write_bytes(make_png())
    row = {
        "id": 17,
        "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "<image> what colour?"}],
        "images": ["img/17.png"],
        "audios": [base64.b64encode(make_wav()).decode()],
        "target": {"label": "red"},
        "meta": {"key": 1, "none": None},
    }
    record = parse(row, root=tmp_path)
    assert record.id == "17"
    assert record.messages[1].content == "<audio> <image> what colour?"  # the missing one is put in front
    assert record.images == (Media(make_png(), "img/17.png"),)
    assert record.audios == (Media(make_wav()),)
    assert record.target == Target(label="red")
    assert record.meta == {"key": "1"}


def test_ids_labels_and_splits_that_are_not_words() -> None:
    record = parse({"id": 0, "text": "t", "label": False, "split": None, "messages": None}, default_id="never")
    assert (record.id, record.target.label, record.split) == ("0", "False", None)
    assert parse({"text": "t", "label": 3}, default_id="rows-1").id == "rows-1"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?"}, "--map text=COLUMN"),
        ({"messages": "hello"}, "a list of"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": "f"}]}, "tool_calls"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no message of the user"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "1 <image> placeholders"),
        ({"text": "x", "image": "not/there.png"}, "cannot read the file"),
        ({"text": "x", "image": "a\0b.png"}, "cannot read the file"),
        ({"text": "x", "image": "."}, "a file is wanted"),
        ({"text": "x", "image": 7}, "a path, base64"),
        ({"text": "x", "images": 7}, "a list is wanted"),
        ({"text": "x", "audio": "data:audio/wav;base64,a$$b"}, "not valid base64"),
        ({"text": "x", "label": ["a"]}, "one word or number"),
        ({"text": "x", "labels": 7}, "a list, or words between"),
        ({"text": "x", "task": "guess"}, "KIND or KIND:NAME"),
        ({"text": "x", "spans": "Ann"}, "a list of {start, end, label}"),
        ({"text": "x", "spans": [{"start": 0.5, "end": 1}]}, "a whole number of characters"),
        ({"text": "x", "answers": [["a"]]}, "a list of texts"),
        ({"text": "x", "candidates": "a"}, "a list of texts or objects"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words, but 1 tags"),
        ({"text": "x", "target": "red"}, "an object such as"),
        ({"text": "x", "weight": "heavy"}, "a number is wanted"),
        ({"text": "x", "weight": float("nan")}, "a finite number"),
        ({"text": "x", "meta": 3}, "meta"),
        ({"text": {"en": "q"}, "label": "a"}, "text is {'en': 'q'}, but one text is wanted"),
        ({"text": "q", "answer": ["yes", "no"]}, "answer is ['yes', 'no'], but one text is wanted"),
        ({"text": "q", "value": 10**400}, "but a number is wanted"),
        ({"text": "q", "label": "a", "weight": -2}, "weight is -2, but 0 or more is wanted"),
    ],
)
def test_what_cannot_become_a_record(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=words.replace("[", r"\[").replace("(", r"\(")):
        parse(row, root=tmp_path)


def _covered(record: Record) -> list[tuple[str, str | None]]:
    content = record.messages[spanned(record)].content
    return [(words_of(content, span), span["label"]) for span in record.target.spans or ()]


def test_spans_stay_at_their_words_wherever_those_move(make_png: Callable[..., bytes]) -> None:
    """A picture's placeholder comes in front of the text, and what a user typed like one gets a backslash."""
    text = "write <image> to Ann Lee \\\\<audio> now"
    words = ["<image>", "Ann Lee", "now", "Lee \\\\<audio>"]
    spans = [{"start": text.index(word), "end": text.index(word) + len(word), "label": word} for word in words]
    for media in ({}, {"image": make_png()}, {"images": [make_png()] * 2}):
        record = parse({"text": text, "spans": spans, "task": "tag", **media})
        assert _covered(record) == [(word, word) for word in words]
    record = parse({"context": text, "text": "who?", "image": make_png(), "spans": spans, "task": "tag"})
    assert [message.role for message in record.messages] == ["context", "user"]
    assert _covered(record) == [(word, word) for word in words]
    long = {"messages": [{"role": "user", "content": "<image> Ann"}], "images": [make_png()] * 2}
    assert _covered(parse({**long, "spans": [[8, 11, "P"]]})) == [("Ann", "P")]


@pytest.mark.parametrize(
    ("row", "task", "target"),
    [
        ({"label": "a"}, "classify", Target(label="a")),
        ({"labels": ["a", "b", "a"]}, "multilabel", Target(labels=("a", "b"))),
        ({"labels": "a b| c,d"}, "multilabel", Target(labels=("a b", "c,d"))),
        ({"labels": "a; b"}, "multilabel", Target(labels=("a", "b"))),
        ({"labels": "a,b"}, "multilabel", Target(labels=("a", "b"))),
        ({"labels": "", "task": "multilabel"}, "multilabel", Target(labels=())),
        ({"label": "a|b", "task": "multilabel:tags"}, "multilabel:tags", Target(labels=("a", "b"))),
        ({"value": "1.5"}, "regress", Target(value=1.5)),
        ({"label": 3, "task": "regress"}, "regress", Target(value=3.0)),
        ({"label": "a", "value": "n/a", "task": "classify"}, "classify", Target(label="a")),
        ({"answer": "yes"}, "generate", Target(text="yes")),
        ({"answers": ["yes", "yeah"], "task": "generate", "label": "x"}, "generate", Target(texts=("yes", "yeah"))),
        ({"answer": "yes", "task": "classify"}, "classify", Target(label="yes")),
        ({"spans": "[]"}, "tag", Target(spans=())),
        ({"spans": ""}, "classify", Target()),
        ({"spans": {"start": [0], "end": [1], "label": ["P"]}}, "tag",
         Target(spans=({"start": 0, "end": 1, "label": "P"},))),
        ({"tokens": "A b", "tags": ["B-P", "O"]}, "tag", Target(spans=({"start": 0, "end": 1, "label": "P"},))),
    ],
)  # fmt: skip
def test_columns_of_answers(row: dict[str, Any], task: str, target: Target) -> None:
    record = parse(row if "tokens" in row else {"text": "A b", **row})
    assert (record.task, record.target) == (task, target)
    assert record.messages[0].content == "A b"


def test_answers_in_a_context() -> None:
    row: dict[str, Any] = {"context": "Ann met <image> Bo.", "text": "whom?"}
    squad = {"text": ["<image> Bo", "Bo", "Bo"], "answer_start": [8, 16, 16]}
    record = parse({**row, "answers": squad})
    assert record.task == "extract"
    assert record.target.texts == ("<image> Bo", "Bo")
    assert [words for words, _ in _covered(record)] == ["<image> Bo", "Bo"]
    for found in ({"answers": ["Bo", "Cy"]}, {"answer": "Bo"}):  # their place is looked for
        assert _covered(parse({**row, **found, "task": "extract"})) == [("Bo", None)]
    none = parse({**row, "answers": {"text": [], "answer_start": []}})
    assert (none.task, none.target.texts) == ("extract", ())
    assert parse({**row, "answer": "", "task": "extract"}).target.texts == ()


def test_marks_of_a_relation_become_spans() -> None:
    marked = "The <e2>key</e2> lies in the <e1>red box</e1>."
    record = parse({"text": marked, "label": "in(e2,e1)"})
    assert (record.task, record.target.label) == ("relate", "in(e2,e1)")
    assert record.messages[0].content == "The key lies in the red box."
    assert sorted(_covered(record)) == [("key", "tail"), ("red box", "head")]
    assert parse({"text": marked}).messages[0].content == marked  # a question, perhaps on marks
    assert parse({"text": marked, "task": "relate"}).messages[0].content == "The key lies in the red box."


def test_candidates(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(make_png())
    row = {"text": "which?", "candidates": ["no", {"text": "yes", "image": "a.png"}, {"image": "a.png"}, "1"]}
    for answer, indexes in (({"label": "no"}, ("0",)), ({"labels": [2, "yes"]}, ("2", "1")), ({"label": 1}, ("3",))):
        record = parse({**row, **answer}, root=tmp_path)
        assert (record.task, record.target) == ("match", Target(labels=indexes))
    assert [each["content"] for each in record.candidates] == ["no", "<image> yes", "<image>", "1"]
    assert record.candidates[1]["image"] == {"bytes": make_png(), "path": "a.png"}
    assert [media.bytes for media in record.media(("image",))] == [make_png()] * 2
    again = parse(record.to_row())
    assert (again.candidates, again.target.labels) == (record.candidates, ("3",))


def test_what_was_parsed_once_parses_again(make_png: Callable[..., bytes]) -> None:
    spans = [{"start": 0, "end": 1, "label": "P"}]
    for row in ({"label": "a"}, {"labels": ["a"]}, {"value": 1.0}, {"spans": spans}, {"answer": "b"}):
        record = parse({"id": "1", "text": "A <image>", "image": make_png(), **row})
        again = parse(record.to_row())
        assert (again.task, again.target, again.messages) == (record.task, record.target, record.messages)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"label": "a", "value": "abc"}, "classify"),
        ({"label": "a", "value": 3}, "regress"),
        ({"label": "a", "spans": [[0, 1, "head"], [1, 2, "tail"]]}, "relate"),
        ({"label": "a", "spans": "see below"}, "classify"),
        ({"label": "a", "candidates": ["a", "b"]}, "match"),
        ({"answers": {"text": ["t"], "answer_start": [0]}, "context": "t"}, "extract"),
        ({"tokens": ["a"], "tags": ["O"]}, "tag"),
        ({"label": ""}, None),
    ],
)
def test_what_kind_of_task_a_row_is_for(row: dict[str, Any], kind: str | None) -> None:
    assert guess({"text": "t", **row}) == kind
