"""The home of `ray.tune` (a scheduler of our own is in `jobs.halving`): the trials of a search, each a run that takes
its turn in a lane (`jobs.lanes`).

What a trial reports is written down in its folder (``reports.jsonl``). A search that was killed is started anew with
the same seed: trials repeat what they reported, at once and without training, until those that ran go on from their
checkpoints; so schedulers and searchers come to stand where they stood, though Tune (2.60) keeps no scheduler's
state. Checkpoints that are paused or handed from one trial to another are Tune's own: populations copy nothing, and
say nothing about it, where they are not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from jobs import lanes, proposing, watch
from jobs.halving import Halving
from jobs.lanes import Job, Outcome
from jobs.loop import STOP_FILE
from mmagent import space as spaces
from mmagent import storage
from mmagent.space import Dimension, Sample, Space

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else Tune frames a table that nobody asked for

REPORTS = "reports.jsonl"
QUALITY, BUDGET = "quality", "budget"
RANK = "rank"  # what trials are compared by on their way: see `rank`
_TRIAL = "trial"  # in Tune's config: {"number", "sample"}
_MARKS = ("step", "total_steps", "done", "seconds", "startup_s")  # in a report, beside what was measured
_SAMPLE = "sample.json"  # in a trial's folder: what its checkpoints are of
_ORIGIN = "origin.json"  # in a checkpoint of Tune's: whose it is
_EDGE = 1e-6  # of a stage: what rounding may not decide
_RESTARTS = 3  # of a trial that ended without a word
_HEAD = "node:__internal_head__"  # of which every cluster has one

Make = Callable[[Sample, Path, str], Job]  # a trial's sample and folder, and its job's name


class TrialFailed(RuntimeError):
    """A trial that cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Stages:
    """How time is counted in a search. A trial's budget is its steps, or its seconds of training, in units of the
    first stage; steps as a share of its own, which another batch size makes more or fewer."""

    unit: str
    grace: float
    most: float
    reduction: int

    @property
    def budget(self) -> float:
        return self.most / self.grace

    def spent(self, metrics: Mapping[str, Any]) -> float:
        """The budget behind a report."""
        if self.unit == "seconds":
            return float(metrics["seconds"]) / self.grace
        return float(metrics["step"] / metrics["total_steps"]) * self.budget + _EDGE

    def steps(self, method: str, total: int) -> tuple[int, ...]:
        """At which a trial of so many steps is compared, or changed in a population; none where seconds decide."""
        if self.unit != "steps":
            return ()
        return tuple(math.ceil(share * total / self.budget - _EDGE) for share in self.marks(method))

    def marks(self, method: str) -> tuple[float, ...]:
        """The budgets at which that is, the end left out."""
        if method == "population":
            return tuple(float(index) for index in range(1, math.ceil(self.budget)))
        count = math.ceil(math.log(self.budget, self.reduction) - _EDGE)
        return tuple(float(self.reduction**index) for index in range(count))


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one trial."""

    id: str
    sample: Mapping[str, Any]  # of a population: the last
    quality: float | None = None  # the best it reached, higher is better; none: it failed before its first validation
    step: int = 0
    seconds: float = 0.0
    state: str = "done"  # done, stopped (it fell behind), failed or cut (the search was interrupted)
    error: str | None = None
    reports: Sequence[Mapping[str, Any]] = field(default_factory=tuple)  # {"sample", "metrics"} in order


def run(
    make: Make,
    folder: Path,
    space: Space,
    dims: Sequence[Dimension],
    first: Sequence[Sample],
    desk: Any,
    *,
    stages: Stages,
    trials: int,
    concurrent: int,
    seed: int,
    metric: tuple[str, bool],
    tell: Callable[[str], None],
) -> list[Trial]:
    """Runs the trials. One that fails is recorded and does not end the search.

    Args:
        make: what a sample's trial does, called in the trial's own process.
        folder: of the search; trials lie in ``trials/``.
        first: what the first trials have, the recipe's own values before all.
        desk: of the lanes that trials take turns in.
        metric: what trials are compared by, and whether higher is better; "" is the score of checkpoints.
        tell: is given a line for each thing that happens.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told by the search
    # Tune's populations draw from these.
    random.seed(seed)
    np.random.seed(seed)
    began = [_read(place) for place in sorted((folder / "trials").glob("t*"), key=lambda place: _order(place.name))]
    population = space.method == "population"
    proposals = Proposals(space, dims, first, trials, seed, began)
    watching = _Watch(desk, stages, trials, tell)
    shutil.rmtree(folder / "tune", ignore_errors=True)
    given = {"desk": desk, "make": make, "folder": folder, "stages": stages, "metric": metric}
    # One trial's process for each lane, all on the head: a share of what Ray has one of there. It takes no CPU.
    share = math.floor(ray.available_resources().get(_HEAD, 1.0) / (concurrent + 0.5) * 1e4) / 1e4
    trainable: Any = tune.with_resources(tune.with_parameters(_Trainee, **given), {"cpu": 0, _HEAD: share})
    tuner = Tuner(
        trainable,
        param_space=proposals.given() if population else {},
        tune_config=TuneConfig(
            metric=RANK,
            mode="max",
            num_samples=1 if population else trials,
            search_alg=None if population else proposals,
            scheduler=_scheduler(space, dims, stages, trials),
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[watching],
            stop={BUDGET: stages.budget},
            checkpoint_config=CheckpointConfig(num_to_keep=3 if population else 1),
        ),
    )
    grid = tuner.fit()
    errors = {str(result.path): result.error for result in (grid[index] for index in range(len(grid)))}
    ended = sorted(watching.trials, key=lambda trial: _order(_name(trial)))
    return [_found(folder, trial, errors, stages) for trial in ended]


