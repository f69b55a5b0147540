"""From records to tensors: what a sample holds, how samples are stacked, what augmentation may change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from mmagent import text
from mmagent.batch import Inputs, PartError, Sample
from mmagent.config import resolve
from mmagent.reading import View
from mmagent.record import Record
from mmagent.rows import parse
from tests.conftest import classify

LABELS = ("red", "blue")
Make = Callable[..., Inputs]


@pytest.fixture
def make_inputs(tiny_recipe: dict[str, Any]) -> Make:
    """Inputs of the tiny model, with dotted keys replaced."""

    def make(overrides: Mapping[str, Any] | None = None) -> Inputs:
        config = resolve(tiny_recipe, overrides or {})
        return Inputs(config.model, config.data, text.load_tokenizer(config.model.backbone), classify(LABELS))

    return make


def same(a: Sample, b: Sample) -> bool:
    return len(a.images) == len(b.images) and all(map(np.array_equal, a.audios, b.audios))


# ---------------------------------------------------------------------------------------------- one sample


def test_a_sample_of_everything(make_inputs: Make, make_png: Any, make_wav: Any) -> None:
    row = {"id": "7", "text": "is it red?", "image": make_png("red", (40, 20)), "audio": make_wav(seconds=0.5),
           "label": "blue", "weight": 0.5}  # fmt: skip
    sample = make_inputs().sample(parse(row))
    assert (sample.id, sample.weight, sample.has_words) == ("7", 0.5, True)
    [image], [audio] = sample.images, sample.audios
    assert image.shape == (16, 16, 3)
    assert (image == [255, 0, 0]).all()
    assert audio.dtype == np.float16
    assert audio.shape == (51, 40)  # a frame each 10 ms
    assert abs(audio.astype(np.float32).mean()) < 0.01
    assert audio.astype(np.float32).std() == pytest.approx(1, abs=0.02)


def test_a_label_that_is_none_of_the_models_is_no_label(make_inputs: Make) -> None:
    inputs = make_inputs()
    rows = [{"text": "hm?", "label": "blue"}, {"text": "hm?", "label": "purple"}, {"text": "hm?"}]
    batch = inputs.batch([inputs.sample(parse(row)) for row in rows])
    assert batch["classify/label"].tolist() == [1, -100, -100]


def test_a_picture_alone_says_nothing_in_words(make_inputs: Make, make_png: Any) -> None:
    sample = make_inputs().sample(parse({"image": make_png()}))
    assert not sample.has_words
    assert len(sample.views[0].ids) >= 1


def test_tokens_made_before_are_taken(make_inputs: Make) -> None:
    inputs = make_inputs()
    record = parse({"text": "is it red?"})
    made = View(inputs.tokenize([text.words(record)])[0], cut=3)
    sample = inputs.sample(record, made)
    assert sample.views == (made,)
    assert sample.cut == 3
    np.testing.assert_array_equal(inputs.sample(record).views[0].ids, made.ids)


def test_the_encoding_of_a_sound_does_not_matter(make_inputs: Make, make_wav: Any) -> None:
    inputs = make_inputs()
    wav, flac, fast = (
        inputs.sample(parse({"audio": make_wav(300.0, 1.0, **how)})).audios[0].astype(np.float32)
        for how in ({}, {"format": "FLAC"}, {"rate_hz": 44_100})
    )
    np.testing.assert_allclose(wav, flac, atol=0.05)  # the two round to 16 bits differently
    assert wav.shape == fast.shape
    # Another rate is resampled: the tone's bin is loudest all the same.
    assert wav.mean(0).argmax() == fast.mean(0).argmax()


def test_pitch_is_heard(make_inputs: Make, make_wav: Any) -> None:
    inputs = make_inputs()
    loudest = [
        int(inputs.sample(parse({"audio": make_wav(hz)})).audios[0].astype(np.float32).mean(0).argmax())
        for hz in (200.0, 800.0, 3200.0)
    ]
    assert loudest == sorted(set(loudest))


def test_sound_is_heard_up_to_the_models_length(make_inputs: Make, make_wav: Any) -> None:
    inputs = make_inputs({"model.audio.max_s": 1.0})
    assert len(inputs.sample(parse({"audio": make_wav(seconds=3.0)})).audios[0]) == 101
    assert len(inputs.sample(parse({"audio": make_wav(seconds=0.001)})).audios[0]) >= 1


def test_the_words_spoken_are_kept_where_the_model_is_taught_by_them(make_inputs: Make, make_wav: Any) -> None:
    spoken = parse({"audio": make_wav(), "meta": {"transcript": "is the shape red"}})
    assert make_inputs().sample(spoken).transcript is None
    taught = make_inputs({"model.audio.align": 1.0})
    transcript = taught.sample(spoken).transcript
    assert transcript is not None
    assert taught.tokenizer.decode(transcript, skip_special_tokens=True) == "is the shape red"
    batch = taught.batch([taught.sample(spoken), taught.sample(parse({"audio": make_wav()}))])
    assert batch["transcript_mask"].sum(1).tolist() == [len(transcript), 0]


@pytest.mark.parametrize(
    ("row", "place", "words", "too_large"),
    [
        ({"image": b"no picture"}, "images[0]", "images[0]: not a picture", False),
        ({"images": ["PNG", b"no picture"]}, "images[1]", "images[1]: not a picture", False),
        ({"audio": b"RIFF no sound"}, "audios[0]", "audios[0]: ", False),
        ({"image": "HUGE"}, "images[0]", "max_image_pixels", True),
        ({"audio": "LONG"}, "audios[0]", "max_audio_s", True),
    ],
)
@pytest.mark.parametrize("step", ["check", "sample"])
def test_a_part_that_cannot_be_used_is_named(
    make_inputs: Make, make_png: Any, make_wav: Any, step: str, row: dict, place: str, words: str, too_large: bool
) -> None:
    media = {"PNG": make_png(), "HUGE": make_png(size=(2000, 1000), format="BMP"), "LONG": make_wav(seconds=6.0)}

    def real(value: Any) -> Any:
        return [real(item) for item in value] if isinstance(value, list) else media.get(value, value)

    record = parse({key: real(value) for key, value in row.items()})
    with pytest.raises(PartError) as error:
        getattr(make_inputs(), step)(record)
    assert (error.value.field, error.value.too_large) == (place, too_large)
    assert words in str(error.value)


@pytest.mark.parametrize("step", ["check", "sample"])
def test_a_model_without_a_tower_refuses_its_kind(make_inputs: Make, make_png: Any, make_wav: Any, step: str) -> None:
    for kind, data in (("image", make_png()), ("audio", make_wav())):
        inputs = make_inputs({f"model.{kind}": None})
        with pytest.raises(PartError, match="this model takes no") as error:
            getattr(inputs, step)(parse({"text": "hm?", kind: data}))
        assert error.value.field == f"{kind}s[0]"


@pytest.mark.parametrize("cache_mb", [0, 256])
def test_threads_may_prepare_the_same_media(
    make_inputs: Make, make_records: Callable[..., list[Record]], cache_mb: int
) -> None:
    inputs = make_inputs({"data.cache_mb": cache_mb})
    records = make_records(16)
    wanted = [make_inputs({"data.cache_mb": 0}).sample(record) for record in records]
    wrong: list[str] = []

    def work() -> None:
        for record, sample in zip(records, wanted, strict=True):
            made = inputs.sample(record)
            if not (same(made, sample) and all(map(np.array_equal, made.images, sample.images))):
                wrong.append(record.id)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (inputs.sample(records[0]).images[0] is inputs.sample(records[0]).images[0]) == (cache_mb > 0)


def test_the_cache_of_media_keeps_its_size(make_inputs: Make, make_png: Any) -> None:
    inputs = make_inputs({"data.cache_mb": 1, "model.image.size": 256})  # five pictures of 192 KiB
    records = [parse({"image": make_png((index, 0, 0))}) for index in range(6)]
    first = inputs.sample(records[0]).images[0]
    assert inputs.sample(records[0]).images[0] is first
    for record in records[1:]:
        inputs.sample(record)
    assert inputs.sample(records[0]).images[0] is not first


# ---------------------------------------------------------------------------------------------- a batch


def test_a_mixed_batch_says_what_belongs_where(make_inputs: Make, make_png: Any, make_wav: Any) -> None:
    inputs = make_inputs()
    red, blue, short, long = make_png("red"), make_png("blue"), make_wav(seconds=0.1), make_wav(seconds=0.5)
    rows: list[dict[str, Any]] = [
        {"text": "hm?"},
        {"text": "is it red?", "images": [red, blue]},
        {"image": blue, "audios": [short, long]},
    ]
    batch = inputs.batch([inputs.sample(parse({**row, "label": "red"})) for row in rows])
    assert batch["has_words"].tolist() == [True, True, False]
    assert batch["images"].shape == (3, 3, 16, 16)
    assert batch["images"][:, :, 0, 0].tolist() == [[1, -1, -1], [-1, -1, 1], [-1, -1, 1]]
    assert (batch["image_row"].tolist(), batch["image_slot"].tolist()) == ([1, 1, 2], [0, 1, 0])
    assert (batch["audio_row"].tolist(), batch["audio_slot"].tolist()) == ([2, 2], [0, 1])
    assert batch["image_real"].all()
    assert (int(batch["image_slots"]), int(batch["audio_slots"])) == (2, 2)
    assert batch["audio_frames"].tolist() == [11, 51]
    assert not batch["audios"][0, 11:].any()
    assert batch["mask"].sum(1).tolist() == [len(inputs.tokenize([t])[0]) for t in ("hm?", "is it red?", "")]
    assert (batch["ids"][batch["mask"] == 0] == inputs.tokenizer.pad_token_id).all()
    assert batch["classify/label"].tolist() == [0, 0, 0]


def test_a_batch_of_words_has_stand_ins(make_inputs: Make) -> None:
    inputs = make_inputs()
    batch = inputs.batch([inputs.sample(parse({"text": "hm?"}))] * 2)
    assert (len(batch["images"]), len(batch["audios"])) == (1, 1)
    assert batch["image_real"].tolist() == batch["audio_real"].tolist() == [False]
