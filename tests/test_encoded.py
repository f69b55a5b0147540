"""Pictures and sounds that come again are not computed again, and answers are what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmagent.encoded import EncodedMedia
from mmagent.predictor import Predictor


def test_each_different_medium_is_encoded_once() -> None:
    asked: list[list[int]] = []

    def encode(numbers: torch.Tensor) -> torch.Tensor:
        asked.append(numbers.tolist())
        return numbers[:, None, None].float().expand(-1, 2, 3)

    kept = EncodedMedia(1 << 20)
    one, two = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    assert kept.tokens("image", [one, two, one], encode)[:, 0, 0].tolist() == [0, 1, 0]
    assert kept.tokens("image", [two, one], encode)[:, 0, 0].tolist() == [1, 0]
    assert kept.tokens("audio", [one], encode).shape == (1, 2, 3)  # a sound is no picture
    assert kept.tokens("image", [], encode).shape == (1, 2, 3)
    assert kept.tokens("image", [], encode).shape == (1, 2, 3)
    assert kept.tokens("image", [one.reshape(2, 8)], encode).shape == (1, 2, 3)  # nor is another shape
    assert asked == [[0, 1], [0], [0], [0]]


def test_the_least_recent_goes_first() -> None:
    count = 0

    def encode(numbers: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += len(numbers)
        return torch.zeros(len(numbers), 1, 64)

    kept = EncodedMedia(2 * 64 * 4)
    media = [np.full((2, 2), n, np.uint8) for n in range(3)]
    for each in (media[0], media[1], media[0], media[2], media[0]):
        kept.tokens("image", [each], encode)
    assert count == 3
    kept.tokens("image", [media[1]], encode)
    assert count == 4
    small = EncodedMedia(1)
    small.tokens("image", [media[0]], encode)
    small.tokens("image", [media[0]], encode)
    assert count == 6


def test_answers_are_the_same(
    tiny_bundle: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    predictor = Predictor.load(tiny_bundle)
    calls = []
    for tower in (predictor.model.image_tower, predictor.model.audio_tower):
        assert tower is not None
        tower.register_forward_hook(lambda tower, given, out: calls.append(len(out)))
    rows: list[dict[str, Any]] = [
        {"text": "what color is it?", "image": make_png("red")},
        {"text": "is it round?", "image": make_png("red"), "audio": make_wav()},
        {"text": "no picture"},
        {
            "messages": [{"role": "user", "content": "<image> <image> same?"}],
            "images": [make_png("red"), make_png("blue")],
        },
    ]
    first = predictor.predict(rows)
    assert sum(calls) == 3  # two pictures, one sound
    again = predictor.predict(rows)
    assert sum(calls) == 3
    anew = [Predictor.load(tiny_bundle).predict([row])[0] for row in rows]
    for one, two, three in zip(first, again, anew, strict=True):
        assert one.probabilities == pytest.approx(dict(two.probabilities), abs=1e-6)
        assert one.probabilities == pytest.approx(dict(three.probabilities), abs=1e-5)