def _name(trial: Any) -> str:
    """A trial's name and folder: by its number, which a population hands on with the rest of a config; so it is that
    of the config that the trial began with."""
    known: str | None = trial.custom_trial_name
    return known or f"t{int(trial.config[_TRIAL]['number']):03d}"


def _order(name: str) -> tuple[int, str]:
    """Trials by number: the thousandth comes after t999, not after t100."""
    return len(name), name


def _scheduler(space: Space, dims: Sequence[Dimension], stages: Stages, trials: int) -> TrialScheduler:
    if space.method == "population":
        changed = {each.key: each for each in spaces.mutable(dims)}

        def within(config: dict[str, Any]) -> dict[str, Any]:
            """Tune multiplies by 0.8 or 1.2, whatever the space says."""
            sample = config[_TRIAL]["sample"]
            for key, each in changed.items():
                held = min(max(sample[key], each.low), each.high)
                sample[key] = spaces.rounded(held)
            return config

        return PopulationBasedTraining(
            time_attr=BUDGET,
            perturbation_interval=1.0,
            # All wait for each other: else those that happen to run first take over from one another, for ever where
            # they are equal, and the others never begin.
            synch=True,
            hyperparam_mutations={_TRIAL: {"sample": {key: _distribution(each) for key, each in changed.items()}}},
            custom_explore_fn=within,
            log_config=False,
        )
    if space.scheduler == "halving":
        return Halving(stages.marks(space.method), stages.reduction, trials, budget=BUDGET, quality=RANK)
    if space.scheduler == "asha":
        most: Any = stages.budget  # declared as whole, and used as it is
        return ASHAScheduler(time_attr=BUDGET, max_t=most, grace_period=1, reduction_factor=stages.reduction)
    if space.scheduler == "hyperband":
        # Tune's plain one (2.60) halves brackets that are not full yet: trials come one by one, so each ran to its end.
        return HyperBandForBOHB(time_attr=BUDGET, max_t=max(1, round(stages.budget)), reduction_factor=stages.reduction)
    return FIFOScheduler()


def _distribution(dimension: Dimension) -> Any:
    kinds: dict[str, Any] = {"loguniform": tune.loguniform, "uniform": tune.uniform}
    return kinds[dimension.kind](dimension.low, dimension.high)


