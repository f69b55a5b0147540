"""The predictor: answers in any Python process, from short rows, and errors that name the row and the part."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmagent import Predictor
from mmagent.batch import PartError
from mmagent.record import Record, RecordError

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle, device="cpu")


def test_short_rows_are_answered(predictor: Predictor, make_png: Any, make_wav: Any, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(make_png("red"))
    rows: list[dict[str, Any]] = [
        {"text": "what color is the shape?", "image": str(tmp_path / "red.png")},
        {"text": "what color is the shape?", "image": base64.b64encode(make_png("red", (300, 300), "BMP")).decode()},
        {"text": "what color is the shape?", "image": f"data:image/png;base64,{base64.b64encode(make_png()).decode()}"},
        {"audio": make_wav(format="FLAC")},
        {"text": "hm?"},
        {"messages": [{"role": "user", "content": "<image> hm?"}], "images": [make_png()]},
    ]
    answers = predictor.predict(rows)
    assert len(answers) == len(rows)
    for answer in answers:
        assert (answer.task, answer.bundle) == ("classify", "tiny")
        assert set(answer.probabilities) == set(predictor.labels)
        chances = list(answer.probabilities.values())
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert answer.label == next(iter(answer.probabilities))
        assert answer.confidence == pytest.approx(chances[0], abs=1e-6)
        assert answer.abstained == (answer.confidence < 0.5)
        assert answer.timings_ms["forward"] > 0
    assert answers[0].probabilities == pytest.approx(answers[2].probabilities)  # by path or inline
    assert answers[0].to_dict()["label"] == answers[0].label


def test_batches_change_no_answer(predictor: Predictor, make_records: Callable[..., list[Record]]) -> None:
    records = make_records(10)
    whole = predictor.predict(records)
    for size in (1, 3):
        parts = predictor.predict(iter(records), batch_size=size)
        for one, other in zip(whole, parts, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert predictor.predict([]) == []


def test_in_bfloat16_it_says_the_same_less_finely(
    predictor: Predictor, tiny_bundle: Path, make_records: Callable[..., list[Record]]
) -> None:
    half, records = Predictor.load(tiny_bundle, device="cpu", precision="bf16"), make_records(10)
    off = 0.0
    for one, other in zip(predictor.predict(records), half.predict(records), strict=True):
        assert other.probabilities == pytest.approx(one.probabilities, abs=0.03)
        off = max(off, *(abs(other.probabilities[label] - chance) for label, chance in one.probabilities.items()))
    assert off > 1e-6, "it computed in fp32"
    samples = [half.prepare(record) for record in records]
    for of in ("embed", "features"):
        found, known = getattr(half, of)(samples), getattr(predictor, of)(samples)
        assert found.dtype == np.float32
        assert np.abs(found - known).max() < 0.05 * np.abs(known).max()
    for states in half.states(samples):
        assert all(each.dtype == np.float32 for each in states.values())


@pytest.mark.parametrize(
    ("row", "kind", "field", "words"),
    [
        ({"text": "hm?", "image": b"no picture"}, PartError, "images[0]", "row 1: images[0]: not a picture"),
        ({"text": "hm?", "images": ["PNG", b"no"]}, PartError, "images[1]", "row 1: images[1]: not a picture"),
        ({"audio": b"RIFF no sound at all"}, PartError, "audios[0]", "row 1: audios[0]: "),
        ({"text": "hm?", "image": "data:image/png;base64,@@@"}, RecordError, "image", "not valid base64"),
        ({"text": "hm?", "image": {"bytes": "@@@"}}, RecordError, "image", "row 1: image is not valid base64"),
        ({"text": "hm?", "image": "nowhere.png"}, RecordError, "image", "row 1: image: cannot read the file nowhere"),
        ({"label": "red"}, RecordError, None, "row 1: the row has the columns ['label', 'task']"),
        ({"text": "hm?", "image": "HUGE"}, PartError, "images[0]", "max_image_pixels"),
        ({"audio": "LONG"}, PartError, "audios[0]", "max_audio_s"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    predictor: Predictor, make_png: Any, make_wav: Any, row: dict[str, Any], kind: type[ValueError], field: str | None,
    words: str,
) -> None:  # fmt: skip
    media = {"PNG": make_png(), "HUGE": make_png(size=(1200, 1000)), "LONG": make_wav(seconds=5.5)}

    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(item) for item in value]
        return media.get(value, value) if isinstance(value, str) else value

    with pytest.raises(kind) as error:
        predictor.predict([{"text": "hm?"}, {key: real(value) for key, value in row.items()}])
    assert str(error.value).startswith("row 1: ")
    assert words in str(error.value)
    assert error.value.field == field  # type: ignore[attr-defined]
    assert getattr(error.value, "too_large", False) == ("max_" in words)


def test_checking_reads_headers_only(predictor: Predictor, make_png: Any) -> None:
    cut = make_png("red", (60, 60), "BMP")[:200]  # the header of a picture without its pixels
    record = Record("1", (), images=())
    predictor.check(record)
    from mmagent.record import Media, Message

    torn = Record("2", (Message("user", "<image>"),), images=(Media(cut),))
    predictor.check(torn)
    with pytest.raises(PartError) as error:
        predictor.prepare(torn)
    assert error.value.field == "images[0]"


def test_features_of_each_part_stand_side_by_side(predictor: Predictor, make_png: Any, make_wav: Any) -> None:
    from mmagent.rows import parse

    rows = [{"text": "hm?", "image": make_png("red")}, {"text": "hm?", "audio": make_wav()}, {"text": "hm?"}]
    found = predictor.features([predictor.prepare(parse(row)) for row in rows])
    assert found.shape == (3, 32 * 3)
    np.testing.assert_allclose(found[0, :32], found[2, :32], atol=1e-5)
    assert [bool(found[index, 32:64].any()) for index in range(3)] == [True, False, False]
    assert [bool(found[index, 64:].any()) for index in range(3)] == [False, True, False]


def test_before_training_it_answers_too(predictor: Predictor, make_records: Callable[..., list[Record]]) -> None:
    infos = {name: task.info for name, task in predictor.tasks.items()}
    fresh, again = (Predictor.untrained(predictor.config, infos, "classify", device="cpu") for _ in range(2))
    records = make_records(8)
    assert [a.probabilities for a in fresh.predict(records)] == [a.probabilities for a in again.predict(records)]
    assert (predictor.task, predictor.modalities) == ("classify", ("text", "image", "audio"))
    assert predictor.limits.max_audio_s == 5.0


PLAIN = """
import sys

