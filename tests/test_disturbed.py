"""Pictures, sounds and words made worse: by how much, in the same way for everybody, and with spans where they were."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmagent import disturbed
from mmagent.media import Limits
from mmagent.record import Message, Record, Target
from mmagent.rows import parse

LIMITS = Limits()
WORDS = " ".join(f"word{n}" for n in range(400))


def test_a_sound_has_noise_of_the_stated_power(make_wav: Callable[..., bytes]) -> None:
    data = make_wav(seconds=1.0)
    clean, rate_hz = soundfile.read(io.BytesIO(data))
    noisy, same_hz = soundfile.read(io.BytesIO(disturbed.sound(data, np.random.default_rng(0))))
    assert (same_hz, len(noisy)) == (rate_hz, len(clean))
    snr_db = 10 * np.log10((clean**2).mean() / ((noisy - clean) ** 2).mean())
    assert snr_db == pytest.approx(disturbed.SNR_DB, abs=0.2)


def test_a_picture_is_blurred_and_noisy(make_png: Callable[..., bytes]) -> None:
    out = io.BytesIO()
    halves = np.zeros((128, 128, 3), np.uint8)
    halves[:, 64:] = 128
    Image.fromarray(halves).save(out, "PNG")
    made = np.asarray(Image.open(io.BytesIO(disturbed.picture(out.getvalue(), LIMITS, np.random.default_rng(0)))))
    right = made[:, 90:].astype(float)
    assert right.mean() == pytest.approx(128, abs=2)
    assert right.std() == pytest.approx(255 * disturbed.NOISE, rel=0.05)
    edge = made.mean((0, 2))  # by column: the blur's width, 2 pixels of deviation, on both sides of the middle
    assert 20 < edge[62] < 64 < edge[65] < 110


def test_words_are_lost_and_never_all() -> None:
    record = parse({"id": "a", "text": WORDS, "label": "x"})
    made = disturbed.disturbed(record, "text", LIMITS, 0)
    assert made is not None
    left = made.messages[0].content.split()
    assert set(left) < set(WORDS.split())
    assert len(left) == pytest.approx(400 * (1 - disturbed.DROPPED), abs=30)
    for seed in range(40):
        short = disturbed.disturbed(parse({"id": "a", "text": "one two", "label": "x"}), "text", LIMITS, seed)
        assert short is None or short.messages[0].content.strip() in ("one", "two")


def test_placeholders_and_spans_stay_where_they_are(make_png: Callable[..., bytes]) -> None:
    shown = parse({"id": "a", "messages": [{"role": "user", "content": f"<image> {WORDS}"}], "image": make_png()})
    made = disturbed.disturbed(shown, "text", LIMITS, 0)
    assert made is not None
    assert made.messages[0].content.startswith("<image> ")
    place = WORDS.index("word7 word8")
    span = {"start": place, "end": place + 11, "label": "name"}
    tagged = Record("b", (Message("user", WORDS),), task="tag", target=Target(spans=(span,)))
    for seed in range(5):
        thinned = disturbed.disturbed(tagged, "text", LIMITS, seed)
        assert thinned is not None
        assert len(thinned.messages[0].content) == len(WORDS)
        assert thinned.messages[0].content[place : place + 11] == "word7 word8"


def test_the_same_for_one_seed_and_nothing_where_there_is_nothing(
    make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    record = parse({"id": "a", "text": "what is it?", "image": make_png(), "audio": make_wav(), "label": "x"})
    for kind in disturbed.KINDS[:2]:
        once, again, other = (disturbed.disturbed(record, kind, LIMITS, seed) for seed in (0, 0, 1))
        assert once is not None
        assert once == again != other
        assert once.messages == record.messages
    bare = parse({"id": "a", "text": "what is it?", "label": "x"})
    assert disturbed.disturbed(bare, "image", LIMITS, 0) is None
    assert disturbed.disturbed(parse({"id": "a", "image": b"torn", "label": "x"}), "image", LIMITS, 0) is None


def test_candidates_are_made_worse_too(make_png: Callable[..., bytes]) -> None:
    picture = {"bytes": make_png(), "path": None}
    record = Record("a", (Message("user", "which?"),), task="match", candidates=({"content": "", "image": picture},))
    made = disturbed.disturbed(record, "image", LIMITS, 0)
    assert made is not None
    assert made.candidates[0]["image"]["bytes"] != picture["bytes"]
