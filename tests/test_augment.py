"""Augmentation: what it may change, that it is a function of seed, epoch and sample, that it does nothing unasked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mmagent import text
from mmagent.augment import Words, augment, drop_words
from mmagent.batch import Processed, Sample
from mmagent.config import AugmentConfig, Config, resolve
from mmagent.order import sample_rng
from mmagent.reading import View
from mmagent.record import Message, Record

SOUND: dict[str, Any] = {"audio_tempo": 0.2, "audio_pitch": 0.1, "audio_noise": 0.3, "audio_masks": 2}
PICTURE: dict[str, Any] = {"image_crop": 0.4, "image_flip": 0.5, "image_colour": 0.4}
LOSS: dict[str, Any] = {"image_drop": 0.3, "audio_drop": 0.3, "text_drop": 0.3, "word_drop": 0.3}


@pytest.fixture(scope="module")
def tokenizer(tiny_recipe: dict[str, Any]) -> Any:
    return text.load_tokenizer(resolve(tiny_recipe, {}).model.backbone)


@pytest.fixture(scope="module")
def words(tokenizer: Any) -> Words:
    return Words.of(tokenizer)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)


def full(words: Words, frames: int = 120, name: str = "a") -> Sample:
    """Words, two pictures and a sound."""
    audio = np.random.default_rng(0).standard_normal((frames, 40)).astype(np.float16)
    ids = np.concatenate([words.blank[:1], np.flatnonzero(words.starts & ~words.special)[-12:], words.blank[1:]])
    record = Record(name, (Message("user", "<image><image><audio> hm?"),))
    return Sample(record, (View(ids),), True, (picture(0), picture(1)), (audio,))


def ids(sample: Sample) -> np.ndarray:
    return sample.views[0].ids


def same(a: Sample, b: Sample) -> bool:
    return (
        np.array_equal(ids(a), ids(b))
        and (len(a.images), len(a.audios)) == (len(b.images), len(b.audios))
        and all(map(np.array_equal, a.images, b.images))
        and all(map(np.array_equal, a.audios, b.audios))
    )


# ---------------------------------------------------------------------------------------------- all of it


@pytest.mark.parametrize("asked", [SOUND, PICTURE, LOSS], ids=["sound", "picture", "loss"])
def test_it_is_a_function_of_seed_epoch_and_sample(words: Words, asked: dict[str, Any]) -> None:
    config = AugmentConfig(**asked)

    def seen(seed: int, epoch: int, name: str) -> list[Sample]:
        return [augment(full(words), config, words, sample_rng(seed, epoch, f"{name}{i}")) for i in range(20)]

    first = seen(0, 1, "a")
    assert all(map(same, first, seen(0, 1, "a")))
    for other in (seen(1, 1, "a"), seen(0, 2, "a"), seen(0, 1, "b")):
        assert not all(map(same, first, other))


def test_nothing_is_changed_where_nothing_is_asked(words: Words) -> None:
    sample = full(words)
    assert same(augment(sample, AugmentConfig(), words, np.random.default_rng(0)), sample)
    assert set(Config.model_fields["augment"].default.model_dump().values()) == {0, AugmentConfig().audio_mask_share}


def test_the_rest_of_a_sample_stays(words: Words) -> None:
    sample = replace(full(words), weight=0.5, transcript=np.array([2, 60, 3]))
    kept = [array.copy() for array in (ids(sample), *sample.images, *sample.audios)]
    for seed in range(20):
        changed = augment(sample, AugmentConfig(**SOUND, **PICTURE, **LOSS), words, np.random.default_rng(seed))
        assert (changed.id, changed.weight) == ("a", 0.5)
        assert changed.transcript is sample.transcript
    # What lies in the cache of decoded media is not written to.
    assert all(map(np.array_equal, kept, (ids(sample), *sample.images, *sample.audios)))


# ---------------------------------------------------------------------------------------------- a modality lost


@pytest.mark.parametrize(("field", "part"), [("image_drop", "images"), ("audio_drop", "audios"), ("text_drop", "ids")])
def test_a_modality_is_lost_in_the_share_asked_for(words: Words, field: str, part: str) -> None:
    config = AugmentConfig(**{field: 0.3})
    lost: Counter[str] = Counter()
    for index in range(1000):
        changed = augment(full(words), config, words, sample_rng(0, 0, str(index)))
        lost["images"] += not changed.images
        lost["audios"] += not changed.audios
        lost["ids"] += not changed.has_words
        assert changed.has_words or np.array_equal(ids(changed), words.blank)
    assert lost.pop(part) == pytest.approx(300, abs=60)
    assert not any(lost.values())


def test_the_last_modality_is_never_lost(words: Words) -> None:
    config = AugmentConfig(image_drop=0.9, audio_drop=0.9, text_drop=0.9)
    left: Counter[int] = Counter()
    for seed in range(200):
        changed = augment(full(words), config, words, np.random.default_rng(seed))
        left[changed.has_words + bool(changed.images) + bool(changed.audios)] += 1
    assert left[1] > 100
    assert not left[0]
    alone = replace(full(words), images=(), audios=())
    assert augment(alone, config, words, np.random.default_rng(0)).has_words


# ---------------------------------------------------------------------------------------------- words


def test_words_are_masked_whole_and_special_tokens_stay(tokenizer: Any, words: Words) -> None:
    ids = np.asarray(tokenizer("what color is the unbelievable shape?")["input_ids"])
    pieces = tokenizer.convert_ids_to_tokens(ids)
    inside = [index for index, piece in enumerate(pieces) if piece.startswith("##")]
    assert len(inside) > 5  # "unbelievable" is none of the vocabulary's words
    word = [inside[0] - 1, *inside]
    seen = set()
    for seed in range(60):
        out = drop_words(ids, 0.5, words, np.random.default_rng(seed))
        assert out.shape == ids.shape
        assert (out[[0, -1]] == ids[[0, -1]]).all()
        assert set(out[out != ids]) <= {tokenizer.mask_token_id}
        masked = (out[word] == tokenizer.mask_token_id).tolist()
        assert len(set(masked)) == 1
        seen.add(masked[0])
    assert seen == {True, False}


def test_words_are_masked_in_the_share_asked_for(words: Words) -> None:
    ids = np.resize(np.flatnonzero(words.starts & ~words.special), 4000)
    out = drop_words(ids, 0.25, words, np.random.default_rng(0))
    assert (out != ids).mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("vocabulary", "starts"),
    [
        (["▁a", "b", "▁", "c", "红", "の"], [1, 0, 1, 0, 1, 1]),
        (["Ġa", "b", "çº¢", "Ã©"], [1, 0, 1, 0]),
        (["a", "##b", "c"], [1, 0, 1]),
        (["a", "b"], [1, 1]),
    ],
)
def test_each_kind_of_vocabulary_marks_its_words(vocabulary: list[str], starts: list[int]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate([*vocabulary, "<pad>"])}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(ids, "<pad>")), pad_token="<pad>")
    words = Words.of(made)
    assert words.starts[: len(vocabulary)].tolist() == [bool(value) for value in starts]
    assert words.hidden == ids["<pad>"]  # neither a mask nor an unknown token
    assert words.special.tolist() == [False] * len(vocabulary) + [True]


# ---------------------------------------------------------------------------------------------- pictures


def pictures_of(words: Words, seeds: int, **asked: float) -> list[tuple[np.ndarray, ...]]:
    config = AugmentConfig(**asked)
    return [augment(full(words), config, words, np.random.default_rng(seed)).images for seed in range(seeds)]


def test_pictures_are_mirrored_together_or_not_at_all(words: Words) -> None:
    wanted = [picture(0), picture(1)]
    mirrored = 0
    for images in pictures_of(words, 100, image_flip=0.5):
        flipped = [np.array_equal(image, original[:, ::-1]) for image, original in zip(images, wanted, strict=True)]
        straight = [np.array_equal(image, original) for image, original in zip(images, wanted, strict=True)]
        assert all(flipped) or all(straight)
        mirrored += all(flipped)
    assert mirrored == pytest.approx(50, abs=20)


def test_a_crop_keeps_most_of_the_picture_and_its_size(words: Words) -> None:
    down = np.repeat(np.arange(0, 240, 15, dtype=np.uint8)[:, None], 16, axis=1)  # brighter from row to row
    sample = replace(full(words), images=(np.stack([down, down.T, down], axis=-1),))
    spans = []
    for seed in range(50):
        [image] = augment(sample, AugmentConfig(image_crop=0.4), words, np.random.default_rng(seed)).images
        assert image.shape == (16, 16, 3)
        assert image.dtype == np.uint8
        assert (np.diff(image[..., 0].astype(int), axis=0) >= 0).all()  # still in order
        spans.append((int(image[-1, 0, 0]) - int(image[0, 0, 0])) / 225)
    assert min(spans) >= 0.5
    assert min(spans) < 0.8
    assert max(spans) > 0.9


def test_colours_change_as_pillow_changes_them(words: Words) -> None:
    """Against ImageEnhance, with the same three factors in the same order; Pillow rounds after each."""
    for seed, images in enumerate(pictures_of(words, 20, image_colour=0.3)):
        rng = np.random.default_rng(seed)
        noise_free = replace(full(words), audios=())
        assert noise_free.images[0].dtype == np.uint8
        factors = rng.uniform(0.7, 1.3, 3)
        image = Image.fromarray(picture(0))
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind, factor in zip(kinds, factors, strict=True):
            image = kind(image).enhance(float(factor))
        difference = np.abs(np.asarray(image).astype(int) - images[0].astype(int))
        assert np.median(difference) <= 3  # clipping between the steps moves a few pixels at the ends
        assert images[0].dtype == np.uint8


# ---------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("frames", [1, 2, 7, 120])
def test_augmented_sound_stays_sound(words: Words, frames: int) -> None:
    config = AugmentConfig(**SOUND)
    lengths = set()
    for seed in range(50):
        [audio] = augment(full(words, frames), config, words, np.random.default_rng(seed)).audios
        assert audio.dtype == np.float16
        assert np.isfinite(audio).all()
        assert audio.shape[1] == 40
        lengths.add(len(audio))
    assert min(lengths) >= max(1, 0.8 * frames - 1)
    assert max(lengths) <= max(2, 1.2 * frames + 1)
    assert frames < 7 or len(lengths) > 1


def test_noise_is_as_loud_as_a_waveform_asks_for(words: Words) -> None:
    config = AugmentConfig(audio_noise=0.5)
    wave = np.sin(np.linspace(0, 200, 4000, dtype=np.float32))[:, None]
    for loudness in (0.01, 1.0):
        sample = replace(full(words), audios=(wave * loudness,))
        changed = augment(sample, config, words, sample_rng(0, 0, "a")).audios[0].astype(np.float32)
        assert 0.001 < (changed - wave * loudness).std() / (wave * loudness).std() < 0.6


def test_words_of_a_native_model_are_left_to_its_processor(words: Words) -> None:
    media = (np.zeros((1, 1), np.float32),)
    native = replace(full(words), views=(View(np.zeros(0, np.int64)),), processed=(Processed({}, media),))
    changed = augment(native, AugmentConfig(word_drop=0.9, text_drop=0.9), words, sample_rng(0, 0, "a"))
    assert changed.has_words
    assert len(changed.views[0].ids) == 0
