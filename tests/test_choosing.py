"""Which questions are worth a label: the unsure ones, those whose answer changed, each meaning once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmagent import choosing
from mmagent.answer import Answer


def answer(words: str = "red", **more: Any) -> Answer:
    return Answer(
        task="classify", confidence=more.pop("confidence", 0.5), abstained=False, bundle="b", words=words, **more
    )


@pytest.mark.parametrize(
    ("chances", "wanted"), [((0.5, 0.5), 1.0), ((0.9, 0.1), 0.2), ((0.4, 0.35, 0.25), 0.95), ((1.0, 0.0), 0.0)]
)
def test_unsure_is_a_small_margin(chances: tuple[float, ...], wanted: float) -> None:
    made = answer(label="l0", probabilities={f"l{n}": each for n, each in enumerate(chances)})
    assert choosing.unsure(made) == pytest.approx(wanted)


def test_without_labels_it_is_a_low_confidence() -> None:
    assert choosing.unsure(answer(confidence=0.3)) == pytest.approx(0.7)


def test_an_answer_that_changed_counts_more() -> None:
    assert choosing.score(answer("red"), answer("blue")) > choosing.score(answer("red"), answer("red"))
    assert choosing.score(answer("red"), None) == choosing.score(answer("red"), answer("red"))


def test_each_meaning_is_chosen_once_and_the_best_of_it() -> None:
    """Five meanings, forty questions of each, one meaning much more unsure than the others."""
    rng = np.random.default_rng(0)
    middles = np.eye(5) * 10
    vectors = np.repeat(middles, 40, axis=0) + 0.1 * rng.standard_normal((200, 5))
    scores = rng.random(200) * 0.2 + np.repeat([0.8, 0.2, 0.2, 0.2, 0.2], 40)
    chosen = choosing.choose(list(scores), vectors, 20)
    assert len(set(chosen)) == 20
    assert set(np.array(chosen) // 40) == {0, 1, 2, 3, 4}
    five = choosing.choose(list(scores), vectors, 5)
    assert 0 in set(np.array(five) // 40)
    assert list(scores[five]) == sorted(scores[five], reverse=True)


def test_fewer_than_are_wanted_are_all() -> None:
    assert choosing.choose([0.1, 0.9, 0.5], np.eye(3), 10) == [1, 2, 0]


def test_the_same_seed_chooses_the_same() -> None:
    rng = np.random.default_rng(1)
    scores, vectors = list(rng.random(300)), rng.random((300, 8))
    assert choosing.choose(scores, vectors, 20, seed=3) == choosing.choose(scores, vectors, 20, seed=3)
