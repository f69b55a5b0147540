"""What trials are made of, without Ray: stages, proposals, what a report is worth."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import trials
from jobs.trials import Proposals, Stages, TrialFailed
from mmagent import space
from mmagent.space import Space

SPEC = {
    "optim.lr": {"loguniform": [1.0e-4, 1.0e-2]},
    "freeze.strategy": {"choice": ["connector", "all", {"top": {"integer": [1, 3]}}]},
}
OWN = {"optim.lr": 0.001, "freeze.strategy": "connector"}


def test_stages_are_shares_of_a_trials_own_steps() -> None:
    stages = Stages("steps", grace=10, most=160, reduction=4)
    assert stages.budget == 16
    assert stages.steps("random", 160) == (10, 40)
    assert stages.steps("random", 81) == (6, 21)  # of another batch: rounded up, so that a stage is behind
    for total in (160, 81, 33):
        for at, budget in zip(stages.steps("random", total), (1, 4), strict=True):
            assert stages.spent({"step": at, "total_steps": total}) >= budget
    assert stages.spent({"step": 160, "total_steps": 160}) >= 16
    assert stages.steps("population", 160) == tuple(range(10, 160, 10))


def test_trials_are_compared_by_their_loss_unless_a_metric_is_named() -> None:
    metrics = {"score": 0.5, "loss": 1.5, "ece": 0.1}
    assert trials.rank(metrics, ("", True)) == -1.5
    assert trials.rank(metrics, ("ece", False)) == -0.1
    assert trials.rank({"score": 0.5}, ("", True)) == 0.5


def test_stages_of_seconds_are_where_validation_happens_to_be() -> None:
    stages = Stages("seconds", grace=5, most=20, reduction=2)
    assert stages.steps("random", 160) == ()
    assert stages.spent({"step": 3, "total_steps": 160, "seconds": 10.0}) == 2


def proposals(method: str, began: list[list[dict[str, Any]]], count: int = 8, seed: int = 0) -> Proposals:
    found = Space(method=method, space=SPEC)
    return Proposals(found, space.dimensions(found), [OWN], count, seed, began)


def asked(made: Proposals, count: int) -> list[dict[str, Any]]:
    out = []
    for number in range(count):
        given = made.suggest(f"id{number}")
        assert given is not None
        assert given["trial"]["number"] == number
        out.append(given["trial"]["sample"])
    return out


def test_samples_begin_with_the_recipes_own_and_repeat_by_the_seed() -> None:
    samples = asked(proposals("random", []), 8)
    assert samples[0] == OWN
    assert asked(proposals("random", []), 8) == samples
    assert asked(proposals("random", [], seed=1), 8) != samples
    assert len({str(sample) for sample in samples}) == 8


def test_optuna_learns_from_what_trials_reach() -> None:
    def closeness(sample: dict[str, Any]) -> float:
        """Best at a rate of 0.004 with top:2."""
        return -abs(sample["optim.lr"] - 0.004) * 100 + (sample["freeze.strategy"] == "top:2")

    made, reached = proposals("tpe", [], 60), []
    for number in range(60):
        given = made.suggest(f"id{number}")
        assert given is not None
        reached.append(closeness(given["trial"]["sample"]))
        made.on_trial_complete(f"id{number}", {"rank": reached[-1], "budget": 16.0})
    assert sum(reached[-20:]) / 20 > sum(reached[:20]) / 20 + 0.3


def test_optuna_goes_on_with_what_an_earlier_start_began() -> None:
    first = asked(proposals("tpe", []), 5)
    began = [[{"sample": sample}] for sample in first]
    again = asked(proposals("tpe", began), 8)
    assert again[:5] == first
    assert not any(sample in first for sample in again[5:])


def test_a_trial_that_failed_teaches_optuna_nothing_and_ends_nothing() -> None:
    made = proposals("tpe", [])
    asked(made, 3)
    for number in range(3):
        made.on_trial_complete(f"id{number}", None, error=True)
    assert made.suggest("next") is not None


@pytest.mark.parametrize(("metric", "worth"), [(("", True), 0.5), (("loss", False), -1.5), (("f1/text", True), 0.25)])
def test_what_a_report_is_worth(metric: tuple[str, bool], worth: float) -> None:
    assert trials.quality({"score": 0.5, "loss": 1.5, "f1/text": 0.25, "step": 3.0}, metric) == worth


def test_a_metric_that_is_not_reported_names_those_that_are() -> None:
    with pytest.raises(TrialFailed, match=r"metric=bleu is not reported; there are loss, score$"):
        trials.quality({"score": 0.5, "loss": 1.5, "step": 3.0, "total_steps": 9.0, "done": 0.0}, ("bleu", True))


def test_trials_are_in_order_beyond_a_thousand() -> None:
    names = ["t1000", "t101", "t999", "t000", "t1001"]
    assert sorted(names, key=trials._order) == ["t000", "t101", "t999", "t1000", "t1001"]
