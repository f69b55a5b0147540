"""The training loop, as one worker runs it: read it top to bottom.

Its state is named (`State`) and saved with every checkpoint; everything random in a step is a function of the seed,
the step and the sample, so that a run that was stopped and goes on does what it would have done.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from jobs import engine as engines
from jobs.checkpoint import Checkpoint, Checkpoints
from jobs.engine import Engine
from jobs.meter import Log, Meter
from jobs.phases import VALIDATION, Phases
from jobs.workers import Group
from mmagent import freeze, storage
from mmagent.config import Config
from mmagent.model import Batch
from mmagent.order import Order, Position
from mmagent.targets import TaskInfo

UNSCORED = -1e30  # below any score; JSON has no infinity
WORST_LOSS = 1e30
PERFECT = 1.0  # no score is higher
STOP_FILE = "stop"  # in the run's folder: the loop saves and ends at the next step
_LOG_EVERY_S = 5.0


class Step(NamedTuple):
    """What a rank learns from between two updates of the weights."""

    micros: list[Batch]
    bad_rows: int = 0  # that could not be read
    cut_rows: int = 0  # whose text is longer than the config allows


class Learner(Protocol):
    """What a run teaches, and how: a model, its batches and losses, how good it is, and what it leaves behind."""

    model: Any  # a module of the parts that `mmagent.freeze` knows

    @property
    def main(self) -> str:
        """How the score of a validation is called."""
        ...

    @property
    def last_error(self) -> str:
        """Of a row that could not be read."""
        ...

    @property
    def notes(self) -> list[str]:
        """What is to be said before the first step."""
        ...

    def begin(self, device: torch.device) -> None:
        """Takes its place beside the model, which is on its device now."""
        ...

    def rows(self, tables: Iterator[pa.Table]) -> list[Any]:
        """The rows of a validation stream, kept for all validations."""
        ...

    def steps(self, tables: Iterator[pa.Table]) -> Iterator[Step]:
        """For each table of a stream its micro-batches, as its rows' numbers cut them; ready to go to the device."""
        ...

    def loss(self, out: Batch, batch: Batch) -> torch.Tensor:
        """Of a micro-batch, normalised so that any split of a batch over workers sums to the same."""
        ...

    def hits(self, out: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """How many answers are right, and of how many."""
        ...

    def validate(self, engine: Engine, rows: list[Any], group: Group) -> tuple[float, dict[str, float]]:
        """A score, higher is better, and all that is measured; every rank calls it."""
        ...

    def export(self, engine: Engine, rows: list[Any], group: Group, chosen: dict[str, Any]) -> None:
        """Leaves behind what was learned; every rank calls it. `chosen`: step and score of the checkpoint."""
        ...


class BadRowsError(ValueError):
    """More rows that cannot be read than the config allows; names the last."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every rank knows before the first step."""

    learner: Callable[[Plan], Learner]
    root: Path  # of storage, as the command sees it
    config: Config
    tasks: Mapping[str, TaskInfo]
    label_weights: Mapping[str, Mapping[str, float]]  # of training samples, by task and label (train.class_balance)
    folder: Path  # of the run
    name: str  # of the bundle
    bundle: Path | None  # where it, or what else a run leaves, goes; none: the run ends without
    seal: str  # the file in it that is written last
    data: str  # name of the data set
    order: Order
    total_steps: int
    max_bad_rows: int
    task: str  # the one that a request means which names none
    golden_source: tuple[Path, ...]  # shards of the validation split
    parts: tuple[freeze.Part, ...]  # trained and total parameters


@dataclass(slots=True)
class State:
    """Where the loop stands; all of it is in every checkpoint."""

    step: int = 0
    position: Position = field(default_factory=Position)
    score: float = UNSCORED  # of the last validation
    loss: float = WORST_LOSS  # of the last validation
    best_score: float = UNSCORED
    best_step: int = 0
    best_loss: float = WORST_LOSS
    gained_score: float = UNSCORED  # the last that was better by `train.min_gain`
    unimproved: int = 0
    bad_rows: int = 0  # of all that were read, each as often as it was
    cut_rows: int = 0  # likewise


def train(group: Group, plan: Plan) -> None:
    """One worker's whole run: set up, resume, train, export.

    Raises:
        CheckpointError: a checkpoint could not be written.
        FloatingPointError: the loss is no number.
        BadRowsError: more bad rows than `data.max_bad_share` allows.
    """
    # -- set up ------------------------------------------------------------------------------------------------
    storage.use(plan.root)
    config = plan.config
    learner = plan.learner(plan)
    model = learner.model
    engine = engines.make(model, freeze.groups(model, config), config)
    learner.begin(engine.device)
    checkpoints = Checkpoints(
        plan.folder / "checkpoints", rank=group.rank, barrier=group.all, keep_last=config.train.keep_last
    )
    log = Log(plan.folder, group.rank)

    # -- resume ------------------------------------------------------------------------------------------------
    state = State()
    if (found := checkpoints.latest()) is not None:
        engine.load(found.path)
        state = restore(found)
    log.rewind(state.step)
    for words in learner.notes if not state.step else ():
        log.write({"kind": "note", "step": 0, "note": words})
    validation_rows = learner.rows(group.blocks("validation"))

    # -- train -------------------------------------------------------------------------------------------------
    meter, phases = Meter(), Phases(engine.device)
    engines.tell(engine, phases)
    feed = Feed(learner.steps(group.blocks("train")))
    done, stopping, stage = state.step >= plan.total_steps, 0.0, -1
    while not done:
        phases.enter("wait")
        taught = feed.next(meter)
        phases.enter("other")
        torch.manual_seed(step_seed(config.seed, state.step, group.rank))
        if (opened := freeze.stage(model, config.freeze, state.step, plan.total_steps)) != stage:
            freeze.thaw(model, config.freeze, stage := opened)
        rate = engine.set_lr(engines.schedule(state.step, plan.total_steps, config), stage)
        engine.begin(len(taught.micros))
        for micro in taught.micros:
            phases.enter("copy")
            batch = engines.moved(micro, engine.device)
            phases.enter("forward")
            out = engine.forward(batch)
            loss = learner.loss(out, batch)
            meter.add(*learner.hits(out, batch), loss * config.train.micro_batch)
            phases.enter("backward")
            engine.backward(loss)
            phases.enter("optimizer")
            engine.step()
        phases.enter("other")
        state.step, state.position = state.step + 1, plan.order.advance(state.position, config.global_batch)
        meter.end_step(config.train.micro_batch * config.train.accumulation)

        stop = (plan.folder / STOP_FILE).exists() if group.rank == 0 else False
        due = state.step % config.train.eval_every_steps == 0 or state.step >= plan.total_steps
        log_due = group.rank == 0 and (meter.since_log_s() >= _LOG_EVERY_S or due)
        with phases.within("communication"):
            stopping, logging, bad, cut = group.sum([stop, log_due, taught.bad_rows, taught.cut_rows])
        state.bad_rows, state.cut_rows = state.bad_rows + int(bad), state.cut_rows + int(cut)
        if state.bad_rows > plan.max_bad_rows:
            raise BadRowsError(
                f"{state.bad_rows} rows could not be read, more than data.max_bad_share={config.data.max_bad_share} "
                f"of the split allows ({plan.max_bad_rows}); the last: {learner.last_error}"
            )
        if logging:
            figures = meter.read(group)
            figures |= phases.read(group, figures["steps"])
            log.write(
                {
                    "kind": "train",
                    "step": state.step,
                    "total_steps": plan.total_steps,
                    "lr": rate,
                    "epoch": state.position.epoch,
                    "bad_rows": state.bad_rows,
                    "cut_rows": state.cut_rows,
                    **figures,
                }
            )
        if due:
            phases.enter(VALIDATION)
            score, metrics = learner.validate(engine, validation_rows, group)
            note(state, score, metrics["loss"], config.train.min_gain)
            told = {"main": learner.main, "score": score, **metrics}
            log.write({"kind": "validation", "step": state.step, "epoch": state.position.epoch, **told})
        if due or stopping:
            # Only what was validated just now may be taken for the best.
            phases.enter("checkpoint")
            checkpoints.save(engine.save, state_dict(state if due else replace(state, score=UNSCORED)))
            phases.enter("other")
            meter.restart()
        if due:
            group.report({"step": float(state.step), "score": state.score, "best_score": state.best_score, **metrics})
        early = 0 < config.train.patience <= state.unimproved
        done = bool(stopping) or early or state.step >= plan.total_steps
    feed.close()

    # -- export ------------------------------------------------------------------------------------------------
    if plan.bundle is None or stopping:  # what rank 0 saw, not the file: all ranks must go the same way
        return
    best = checkpoints.best()
    assert best is not None, "the last step always saves a checkpoint"
    engine.load(best.path)
    chosen = {"step": best.step, "score": best.loop["score"], "wait_share": meter.wait_share()}
    learner.export(engine, validation_rows, group, chosen)
    group.all(True)


class Feed:
    """Makes the next steps' batches in a thread while this one computes; the errors of the thread are raised here."""

    def __init__(self, steps: Iterator[Step]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._closed = False
        self._thread = threading.Thread(target=self._fill, args=(steps,), daemon=True, name="feed")
        self._thread.start()

    def next(self, meter: Meter) -> Step:
        started = time.perf_counter()
        item = self._queue.get()
        waited = time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        meter.waited(waited)
        step: Step = item
        return step

    def close(self) -> None:
        self._closed = True

    def _fill(self, steps: Iterator[Step]) -> None:
        try:
            for item in steps:
                self._put(item)
                if self._closed:
                    return
            self._put(RuntimeError("the stream ended before the last step"))
        except BaseException as error:  # noqa: BLE001  goes to the loop, which raises it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed:
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=1.0)
                return


def note(state: State, score: float, loss: float, min_gain: float) -> None:
    """Takes a validation's score into the state; what is better by less than `min_gain` is the best, but no gain.

    On few validation rows many steps share the best score: of those a lower loss goes on as a gain, so that a run whose
    learning rate is still high is not taken for one that has learnt all it can. Not where every answer is right: a loss
    falls for long after that.
    """
    state.score, state.loss = score, loss
    surer = score == state.best_score and loss < state.best_loss
    if score > state.best_score or surer:
        state.best_score, state.best_step, state.best_loss = score, state.step, loss
    if score > state.gained_score + min_gain or (surer and not min_gain and score < PERFECT):
        state.gained_score, state.unimproved = score, 0
    else:
        state.unimproved += 1


def state_dict(state: State) -> dict[str, Any]:
    return {**asdict(state), "position": asdict(state.position)}


def restore(checkpoint: Checkpoint) -> State:
    """The loop's state of a checkpoint."""
    return State(**{**checkpoint.loop, "position": Position(**checkpoint.loop["position"])})


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the dropout of one step on one rank."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
