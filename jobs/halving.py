"""Successive halving in step, as a scheduler of Ray Tune's: all trials come to a stage before any goes behind it.

At each stage the best one of ``reduction`` goes on and the others end (Jamieson and Talwalkar, arXiv:1502.07943), but
two at least come to the end, so that no winner is chosen by its beginning alone. Where
few trials run at a time, that costs less than ASHA, which has to let pass whoever comes to a stage first; and each is
compared with all the others, so that it does not matter in which order they are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

_LEAST = 2  # trials that come to the end


class Halving(FIFOScheduler):
    """Pauses who comes to a stage; once nobody else is on the way there, lets the best go on and stops the others."""

    def __init__(self, stages: Sequence[float], reduction: int, trials: int, *, budget: str, quality: str) -> None:
        """
        Args:
            stages: budgets at which trials are compared, in order.
            trials: how many there will be: the first stage waits for all.
            budget: key of a result: how far its trial is.
            quality: key of a result: what it is compared by, higher is better.
        """
        super().__init__()
        self._stages, self._reduction, self._trials = tuple(stages), reduction, trials
        self._budget, self._quality = budget, quality
        self._stage: dict[str, int] = {}  # by trial: how many stages are behind it
        self._reached: dict[str, float] = {}  # by trial: its quality at the stage where it waits
        self._released: list[Trial] = []

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        stage = self._stage.setdefault(trial.trial_id, 0)
        if stage == len(self._stages) or result[self._budget] < self._stages[stage]:
            return str(TrialScheduler.CONTINUE)
        self._reached[trial.trial_id] = result[self._quality]
        return str(TrialScheduler.PAUSE)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        trials: list[Trial] = tune_controller.get_trials()
        if pending := next((each for each in trials if each.status == Trial.PENDING), None):
            return pending
        on_the_way = len(trials) < self._trials or any(each.status == Trial.RUNNING for each in trials)
        if not self._released and not on_the_way:
            self._halve(tune_controller, [each for each in trials if each.status == Trial.PAUSED])
        return self._released.pop(0) if self._released else None

    def _halve(self, tune_controller: Any, waiting: Sequence[Trial]) -> None:
        ranked = sorted(waiting, key=lambda each: -self._reached[each.trial_id])  # of equals who was drawn first
        kept = max(_LEAST, len(ranked) // self._reduction)
        for each in ranked[:kept]:
            self._stage[each.trial_id] += 1
        for each in ranked[kept:]:
            tune_controller.stop_trial(each)
        self._released = list(ranked[:kept])

    def debug_string(self) -> str:
        return f"halving at {', '.join(f'{each:g}' for each in self._stages)}"