class Without:
    # A finder that finds nothing of these: as if they were not installed.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "deepspeed", "fastapi", "starlette", "uvicorn", "jobs", "serve"}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in ("ray", "deepspeed", "fastapi"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} could be imported: this test proves nothing")

from mmagent import Predictor

bundle, picture, sound = sys.argv[1:]
answers = Predictor.load(bundle, threads=1).predict(
    [{"text": "what color is the shape?", "image": picture}, {"audio": sound, "image": picture}, {"text": "hm?"}]
)
print([(answer.label, round(answer.confidence, 4)) for answer in answers])
"""


def test_it_answers_in_a_plain_process_without_ray_deepspeed_or_fastapi(
    predictor: Predictor, tiny_bundle: Path, make_png: Any, make_wav: Any, tmp_path: Path
) -> None:
    picture, sound = tmp_path / "a.png", tmp_path / "a.wav"
    picture.write_bytes(make_png("blue"))
    sound.write_bytes(make_wav())
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tiny_bundle), str(picture), str(sound)],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    here = predictor.predict(
        [
            {"text": "what color is the shape?", "image": str(picture)},
            {"audio": str(sound), "image": str(picture)},
            {"text": "hm?"},
        ]
    )
    assert run.stdout.strip().splitlines()[-1] == str([(a.label, round(a.confidence, 4)) for a in here])
