"""Successive halving: who goes on at each stage, in what order, and what a trial that fails changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray.tune.experiment import Trial

from jobs.halving import Halving


@dataclass(eq=False)
class Run:
    """What the scheduler sees of a trial."""

    trial_id: str
    qualities: dict[int, float]  # by budget
    status: str = Trial.PENDING
    at: int = 0


@dataclass
class Tune:
    """The part of Tune's loop that a scheduler has to do with: one trial at a time, created when nothing waits."""

    coming: list[Run]
    most: int
    trials: list[Run] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def get_trials(self) -> list[Run]:
        return self.trials

    def stop_trial(self, trial: Run) -> None:
        trial.status = Trial.TERMINATED

    def run(self, scheduler: Any) -> None:
        while True:
            if self.coming and not any(each.status == Trial.PENDING for each in self.trials):
                self.trials.append(self.coming.pop(0))
            if (chosen := scheduler.choose_trial_to_run(self)) is None:
                assert not self.coming
                return
            self._train(scheduler, chosen)

    def _train(self, scheduler: Any, trial: Run) -> None:
        trial.status = Trial.RUNNING
        self.order.append(trial.trial_id)
        while trial.at < self.most:
            trial.at += 1
            if trial.at not in trial.qualities:
                trial.status = Trial.ERROR
                return
            decision = scheduler.on_trial_result(
                self, trial, {"budget": trial.at, "quality": trial.qualities[trial.at]}
            )
            if decision == "PAUSE":
                trial.status = Trial.PAUSED
                return
        trial.status = Trial.TERMINATED


def run(finals: list[float], *, stages: tuple[int, ...] = (1, 4), most: int = 12, reduction: int = 4) -> Tune:
    """Trials of constant quality."""
    runs = [Run(f"t{n}", dict.fromkeys(range(1, most + 1), quality)) for n, quality in enumerate(finals)]
    tune = Tune(runs, most)
    tune.run(Halving(stages, reduction, len(finals), budget="budget", quality="quality"))
    return tune


def test_the_best_of_each_stage_go_on_best_first() -> None:
    finals = [0.3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.4, 0.6]
    tune = run(finals)
    steps = {each.trial_id: each.at for each in tune.trials}
    assert tune.order == [*(f"t{n}" for n in range(8)), "t1", "t3", "t1", "t3"]
    assert steps == {"t1": 12, "t3": 12} | {f"t{n}": 1 for n in (0, 2, 4, 5, 6, 7)}
    assert {each.status for each in tune.trials} == {Trial.TERMINATED}


def test_sixteen_trials_cost_less_than_four_whole_ones() -> None:
    tune = run([n / 16 for n in range(16)], most=16)
    assert sorted(each.at for each in tune.trials) == [1] * 12 + [4] * 2 + [16] * 2
    assert sum(each.at for each in tune.trials) <= 4 * 16


def test_few_trials_come_to_an_end_too() -> None:
    assert [each.at for each in run([0.5, 0.6, 0.7]).trials] == [1, 12, 12]
    assert [each.at for each in run([0.5, 0.6]).trials] == [12, 12]
    assert [each.at for each in run([0.5]).trials] == [12]


def test_of_equals_who_was_drawn_first_goes_on() -> None:
    assert [each.at for each in run([0.5] * 4).trials] == [12, 12, 1, 1]


def test_a_trial_that_fails_holds_nobody_up() -> None:
    runs = [Run("t0", {1: 0.9}), Run("t1", dict.fromkeys(range(1, 13), 0.5)), Run("t2", {})]
    tune = Tune(list(runs), 12)
    tune.run(Halving((1, 4), 2, 3, budget="budget", quality="quality"))
    assert {each.trial_id: each.status for each in runs} == {
        "t0": Trial.ERROR, "t1": Trial.TERMINATED, "t2": Trial.ERROR,
    }  # fmt: skip
