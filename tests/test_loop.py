"""What the loop takes from a validation. The whole loop is run in test_run.py and test_train.py."""

from __future__ import annotations

import pytest

from jobs.loop import State, note


def noted(measured: list[tuple[float, float]], min_gain: float = 0.0) -> State:
    """The state after validations of these scores and losses, one a step."""
    state = State()
    for step, (score, loss) in enumerate(measured, 1):
        state.step = step
        note(state, score, loss, min_gain)
    return state


@pytest.mark.parametrize(
    ("measured", "best", "unimproved"),
    [
        ([(0.5, 1.0), (0.7, 2.0)], 2, 0),
        ([(0.7, 1.0), (0.5, 0.1), (0.6, 0.1)], 1, 2),
        ([(0.7, 1.0), (0.7, 0.5)], 2, 0),
        ([(0.7, 0.5), (0.7, 0.5), (0.7, 0.6)], 1, 2),
        ([(1.0, 0.5), (1.0, 0.4), (1.0, 0.3)], 3, 2),
        ([(0.7, 0.5), (0.8, 0.9), (0.8, 0.7), (0.7, 0.1)], 3, 1),
    ],
)
def test_a_better_score_is_a_gain_and_of_equal_ones_a_lower_loss(
    measured: list[tuple[float, float]], best: int, unimproved: int
) -> None:
    state = noted(measured)
    assert (state.best_step, state.unimproved) == (best, unimproved)
    assert (state.score, state.loss) == measured[-1]


def test_less_than_the_least_gain_is_the_best_but_no_gain() -> None:
    state = noted([(0.70, 1.0), (0.75, 0.9), (0.75, 0.5), (0.79, 0.4)], min_gain=0.1)
    assert (state.best_step, state.best_score, state.unimproved) == (4, 0.79, 3)
    assert noted([(0.7, 1.0), (0.85, 2.0)], min_gain=0.1).unimproved == 0
