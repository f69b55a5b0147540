"""Evidence: it finds what a model that was made to look at one thing looks at, and takes it away again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmagent import explain
from mmagent.evidence import BINS, GRID
from mmagent.predictor import Predictor
from mmagent.rows import parse

QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


def sample_of(predictor: Predictor, **row: Any) -> tuple[Any, Any]:
    sample = predictor.prepare(parse({"task": "classify", **row}))
    return sample, predictor.answer([sample])[0]


@pytest.mark.parametrize("method", ["integrated_gradients", "rollout", "occlusion"])
def test_every_part_has_evidence(
    predictor: Predictor, make_png: Callable[..., bytes], make_wav: Callable[..., bytes], method: explain.Method
) -> None:
    sample, answer = sample_of(predictor, text=QUESTION, image=make_png("red"), audio=make_wav())
    found = explain.explain(predictor, sample, answer, method)
    assert [word.text for word in found.words] == ["what", "color", "is", "the", "shape", "?"]
    assert [grid.shape for grid in found.images] == [(GRID, GRID)]
    assert [bins.shape for bins in found.audios] == [(BINS,)]
    assert max(weight for weight, _ in found.units()) == pytest.approx(1)
    assert len(found.units()) == 6 + GRID**2 + BINS
    assert predictor.answer([sample])[0].probabilities == pytest.approx(dict(answer.probabilities), abs=1e-6)


def test_integrated_gradients_sum_to_the_difference(predictor: Predictor, make_png: Callable[..., bytes]) -> None:
    """Completeness (the paper's proposition 1): attributions add up to the score less that of the empty input."""
    import torch

    sample, answer = sample_of(predictor, text=QUESTION, image=make_png("red"))
    model = predictor.model
    batch = {key: value.clone() for key, value in predictor.tensors([sample]).items()}
    words, images, _ = explain._integrated(predictor, model, sample, batch, answer)  # type: ignore[arg-type]
    task = predictor.tasks["classify"]
    empty = {**batch}
    empty["text_states"] = batch["text_states"].mean(1, keepdim=True).expand_as(batch["text_states"])
    empty["images"] = batch["images"].mean((-2, -1), keepdim=True).expand_as(batch["images"])
    with torch.no_grad():
        full, none = (float(task.evidence(model(each)["classify"], answer)) for each in (batch, empty))
    total = float(words.sum() + sum(image.sum() for image in images))
    assert total == pytest.approx(full - none, abs=0.05 * max(1.0, abs(full - none)))


def test_what_is_taken_away_is_gone(
    predictor: Predictor, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    sample, answer = sample_of(predictor, text=QUESTION, image=make_png("red", (32, 32)), audio=make_wav())
    found = explain.explain(predictor, sample, answer)
    image = sample.images[0].copy()
    image[: image.shape[0] // 2] = 0
    sample = replace(sample, images=(image,))
    less = explain.without(predictor, sample, found, [("word", 0, 4), ("image", 0, 0), ("audio", 0, BINS - 1)])
    assert len(less.views[0].ids) == len(sample.views[0].ids) - len(found.words[4].tokens)
    rows = image.shape[0] // GRID
    assert (less.images[0][:rows, :rows] == image.mean((0, 1)).astype(np.uint8)).all()
    assert (less.images[0][rows:] == image[rows:]).all()
    assert (less.audios[0][-1] == sample.audios[0].mean(0)).all()
    assert (less.audios[0][0] == sample.audios[0][0]).all()


def test_words_of_several_tokens_are_one(predictor: Predictor) -> None:
    sample, answer = sample_of(predictor, text="wonderful shape, isn't it")
    words = explain.explain(predictor, sample, answer).words
    assert words[0].text == "wonderful"
    assert len(words[0].tokens) == len("wonderful")
    assert words[1].text == "shape"