class Proposals(Searcher):
    """Gives each trial its sample: what is given first, what trials of an earlier start had, then what the method says.

    Optuna (``tpe``) learns what each trial reached at the first stage, of which all have the same to tell, and of those
    that end before it. Of trials that an earlier start began it learns as they come there again.
    """

    def __init__(
        self,
        space: Space,
        dims: Sequence[Dimension],
        first: Sequence[Sample],
        trials: int,
        seed: int,
        began: Sequence[Sequence[Mapping[str, Any]]] = (),
    ) -> None:
        super().__init__(metric=RANK, mode="max")
        self._dims = dims
        # A population's samples change as it goes: those that it began with are drawn again, by the seed.
        known = [records[0]["sample"] for records in began if records]
        drawn = spaces.spread(dims, trials - len(first), seed)
        self._given = list(known) if space.method == "tpe" else [*first, *drawn][:trials]
        if len(self._given) < len(first):
            self._given = list(first)
        self._study = proposing.study(seed + len(self._given)) if space.method == "tpe" else None
        self._asked: dict[str, Any] = {}  # Optuna's trials, by Tune's ids
        self._number = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        number, self._number = self._number, self._number + 1
        if number < len(self._given):
            sample = self._given[number]
            self._asked[trial_id] = spaces.raw(sample, self._dims)
        else:
            assert self._study is not None, "random samples are drawn for all trials"
            asked = self._study.ask()
            self._asked[trial_id] = asked
            sample = spaces.sample(proposing.propose(asked, self._dims), self._dims)
        return {_TRIAL: {"number": number, "sample": dict(sample)}}

    def given(self) -> dict[str, Any]:
        """The same of all trials at once, as Tune's populations want it."""
        return {_TRIAL: tune.grid_search([{"number": at, "sample": dict(s)} for at, s in enumerate(self._given)])}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if result[BUDGET] >= 1.0:
            self._learn(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._learn(trial_id, result)

    def _learn(self, trial_id: str, result: Mapping[str, Any] | None) -> None:
        asked = self._asked.pop(trial_id, None)
        if self._study is None or asked is None:
            return
        import optuna

        quality = (result or {}).get(RANK)
        if not isinstance(asked, dict):
            failed = {"state": optuna.trial.TrialState.FAIL} if quality is None else {"values": quality}
            self._study.tell(asked, **failed)
        elif quality is not None and (told := proposing.known(asked, self._dims, quality)) is not None:
            self._study.add_trial(told)

    def on_pause(self, trial_id: str) -> None:
        """Hyperband says so."""

    def on_unpause(self, trial_id: str) -> None:
        """Likewise."""

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps searchers for its own way of going on, which is not ours."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on by what its trials have reported")


