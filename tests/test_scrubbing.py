"""Personal data taken out of records by a function: every text of them; media stay, spans keep their places."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from jobs import cleaning, scrubbing
from mmagent.config import ConfigError
from mmagent.feedback import Said
from mmagent.record import Message, Record, Target
from mmagent.rows import parse


def stars(text: str) -> str:
    return re.sub(r"Smith|\d{4,}", lambda found: "*" * len(found[0]), text)


def shorter(text: str) -> str:
    return text.replace("Smith", "X")


def test_every_text_is_scrubbed_and_media_stay() -> None:
    record = Record("r", (Message("user", r"<image>I am Smith, \<image> 12345"),), task="generate",
                    target=Target(text="hello Smith"))  # fmt: skip
    found = scrubbing.scrubbed(record, stars)
    assert list(found.segments()) == [("image", ""), ("text", "I am *****, <image> *****")]
    assert found.target.text == "hello *****"


def test_candidates_too() -> None:
    record = parse({"text": "who?", "task": "match", "candidates": ["Smith", "no one"]})
    assert [each["content"] for each in scrubbing.scrubbed(record, stars).candidates] == ["*****", "no one"]


def test_spans_keep_their_places_or_the_row_is_set_aside() -> None:
    record = parse({"text": "Smith lives in Paris", "task": "tag"})
    record = replace(record, target=Target(spans=({"start": 15, "end": 20, "label": "city"},)))
    found = scrubbing.scrubbed(record, stars)
    assert found.messages[0].content[15:20] == "Paris"
    content = {"answer": "a", "spans": [{"start": 15, "end": 20, "label": "city"}]}
    said = Said("f1", 1, "k", "wrong", content, {}, replace(record, target=Target()))
    made, aside = cleaning.offers([said], shorter)
    assert (made, [each.reason for each in aside]) == ([], ["cannot be scrubbed"])


def test_an_answer_in_a_text_is_what_the_text_says_now() -> None:
    record = parse({"context": "call Smith now", "text": "whom?", "task": "extract"})
    record = replace(record, target=Target(texts=("Smith",), spans=({"start": 5, "end": 10, "label": ""},)))
    assert scrubbing.scrubbed(record, stars).target.texts == ("*****",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "MODULE:FUNCTION is wanted"),
        ("no.such.module:x", "No module named"),
        ("jobs.scrubbing:nothing", "has no attribute"),
        ("jobs.scrubbing:__name__", "but a function of a text is wanted"),
    ],
)
def test_a_function_that_is_none_is_told(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        scrubbing.load(name)


def test_a_function_is_found_by_its_name() -> None:
    assert scrubbing.load("tests.test_scrubbing:stars")("Smith") == "*****"
