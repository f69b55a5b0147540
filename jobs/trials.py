"""The only home of `ray.tune`: trials of a search, each a training of its own under Ray Train."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.sample import Categorical

METRIC = "best_score"

Work = Callable[[dict[str, Any], str, list[Any]], None]  # (sample, trial's number, callbacks of Ray Train)


class SpaceError(ValueError):
    """A search space that cannot be used; names the key."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one trial."""

    id: str
    sample: Mapping[str, Any]
    score: float | None = None  # none: it failed before its first validation
    step: int = 0
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def distribution(key: str, spec: Any) -> Any:
    """Ray Tune's distribution of one line of a space: ``{loguniform: [low, high]}``, ``{uniform: [low, high]}``,
    ``{randint: [low, high]}`` (high excluded) or ``{choice: [...]}``.

    Raises:
        SpaceError: anything else.
    """
    kinds: dict[str, Any] = {
        "loguniform": tune.loguniform,
        "uniform": tune.uniform,
        "randint": tune.randint,
        "choice": tune.choice,
    }
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in kinds:
        raise SpaceError(f"{key}: got {spec!r}, but one of {{{', '.join(kinds)}: [...]}} is wanted")
    kind, values = next(iter(spec.items()))
    if not isinstance(values, list) or not values:
        raise SpaceError(f"{key}: {kind} takes a list, but got {values!r}")
    if kind == "choice":
        return tune.choice(values)
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise SpaceError(f"{key}: {kind} takes [low, high] of numbers, but got {values!r}") from error
    if not low < high or (kind == "loguniform" and low <= 0):
        raise SpaceError(
            f"{key}: {kind} wants low < high{', both above 0' if kind == 'loguniform' else ''}: {values!r}"
        )
    return kinds[kind](int(low), int(high)) if kind == "randint" else kinds[kind](low, high)


def run(
    work: Work,
    space: Mapping[str, Any],
    *,
    first: Mapping[str, Any],
    trials: int,
    concurrent: int,
    max_steps: int,
    grace_steps: int,
    seed: int,
    folder: Path,
    tell: Callable[[str], None],
) -> list[Trial]:
    """Runs the trials, the first with the recipe's own values; ASHA stops the worst halves as steps go by
    (arXiv:1810.05934). A trial that fails is recorded and does not end the search.

    Args:
        work: trains one sample; calls Ray Train with the callbacks it is handed.
        space: dotted keys to distributions.
        first: the recipe's own values of these keys.
        tell: is given a line for each thing that happens.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)

    def trainable(sample: dict[str, Any]) -> None:
        work(sample, tune.get_context().get_trial_id(), [TuneReportCallback()])

    tuner = Tuner(
        tune.with_resources(trainable, {"cpu": 0.1}),  # the workers ask for theirs; a trial of nothing is refused
        param_space=dict(space),
        tune_config=TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=trials,
            # Tune's own `max_concurrent_trials` is ignored beside a variant generator.
            search_alg=BasicVariantGenerator(
                points_to_evaluate=points(space, first, trials, seed), max_concurrent=concurrent, random_state=seed
            ),
            scheduler=ASHAScheduler(time_attr="step", max_t=max_steps, grace_period=grace_steps, reduction_factor=2),
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=RunConfig(name="tune", storage_path=str(folder), verbose=0, callbacks=[_Teller(tell)]),
    )
    grid = tuner.fit()
    results = [grid[index] for index in range(len(grid))]
    return [
        Trial(
            id=Path(result.path).name,
            sample=dict(result.config or {}),
            score=(result.metrics or {}).get(METRIC),
            step=int((result.metrics or {}).get("step", 0)),
            error=str(result.error).strip().splitlines()[-1] if result.error else None,
            metrics={k: v for k, v in (result.metrics or {}).items() if k.startswith(("accuracy", "loss"))},
        )
        for result in results
    ]


def points(space: Mapping[str, Any], first: Mapping[str, Any], trials: int, seed: int) -> list[dict[str, Any]]:
    """What is fixed of each trial: all of the first; of the others what they choose among, since a few independent
    draws would leave some choices out. Each choice has its turn, in seeded order; the rest is drawn."""
    fixed = [dict(first)]
    turns: dict[str, list[Any]] = {}
    for key, domain in space.items():
        if isinstance(domain, Categorical):
            # The first trial had the recipe's own value: it comes round last.
            others = [value for value in domain.categories if value != first.get(key)]
            random.Random(f"{seed}/{key}").shuffle(others)
            turns[key] = others + [value for value in domain.categories if value == first.get(key)]
    for index in range(trials - 1):
        fixed.append({key: values[index % len(values)] for key, values in turns.items()})
    return fixed


class _Teller(Callback):
    """Says when a trial begins, is asked, ends."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(f"trial {trial.trial_id}  begins   {short(trial.config)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        best = max((t.last_result.get(METRIC, 0.0) for t in trials if t.last_result), default=0.0)
        self._tell(
            f"trial {trial.trial_id}  step {result['step']:.0f}  accuracy {result['score']:.2%}  best so far "
            f"{max(best, result[METRIC]):.2%}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        done = sum(t.is_finished() for t in trials)
        self._tell(f"trial {trial.trial_id}  ends     ({done} done)")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(f"trial {trial.trial_id}  failed; the search goes on")


def short(sample: Mapping[str, Any]) -> str:
    """A sample in one line."""
    return "  ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in sample.items()
    )
