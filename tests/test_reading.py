"""What a view leaves out is counted, however the text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmagent import text
from mmagent.reading import Reader
from mmagent.record import Record
from mmagent.rows import parse

LONG = "the shape " * 10 + "is red"  # 22 tokens, and the two of the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone: Path) -> Any:
    return text.load_tokenizer(str(tiny_backbone))


def record(words: str, **more: Any) -> Record:
    return parse({"text": words, **more}, default_id="1")


@pytest.mark.parametrize("soft", [{}, {"image": 4}], ids=["output", "input"])
def test_of_a_whole_text(tokenizer: Any, soft: dict[str, int]) -> None:
    reader = Reader(tokenizer, 8, soft=soft)
    assert [reader.whole(record(words)).cut for words in (LONG, "is red")] == [24 - 8, 0]


def test_of_a_text_beside_a_candidate(tokenizer: Any) -> None:
    reader = Reader(tokenizer, 12)
    assert reader.beside(LONG, "no", 0).cut == 22 + 1 + 3 - 12
    assert reader.beside(LONG, "", 0).cut == 24 - 12
    assert reader.beside("is it?", "no", 0).cut == 0


def test_of_a_question_over_a_text_in_strides(tokenizer: Any) -> None:
    """The text is never cut, it is read in strides; of the question the end is kept, and counted once."""
    messages = [{"role": "context", "content": LONG}, {"role": "user", "content": "is " * 10 + "red"}]
    views = Reader(tokenizer, 16).strides(parse({"messages": messages}, default_id="1"))
    assert len(views) > 1
    assert [view.cut for view in views] == [11 - 8, *[0] * (len(views) - 1)]


def test_characters_of_a_text_with_emoji_are_its_own(tokenizer: Any) -> None:
    """Where signs are set apart for the tokenizer, offsets still count in the text as it is."""
    words = "😀 red😂😂blue"
    [view] = Reader(tokenizer, 16).strides(record(words))
    assert view.offsets is not None
    assert [words[start:end] for start, end in view.offsets.tolist() if start >= 0] == ["😀", "red", "😂😂", "blue"]
