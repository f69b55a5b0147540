"""What training sees and hears in place of a sample: words masked, sounds and pictures changed, a modality lost.

Every function draws from the generator it is given, which is made of (seed, epoch, sample id) and nothing else (see
`mmagent.order.sample_rng`): a run that was stopped and goes on sees the same. Validation never comes here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mmagent.batch import Sample
from mmagent.config import AugmentConfig
from mmagent.reading import PLACES, View, without

_MARKS = ("▁", "Ġ")  # how SentencePiece and byte-level vocabularies mark a token that begins a word
_ONE_SIGN_WORDS = ("\u3040", "\u9fff")  # kana and Chinese characters: scripts without spaces
_FIRST_BYTES = "ãäåæçèé"  # as byte-level vocabularies write the first byte of those scripts


@dataclass(frozen=True, slots=True)
class Words:
    """What of a tokenizer word dropout needs."""

    starts: np.ndarray  # (vocabulary,) bool: the token begins a word
    special: np.ndarray  # (vocabulary,) bool: the token stands for no part of a text
    hidden: int  # stands in place of a token: the mask, or where there is none the unknown or padding token
    blank: np.ndarray  # (tokens,) int64: an empty text

    @classmethod
    def of(cls, tokenizer: Any) -> Words:
        tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        starts = np.array(_starts(tokens), dtype=bool)
        special = np.zeros(len(tokens), dtype=bool)
        special[[index for index in tokenizer.all_special_ids if index < len(tokens)]] = True
        stand_ins = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
        hidden = next(int(index) for index in stand_ins if index is not None)
        blank = tokenizer([""])["input_ids"][0] or [tokenizer.pad_token_id]
        return cls(starts, special, hidden, np.asarray(blank, dtype=np.int64))


def _starts(tokens: list[str]) -> list[bool]:
    """Which tokens of a vocabulary begin a word, by the marks it uses; each does where it uses none."""
    if any(token.startswith("##") for token in tokens):
        return [not token.startswith("##") for token in tokens]
    if any(token.startswith(_MARKS) for token in tokens):
        low, high = _ONE_SIGN_WORDS
        bytewise = any(token.startswith("Ġ") for token in tokens)
        return [
            token.startswith(_MARKS)
            or low <= token[:1] <= high
            or (bytewise and token[:1] in _FIRST_BYTES and token != "")
            for token in tokens
        ]
    return [True] * len(tokens)


def augment(sample: Sample, config: AugmentConfig, words: Words, rng: np.random.Generator) -> Sample:
    """A sample as training gets it (see `AugmentConfig`). A modality is lost only where another is left."""
    audios = sample.audios
    if config.audio_tempo or config.audio_pitch or config.audio_noise or config.audio_masks:
        audios = tuple(_sound(audio, config, rng) for audio in audios)
    sample = replace(sample, audios=audios, images=_pictures(sample.images, config, rng))
    if sample.images and (sample.has_words or sample.audios) and rng.random() < config.image_drop:
        sample = replace(sample, images=(), views=tuple(without(view, PLACES["image"]) for view in sample.views))
    if sample.audios and (sample.has_words or sample.images) and rng.random() < config.audio_drop:
        sample = replace(sample, audios=(), views=tuple(without(view, PLACES["audio"]) for view in sample.views))
    of_text = any(view.offsets is not None or sample.record.candidates for view in sample.views)  # it asks of its words
    if sample.rendered:  # its words are a native model's processor's
        return sample
    if sample.has_words and not of_text and (sample.images or sample.audios) and rng.random() < config.text_drop:
        sample = replace(sample, views=tuple(_silent(view, words) for view in sample.views), has_words=False)
    if sample.has_words and config.word_drop:
        views = (replace(view, ids=drop_words(view.ids, config.word_drop, words, rng)) for view in sample.views)
        sample = replace(sample, views=tuple(views))
    return sample


def _silent(view: View, words: Words) -> View:
    """A view without its words; pictures and sounds that have a place among them keep it."""
    media = view.ids < 0
    if not media.any():
        return replace(view, ids=words.blank)
    return replace(view, ids=view.ids[media | words.special[view.ids]])


def drop_words(ids: np.ndarray, share: float, words: Words, rng: np.random.Generator) -> np.ndarray:
    """Masks a share of a text's words, each with all its tokens; the others keep their places. ids: (tokens,)."""
    text = (ids >= 0) & ~words.special[ids]  # what is below is the place of a picture or sound
    number = np.cumsum(words.starts[ids] & text)  # of the word each token belongs to; 0 before the first mark
    dropped = rng.random(int(number[-1]) + 1) < share
    return np.where(dropped[number] & text, words.hidden, ids)


