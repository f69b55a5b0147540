"""Where a client's characters stand in a record."""

from __future__ import annotations

from mmagent.record import escapes, segments
from mmagent.spans import moved
from mmagent.written import Wording


def test_every_place_is_found_in_both_directions() -> None:
    wording = Wording()
    wording.add_mark("image")
    wording.add_words("is \\<image> or <audio> red\\")
    wording.add_mark("audio")
    wording.add_words("<image>?")
    assert [kind for kind, _ in segments(wording.content)] == ["image", "text", "audio", "text"]
    assert wording.words == "is \\<image> or <audio> red\\ <image>?"
    for place in range(len(wording.words) + 1):
        assert wording.written(wording.stored(place)) == place
    for place, letter in enumerate(wording.words):
        assert wording.content[wording.stored(place)] in (letter, "\\")
    assert wording.stored(len(wording.words)) == len(wording.content)


def test_places_are_those_of_rows_of_a_file() -> None:
    text = "a <image> red <audio>"
    wording = Wording()
    wording.add_mark("image")
    wording.add_words(text)
    for start in range(len(text)):
        span = moved({"start": start, "end": len(text)}, escapes(text), len("<image> "))
        assert (wording.stored(start), wording.stored(len(text))) == (span["start"], span["end"])


def test_nothing_written() -> None:
    wording = Wording()
    wording.add_words("")
    wording.add_mark("image")
    assert (wording.content, wording.words, wording.stored(0), wording.written(5)) == ("<image>", "", 0, 0)
