"""Continuous batching: texts that join and leave at any step are what they are alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmagent.answer import Answer
from mmagent.batch import Sample
from mmagent.flow import flows
from mmagent.predictor import Predictor, Underway
from mmagent.writer import Writing
from tests.test_generate import INFOS, configured, rows, trained


@pytest.fixture(scope="module")
def predictors(
    writers: dict[str, Path], tiny_recipe: dict[str, Any], make_wav: Callable[..., bytes]
) -> Callable[[str], Predictor]:
    """Of a kind of language model, that has learned the three answers of `rows` a little: it still has doubts."""
    made: dict[str, Predictor] = {}

    def make(kind: str) -> Predictor:
        if kind not in made:
            config = configured(tiny_recipe, writers[kind])
            made[kind] = trained(config, rows("text", make_wav), INFOS, steps=120)[1]
        return made[kind]

    return make


def asked(predictor: Predictor, make_wav: Callable[..., bytes], *how: Writing) -> list[Sample]:
    samples = [predictor.prepare(replace(each, target=type(each.target)())) for each in rows("text", make_wav)]
    return [replace(sample, writing=each) for sample, each in zip(samples, how, strict=False)]


def flowing(predictor: Predictor, samples: Sequence[Sample], begins: Sequence[int]) -> list[Answer]:
    """Answers, each text beginning at its step."""
    flow = predictor.flow()
    assert flow is not None
    under: dict[int, Underway] = {}
    answers: dict[int, Answer] = {}
    step = 0
    while len(answers) < len(samples):
        new = [number for number, begin in enumerate(begins) if begin == step]
        if new:
            under |= zip(new, predictor.begin(flow, [samples[number] for number in new]), strict=True)
        if flow.texts:
            done = predictor.proceed(flow)
            answers |= {n: predictor.finished(each) for n, each in under.items() if each.text in done}
        step += 1
    return [answers[number] for number in range(len(samples))]


@pytest.mark.parametrize("kind", ["decoder", "transposed"])
@pytest.mark.parametrize("begins", [(0, 0, 0), (0, 2, 5), (6, 0, 3)])
def test_a_text_does_not_hang_on_its_company(
    predictors: Callable[[str], Predictor], kind: str, begins: tuple[int, ...], make_wav: Callable[..., bytes]
) -> None:
    predictor = predictors(kind)
    samples = asked(predictor, make_wav, Writing(12), Writing(4), Writing(9))
    alone = [predictor.answer([sample])[0] for sample in samples]
    assert len({answer.text for answer in alone}) > 1
    for one, other in zip(alone, flowing(predictor, samples, begins), strict=True):
        assert other.text == one.text
        assert other.stopped == one.stopped
        assert [token for token, _ in other.tokens] == [token for token, _ in one.tokens]
        assert [chance for _, chance in other.tokens] == pytest.approx([chance for _, chance in one.tokens], abs=1e-4)
        assert other.confidence == pytest.approx(one.confidence, abs=1e-4)


def test_what_is_drawn_hangs_on_its_seed_alone(
    predictors: Callable[[str], Predictor], make_wav: Callable[..., bytes]
) -> None:
    predictor = predictors("decoder")
    drawn = [Writing(12, temperature=1.5, top_p=0.9, seed=seed) for seed in range(3)]
    samples = asked(predictor, make_wav, *drawn)
    whole, apart = flowing(predictor, samples, (0, 0, 0)), flowing(predictor, samples, (0, 4, 2))
    assert [answer.text for answer in whole] == [answer.text for answer in apart]
    others = [replace(sample, writing=drawn[0]._replace(seed=seed)) for seed in range(20) for sample in samples[:1]]
    assert len({answer.text for answer in flowing(predictor, others, [0] * 20)}) > 3
    sure = [replace(sample, writing=how._replace(top_p=1e-6)) for sample, how in zip(samples, drawn, strict=True)]
    likeliest = [replace(sample, writing=Writing(12)) for sample in samples]
    found = flowing(predictor, sure, (0, 0, 0))
    assert [answer.text for answer in found] == [answer.text for answer in flowing(predictor, likeliest, (0, 0, 0))]


def test_one_that_leaves_changes_nothing_for_the_others(
    predictors: Callable[[str], Predictor], make_wav: Callable[..., bytes]
) -> None:
    predictor = predictors("decoder")
    samples = asked(predictor, make_wav, Writing(12), Writing(12), Writing(12))
    alone = [predictor.answer([sample])[0].text for sample in samples]
    flow = predictor.flow()
    assert flow is not None
    under = predictor.begin(flow, samples)
    predictor.proceed(flow)
    flow.leave([under[0].text])
    while flow.texts:
        predictor.proceed(flow)
    assert [predictor.finished(each).text for each in under[1:]] == alone[1:]


def test_a_checkpoints_own_penalty_is_kept(
    predictors: Callable[[str], Predictor], make_wav: Callable[..., bytes]
) -> None:
    predictor = predictors("decoder")
    backbone: Any = predictor.model.backbone
    asked_for = backbone.model.generation_config
    samples = asked(predictor, make_wav, Writing(12), Writing(12), Writing(12))
    plain = [answer.text for answer in flowing(predictor, samples, (0, 0, 0))]
    asked_for.repetition_penalty = 0.2  # which likes to say a thing again
    try:
        alone = [predictor.answer([sample])[0].text for sample in samples]
        assert [answer.text for answer in flowing(predictor, samples, (0, 3, 1))] == alone
        assert alone != plain
    finally:
        asked_for.repetition_penalty = 1.0
    asked_for.no_repeat_ngram_size = 2
    try:
        assert not flows(predictor.model.backbone)
    finally:
        asked_for.no_repeat_ngram_size = 0


def test_a_pair_writes_batch_by_batch(predictors: Callable[[str], Predictor]) -> None:
    assert predictors("encoder-decoder").flow() is None
