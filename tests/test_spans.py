"""Spans of characters, from tags, marks and the forms users have."""

from __future__ import annotations

import pytest

from mmagent import spans
from mmagent.record import RecordError


@pytest.mark.parametrize(
    "tags",
    [
        "O B-PER I-PER O B-LOC B-LOC",  # B-I-O
        "O B-PER E-PER O S-LOC S-LOC",  # BIOES
        "O B-PER L-PER O U-LOC U-LOC",  # BILOU
        "O I-PER I-PER O I-LOC B-LOC",  # IOB1: a B only where two spans of a type touch
    ],
)
def test_every_scheme_names_the_same_spans(tags: str) -> None:
    text, found = spans.of_tags("then Ann Lee saw Rome Paris".split(), tags.split())
    assert text == "then Ann Lee saw Rome Paris"
    assert [(text[span["start"] : span["end"]], span["label"]) for span in found] == [
        ("Ann Lee", "PER"), ("Rome", "LOC"), ("Paris", "LOC"),
    ]  # fmt: skip


def test_tags_that_break_off() -> None:
    words = "a b c d e f".split()
    for tags, wanted in (
        ("I-X I-Y O PER PER O", ["a X", "b Y", "d e PER"]),  # a change of type; bare types
        ("B-X-Y I-X-Y _ O E-Z O", ["a b X-Y", "e Z"]),
        ("E-X I-X O O O B-X", ["a X", "b X", "f X"]),
    ):
        text, found = spans.of_tags(words, tags.split())
        assert [f"{text[span['start'] : span['end']]} {span['label']}" for span in found] == wanted
    with pytest.raises(RecordError, match="6 words, but 1 tags"):
        spans.of_tags(words, ["O"])


def test_marks() -> None:
    text, found = spans.of_marks("[E1]Ann[/E1] and <tail>Bo</tail> or <e9>")
    assert text == "Ann and Bo or <e9>"
    assert found == [{"start": 0, "end": 3, "label": "head"}, {"start": 8, "end": 10, "label": "tail"}]
    assert spans.of_marks("</e1> plain")[1] == []


def test_what_counts_as_a_tag() -> None:
    assert all(map(spans.is_tag, ("O", "B-PER", "I-a-b", "S-X", "U-X")))
    assert not any(map(spans.is_tag, ("PER", "B-", "-X", "well")))


def test_spans_move_with_their_text() -> None:
    span: spans.Span = {"start": 2, "end": 5, "label": "L"}
    assert spans.moved(span, [], 3) == {"start": 5, "end": 8, "label": "L"}
    assert spans.moved(span, [(1, 1), (2, 1), (5, 1)], 0) == {"start": 3, "end": 7, "label": "L"}