class _Trainee(tune.Trainable):
    """A trial as Tune sees it: it has its run trained in a lane, validation by validation. The process stays for the
    trials that follow."""

    _sample: Sample
    _place: Path
    _job: str | None
    _again: deque[Mapping[str, Any]]  # reports of an earlier start, to be repeated
    _at: int  # step of the last report
    _spent_s: float
    _before_s: float  # spent before this job
    _prepared_s: float  # by this process, before the job
    _best: float

    def setup(  # type: ignore[override]  # Tune hands what `with_parameters` was given
        self, config: dict[str, Any], desk: Any, make: Make, folder: Path, stages: Stages, metric: tuple[str, bool]
    ) -> None:  # fmt: skip
        self._desk, self._make, self._home, self._stages, self._metric = desk, make, folder, stages, metric
        self._jobs = 0
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._again:
            return self._result(self._again.popleft()["metrics"])
        for _ in range(_RESTARTS):
            if self._job is None:
                self._start()
            outcome: Outcome = ray.get(self._desk.outcome.remote(self._job))
            if outcome.report is not None:
                metrics = dict(outcome.report)
                metrics["seconds"] = round(metrics["seconds"] + self._before_s, 2)
                metrics["startup_s"] = round(metrics["startup_s"] + self._prepared_s, 2)
                _write(self._place, self._sample, metrics)
                return self._result(metrics)
            self._job = None
            if outcome.failed:
                raise TrialFailed(outcome.failed)
        raise TrialFailed("its run ended before its last step, and said nothing; its folder holds what it wrote")

    def save_checkpoint(self, checkpoint_dir: str) -> Any:
        place = Path(checkpoint_dir)
        now = self._place / "checkpoints" / f"step_{self._at:08d}"
        if now.is_dir():  # not where a report was repeated, whose checkpoint is gone
            shutil.copytree(now, place / now.name)
        origin = {"trial": self._place.name, "sample": self._sample, "step": self._at, "seconds": self._spent_s}
        (place / _ORIGIN).write_text(json.dumps({**origin, "best": self._best}))
        return checkpoint_dir

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        self._end()
        origin = json.loads((Path(checkpoint_dir) / _ORIGIN).read_text())
        self._at, self._spent_s, self._best = origin["step"], origin["seconds"], origin["best"]
        if again := self._known(self._at):
            self._again = deque(again)
            return
        self._again = deque()
        if self._holds(self._sample) and self._newest() >= self._at:
            return
        given = Path(checkpoint_dir) / f"step_{self._at:08d}"
        if not given.is_dir():
            raise TrialFailed(
                f"{origin['trial']} had no checkpoint of step {self._at} left to go on from: start the search anew "
                "under another --name"
            )
        for old in ("checkpoints", "config.yaml"):
            shutil.rmtree(self._place / old, ignore_errors=True)
            (self._place / old).unlink(missing_ok=True)
        (self._place / "checkpoints").mkdir(parents=True)
        shutil.copytree(given, self._place / "checkpoints" / given.name)
        storage.publish_json(self._place / _SAMPLE, self._sample)

    def cleanup(self) -> None:
        self._end()

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._sample = dict(config[_TRIAL]["sample"])
        self._place = self._home / "trials" / str(self.trial_name)
        self._job = None
        self._at, self._spent_s, self._before_s, self._best = 0, 0.0, 0.0, -math.inf
        self._again = deque(self._known(0))

    def _known(self, after: int) -> list[Mapping[str, Any]]:
        """What was reported for this sample behind a step, by an earlier start."""
        out: list[Mapping[str, Any]] = []
        for record in _read(self._place):
            step = record["metrics"]["step"]
            if record["sample"] == self._sample and step > (out[-1]["metrics"]["step"] if out else after):
                out.append(record)
            elif out:
                break
        return out

    def _start(self) -> None:
        if not self._holds(self._sample):
            shutil.rmtree(self._place, ignore_errors=True)
            self._place.mkdir(parents=True)
            storage.publish_json(self._place / _SAMPLE, self._sample)
        self._before_s = self._spent_s
        self._jobs += 1
        name, began = f"{self._place.name}#{os.getpid()}.{self._jobs}", time.monotonic()
        lanes.submit(self._desk, self._make(self._sample, self._place, name))
        self._job, self._prepared_s = name, time.monotonic() - began

    def _end(self) -> None:
        if self._job is not None:
            (self._place / STOP_FILE).touch()  # one that is in the middle of its steps looks there
            ray.get(self._desk.stop.remote(self._place.name))
            self._job = None

    def _holds(self, sample: Sample) -> bool:
        file = self._place / _SAMPLE
        return file.exists() and json.loads(file.read_text()) == json.loads(json.dumps(sample))

    def _newest(self) -> int:
        steps = [int(path.name.removeprefix("step_")) for path in (self._place / "checkpoints").glob("step_*")]
        return max(steps, default=-1)

    def _result(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        self._at, self._spent_s = int(metrics["step"]), float(metrics["seconds"])
        self._best = max(self._best, quality(metrics, self._metric))
        return {
            **{key: value for key, value in metrics.items() if key != "done"},
            QUALITY: self._best,
            RANK: rank(metrics, self._metric),
            BUDGET: self._stages.spent(metrics),
            "done": bool(metrics["done"]),
        }


def quality(metrics: Mapping[str, Any], metric: tuple[str, bool]) -> float:
    """What a report is worth, higher is better.

    Raises:
        TrialFailed: it does not have the metric.
    """
    name, higher = metric
    if not name:
        return float(metrics["score"])
    if name not in metrics:
        there = ", ".join(sorted(key for key in metrics if key not in _MARKS))
        raise TrialFailed(f"metric={name} is not reported; there are {there}")
    return float(metrics[name]) if higher else -float(metrics[name])


def rank(metrics: Mapping[str, Any], metric: tuple[str, bool]) -> float:
    """What trials are compared by before their end, higher is better: the named metric, or where none is named the
    validation loss. After few steps a share of right answers says next to nothing, when a loss already falls."""
    return quality(metrics, metric) if metric[0] or "loss" not in metrics else -float(metrics["loss"])


def _read(place: Path) -> list[dict[str, Any]]:
    """What a trial has reported."""
    return watch.whole_lines(place / REPORTS)


def _found(folder: Path, trial: Any, errors: Mapping[str, BaseException | None], stages: Stages) -> Trial:
    name = _name(trial)
    place = folder / "trials" / name
    reports = _read(place)
    last = reports[-1]["metrics"] if reports else {}
    result = trial.last_result or {}
    done = bool(last.get("done")) or result.get(BUDGET, 0.0) >= stages.budget
    state = {"ERROR": "failed", "TERMINATED": "done" if done else "stopped"}.get(trial.status, "cut")
    error = next((found for path, found in errors.items() if Path(path).name == name and found), None)
    return Trial(
        id=name,
        sample=dict(trial.config[_TRIAL]["sample"]),
        quality=result.get(QUALITY),
        step=int(last.get("step", 0)),
        seconds=float(last.get("seconds", 0.0)),
        state=state,
        error=_reason(error) if error is not None else None,
        reports=reports,
    )


def note(folder: Path, trial: Trial, report: Mapping[str, float]) -> None:
    """Writes down what a stopped trial reports that goes on outside Tune."""
    metrics = {**report, "seconds": round(report["seconds"] + trial.seconds, 2)}
    _write(folder / "trials" / trial.id, trial.sample, metrics)


def carried_on(folder: Path, trial: Trial, stages: Stages, metric: tuple[str, bool]) -> Trial:
    """A trial that was stopped, with all that it has reported since."""
    if trial.state != "stopped":
        return trial
    reports = _read(folder / "trials" / trial.id)
    last = reports[-1]["metrics"]
    reached = max(quality(each["metrics"], metric) for each in reports)
    state = "done" if last.get("done") or stages.spent(last) >= stages.budget else trial.state
    return replace(
        trial, quality=reached, step=int(last["step"]), seconds=float(last["seconds"]), state=state, reports=reports
    )


def _write(place: Path, sample: Sample | Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    with open(place / REPORTS, "a") as file:
        file.write(json.dumps({"sample": sample, "metrics": metrics, "time_s": time.time()}) + "\n")


def _reason(error: BaseException) -> str:
    """A failed trial's last words, without the trace of those who carried them."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    said = [line.partition("TrialFailed: ")[2] for line in lines if "TrialFailed: " in line]
    return (said or lines or [type(error).__name__])[-1]


class _Watch(Callback):
    """Says when a trial begins, is validated, ends; frees the lane of one that ended."""

    def __init__(self, desk: Any, stages: Stages, wanted: int, tell: Callable[[str], None]) -> None:
        self._desk, self._stages, self._wanted, self._tell = desk, stages, wanted, tell
        self._began_s = time.monotonic()
        self._spent: dict[str, float] = {}  # budget of each trial
        self._best = -math.inf
        self._ended: set[str] = set()
        self.trials: list[Any] = []

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(f"{_name(trial)}  begins   {spaces.short(trial.config[_TRIAL]['sample'])}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._spent[_name(trial)] = result[BUDGET]
        self._best = max(self._best, result[QUALITY])
        self._tell(
            f"{_name(trial)}  step {result['step']:.0f}  {result['score']:.4g}  best so far {self._best:.4g}  "
            f"{self._left(trials)}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._desk.stop.remote(_name(trial))
        self._ended.add(_name(trial))
        self._tell(f"{_name(trial)}  ends     ({len(self._ended)} of {self._wanted} done)")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._desk.stop.remote(_name(trial))
        self._ended.add(_name(trial))
        self._tell(f"{_name(trial)}  failed  ({len(self._ended)} of {self._wanted} done)")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.trials = trials

    def _left(self, trials: Sequence[Any]) -> str:
        """By what a trial has taken so far in the mean, and a trial that goes on may take: not known before one has
        ended."""
        ended = [self._spent.get(name, 0.0) for name in self._ended]
        if not ended or not (total := sum(self._spent.values())):
            return f"0 of {self._wanted} done"
        mean = sum(ended) / len(ended)
        open_budget = sum(
            max(0.0, mean - self._spent.get(_name(t), 0.0)) for t in trials if _name(t) not in self._ended
        )
        coming = (self._wanted - len(trials)) * mean
        left_s = (open_budget + coming) * (time.monotonic() - self._began_s) / total
        return f"{len(ended)} of {self._wanted} done  about {watch.clock(left_s)} left"


@contextlib.contextmanager
def quiet() -> Any:
    """Tune's hints for its own way of going on would lead astray."""
    import signal

    before = signal.getsignal(signal.SIGTERM)
    # Tune ends an experiment in order at SIGINT alone.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.stdout.flush()
