"""Users' rows: short and long, and what is wrong with them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmagent.record import Media, RecordError, Target
from mmagent.rows import parse


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
        ({"text": "x", "labels": "a"}, "a list is wanted"),
        ({"text": "x", "target": "red"}, "an object such as"),
        ({"text": "x", "weight": "heavy"}, "a number is wanted"),
        ({"text": "x", "weight": float("nan")}, "a finite number"),
        ({"text": "x", "meta": 3}, "meta"),
    ],
)
def test_what_cannot_become_a_record(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=words.replace("[", r"\[").replace("(", r"\(")):
        parse(row, root=tmp_path)
