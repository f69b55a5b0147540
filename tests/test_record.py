"""Records: placeholders that never shift, rows of users, and the way through Arrow and back."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmagent.record import (
    SCHEMA,
    Media,
    Message,
    Record,
    RecordError,
    Target,
    compose,
    escape,
    parse,
    segments,
)


def _words(dice: random.Random) -> str:
    pieces = ("<image>", "<audio>", "\\", "\\\\", "<", "image", ">", " ", "a", "ü", "\n", "<Image>", "<video>")
    return "".join(dice.choice(pieces) for _ in range(dice.randrange(12)))


def test_escaped_text_reads_back_as_it_was() -> None:
    dice = random.Random(0)
    for _ in range(3000):
        text = _words(dice)
        assert list(segments(escape(text))) == ([("text", text)] if text else []), text


def test_composed_parts_read_back_as_they_were() -> None:
    dice = random.Random(1)
    for _ in range(3000):
        parts: list[tuple[str, str]] = []
        for _ in range(dice.randrange(6)):
            kind = dice.choice(("text", "image", "audio"))
            words = (_words(dice) or "x") if kind == "text" else ""
            if kind == "text" and parts and parts[-1][0] == "text":
                parts[-1] = ("text", parts[-1][1] + words)
            else:
                parts.append((kind, words))
        assert list(segments(compose(parts))) == parts


def test_text_that_ends_in_a_backslash_does_not_swallow_the_picture_after_it() -> None:
    content = compose([("text", "C:\\"), ("image", ""), ("text", "<image>")])
    assert [kind for kind, _ in segments(content)] == ["text", "image", "text"]


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


@pytest.mark.parametrize(
    ("form", "path"),
    [
        (lambda data: data, None),
        (lambda data: base64.b64encode(data).decode(), None),
        (lambda data: "data:image/png;base64," + base64.b64encode(data).decode(), None),
        (lambda data: {"bytes": data, "path": "a.png"}, "a.png"),
        (lambda data: {"bytes": base64.b64encode(data).decode()}, None),
    ],
)
def test_forms_of_media(make_png: Callable[..., bytes], form: Callable[[bytes], Any], path: str | None) -> None:
    noisy = make_png(size=(16, 16)) + bytes(range(256)) * 8  # long enough that base64 cannot be a path
    assert parse({"image": form(noisy), "label": "x"}).images == (Media(noisy, path),)


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


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would end this process
    with pytest.raises(RecordError, match="max_media_bytes is 1000"):
        parse({"text": "x", "image": "big.png"}, root=tmp_path, max_media_bytes=1000)


def test_through_arrow_and_back() -> None:
    record = Record(
        id="1",
        messages=(
            Message("user", "find it"),
            Message("assistant", "", ({"id": "c1", "name": "search", "arguments": "{}"},)),
            Message("tool", "found", (), "c1"),
        ),
        images=(Media(b"abc", "a.png"),),
        audios=(Media(None, "a.wav"),),
        target=Target("l", ("a", "b"), 1.5, "t", ("u",), ({"start": 0, "end": 2, "label": "x"},)),
        split="train",
        weight=0.5,
        meta={"form": "text"},
        origin="here",
        created_ms=5,
    )
    table = pa.Table.from_pylist([record.to_row()], SCHEMA)
    assert Record.from_row(table.to_pylist()[0]) == record