def _pictures(
    images: tuple[np.ndarray, ...], config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Crops and recolours each picture, (height, width, 3) uint8, and mirrors all of a sample's or none."""
    mirrored = config.image_flip > 0 and bool(images) and rng.random() < config.image_flip
    out = []
    for image in images:
        if config.image_crop:
            image = _crop(image, config.image_crop, rng)
        if config.image_colour:
            image = _recolour(image, config.image_colour, rng)
        out.append(np.ascontiguousarray(image[:, ::-1]) if mirrored else image)
    return tuple(out)


def _crop(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Cuts up to a share off each side's length, somewhere, and scales what is left to the picture's size."""
    sizes = np.array(image.shape[:2])
    kept = np.maximum(1, np.round(sizes * (1 - rng.uniform(0, share, 2)))).astype(int)
    top, left = (int(rng.integers(0, room + 1)) for room in sizes - kept)
    part = Image.fromarray(image[top : top + kept[0], left : left + kept[1]])
    return np.asarray(part.resize((image.shape[1], image.shape[0]), Image.Resampling.BILINEAR), dtype=np.uint8)


def _recolour(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, then contrast around the picture's mean grey, then saturation around each pixel's grey (luma of
    ITU-R BT.601), each by its own factor."""
    bright, contrast, saturation = rng.uniform(1 - share, 1 + share, 3)
    x = image.astype(np.float32) * bright
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    middle = (x @ luma).mean()
    x = middle + (x - middle) * contrast
    grey = (x @ luma)[..., None]
    return np.clip(np.round(grey + (x - grey) * saturation), 0, 255).astype(np.uint8)


def _sound(frames: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """frames: (frames, mels), or (samples, 1) of a waveform. Changes speed by resampling the frames, the speaker's
    pitch and tract by shifting and stretching the mel axis (vocal tract length perturbation, Jaitly & Hinton 2013),
    adds noise, masks stripes."""
    x = frames.astype(np.float32)
    if config.audio_tempo:
        length = max(2, round(len(x) * (1 + rng.uniform(-config.audio_tempo, config.audio_tempo))))
        x = _resample(x, np.linspace(0, len(x) - 1, length))
    if config.audio_pitch:
        bins = x.shape[1]
        shift = rng.uniform(-config.audio_pitch, config.audio_pitch) * bins
        stretch = 1 + rng.uniform(-config.audio_pitch, config.audio_pitch)
        x = _resample(x.T, np.clip(np.arange(bins) * stretch + shift, 0, bins - 1)).T
    if config.audio_noise:
        loudness = x.std() if x.shape[1] == 1 else 1.0  # of a waveform; features are of one size already
        x = x + rng.standard_normal(x.shape, dtype=np.float32) * rng.uniform(0, config.audio_noise) * loudness
    for axis in (0, 1) * config.audio_masks:
        width = int(rng.uniform(0, config.audio_mask_share) * x.shape[axis])
        start = rng.integers(0, x.shape[axis] - width + 1)
        x[(slice(start, start + width), slice(None)) if axis == 0 else (slice(None), slice(start, start + width))] = 0
    return x.astype(np.float16)


def _resample(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of x (rows, columns) at fractional places, linearly between neighbours."""
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, len(x) - 1)
    part = (at - low)[:, None].astype(np.float32)
    return x[low] * (1 - part) + x[high] * part
