"""Records: placeholders that never shift, and the way through Arrow and back."""

from __future__ import annotations

import random

import pyarrow as pa

from mmagent.record import SCHEMA, Media, Message, Record, Target, compose, escape, segments


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
