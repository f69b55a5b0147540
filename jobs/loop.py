"""The training loop, as one worker runs it: read it top to bottom.

Its state is named (`State`) and saved with every checkpoint; everything random in a step is a function of the seed,
the step and the sample, so that a run that was stopped and goes on does what it would have done.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from jobs import engine as engines
from jobs import failures, spike
from jobs.checkpoint import Checkpoint, Checkpoints
from jobs.engine import Engine
from jobs.meter import Log, Meter
from jobs.phases import VALIDATION, Phases
from jobs.spike import Usual
from jobs.trace import Trace
from jobs.vigil import Post
from jobs.workers import Final, Group
from mmagent import freeze, storage
from mmagent.config import Config
from mmagent.features import Kept
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
        """For each table of a stream, in turn, its micro-batches, as its rows' numbers cut them; ready to go to the
        device."""
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


class BadRowsError(Final):
    """More rows that cannot be read than the config allows; names the last."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every rank knows before the first step."""

    learner: Callable[[Plan], Learner]
    root: Mapping[str, str]  # `storage.variables` of the command
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
    features: tuple[Kept, ...] = ()  # states of frozen parts that come with the rows
    stages: tuple[int, ...] = ()  # steps that are validated beside those of the config: where a search compares


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
    cooling: int = 0  # the step with which patience was used up, from which the rate falls; 0: none yet
    end: int = 0  # the last step, where patience was used up; 0: the plan's
    bad_rows: int = 0  # of all that were read, each as often as it was
    cut_rows: int = 0  # likewise
    usual: Usual = field(default_factory=Usual)  # the losses so far
    skipped: int = 0  # batches left out for their loss
    skips_in_row: int = 0  # just before this step


def train(group: Group, plan: Plan) -> None:
    """One worker's whole run: set up, resume, train, export.

    Raises:
        CheckpointError: a checkpoint could not be written.
        BadLossError: a loss that is no number or jumped, and `train.on_bad_loss` or `train.max_skips` stops there.
        BadRowsError: more bad rows than `data.max_bad_share` allows.
    """
    with contextlib.ExitStack() as held:
        _train(group, plan, held)


def _train(group: Group, plan: Plan, held: contextlib.ExitStack) -> None:
    # -- set up ------------------------------------------------------------------------------------------------
    storage.use(plan.root)
    storage.watch(plan.folder / STOP_FILE)
    config = plan.config
    post = Post(plan.folder, group.rank, config.train.alarm_minutes)
    if group.failure is not None:
        failures.wait(group.failure, (plan.folder / STOP_FILE).exists)
    learner = plan.learner(plan)
    model, share = learner.model, config.share(group.world)
    engine = held.enter_context(contextlib.closing(engines.make(model, freeze.groups(model, config), config)))
    learner.begin(engine.device)
    checkpoints = Checkpoints(
        plan.folder / "checkpoints",
        rank=group.rank,
        world=group.world,
        barrier=group.all,
        keep_last=config.train.keep_last,
        keep_best=config.train.keep_best,
    )
    log = Log(plan.folder, group.rank, group.world, engines.kind(engine.device))
    log.used()
    trace = Trace(plan.folder, group.rank) if config.train.trace else None

    # -- resume ------------------------------------------------------------------------------------------------
    state = State()
    if (found := checkpoints.latest()) is not None:
        engine.load(found.path)
        state = restore(found)
    log.rewind(state.step)
    if trace is not None:
        trace.rewind(state.step)
    for line in checkpoints.torn:
        log.write({"kind": "torn", "step": state.step, "reason": line})
    if (failure := group.failure) is not None:
        told = {"count": failure.count, "reason": failure.reason, "pause_s": failure.pause_s}
        log.write({"kind": "restart", "step": state.step, **told})
    for words in learner.notes if not state.step else ():
        log.write({"kind": "note", "step": 0, "note": words})
    validation_rows = learner.rows(group.blocks("validation"))

    # -- train -------------------------------------------------------------------------------------------------
    meter, phases = Meter(), Phases(engine.device)
    engines.tell(engine, phases)
    feed = Feed(learner.steps, group.blocks("train"))
    done, stopping, stage, saved_s = state.step >= last_step(state, plan), 0.0, -1, time.monotonic()
    drained = False
    while not done:
        post.at("data", step=state.step)
        phases.enter("wait")
        table, taught = feed.next(meter)
        phases.enter("other")
        seed_step(config.seed, state.step, group.rank)
        if (opened := freeze.stage(model, config.freeze, state.step, plan.total_steps)) != stage:
            freeze.thaw(model, config.freeze, stage := opened)
        rate = engine.set_lr(factor(state, plan), stage)
        passes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # right, known, loss
        engine.begin(len(taught.micros))
        for micro in taught.micros:
            if passes:
                phases.enter("optimizer")
                engine.step()
            phases.enter("copy")
            batch = engines.moved(micro, engine.device)
            post.at("forward", shapes={name: value.shape for name, value in batch.items()})
            phases.enter("forward")
            out = engine.forward(batch)
            loss = learner.loss(out, batch) * share.factor
            passes.append((*learner.hits(out, batch), loss.detach()))
            post.at("backward")
            phases.enter("backward")
            engine.backward(loss)
        phases.enter("other")

        # What one rank knows becomes what all know, before any moves a parameter.
        post.at("collective")
        losses = [float(loss) for _, _, loss in passes]
        step = state.step + 1
        due = step % config.train.eval_every_steps == 0 or step in plan.stages or step >= last_step(state, plan)
        asked, first = group.asked(), group.rank == 0
        stop = bool(asked) or (first and (plan.folder / STOP_FILE).exists())
        log_due = first and (meter.since_log_s() >= _LOG_EVERY_S or due)
        save_due = first and _save_due(config, step, time.monotonic() - saved_s)
        mine = [
            sum(losses), share.passes, taught.bad_rows, taught.cut_rows,
            checkpoints.failed, stop, group.drained(), log_due, save_due,
        ]  # fmt: skip
        with phases.within("communication"):
            total, count, bad, cut, failed, stopping, leaving, logging, saving = group.sum(mine)
        if failed:
            checkpoints.wait()  # raises what the thread met
        state.bad_rows, state.cut_rows = state.bad_rows + int(bad), state.cut_rows + int(cut)
        if state.bad_rows > plan.max_bad_rows:
            raise BadRowsError(
                f"{state.bad_rows} rows could not be read, more than data.max_bad_share={config.data.max_bad_share} "
                f"of the split allows ({plan.max_bad_rows}); the last: {learner.last_error}"
            )
        if fault := spike.fault(total / count, state.usual, config.train.max_loss_jump):
            words = spike.leave_out(group, plan, state, table, losses, fault)
            log.write({"kind": "skip", "step": step, "skipped": state.skipped, "reason": words})
            engine.skip()
        else:
            state.skips_in_row = 0
            state.usual.add(total / count)
            for right, known, loss in passes:
                meter.add(right, known, loss * (share.batch / (share.world * share.passes)))
        post.at("step")
        phases.enter("optimizer")
        engine.step()
        phases.enter("other")
        state.step, state.position = step, plan.order.advance(state.position, share.batch)
        meter.end_step(0.0 if fault else share.batch / share.world)
        if trace is not None:
            trace.write(step, table, losses)

        noticed, drained = bool(leaving) and not drained, bool(leaving) or drained
        saving = bool(saving or stopping or noticed or due)
        if (logging or saving) and not state.skips_in_row:
            figures = meter.read(group)
            figures |= phases.read(group, figures["steps"])
            log.write(
                {
                    "kind": "train",
                    "step": state.step,
                    "total_steps": last_step(state, plan),
                    "lr": rate,
                    "epoch": state.position.epoch,
                    "bad_rows": state.bad_rows,
                    "cut_rows": state.cut_rows,
                    "skipped": state.skipped,
                    **figures,
                }
            )
        if due:
            post.at("validation", step=state.step)
            phases.enter(VALIDATION)
            score, metrics = learner.validate(engine, validation_rows, group)
            note(state, score, metrics["loss"], config.train.min_gain)
            found_now = {"main": learner.main, "score": score, **metrics}
            log.write({"kind": "validation", "step": state.step, "epoch": state.position.epoch, **found_now})
            if words := cool(state, config, plan.total_steps):
                log.write({"kind": "note", "step": state.step, "note": words})
        if saving:
            post.at("checkpoint", step=state.step)
            # Only what was validated just now may be taken for the best.
            phases.enter("checkpoint")
            checkpoints.begin(engine.save, state_dict(state if due else replace(state, score=UNSCORED)))
            saved_s = time.monotonic()
            phases.enter("other")
            meter.restart()
        done = bool(stopping) or state.step >= last_step(state, plan)
        if due:
            if plan.bundle is None:  # a trial of a search: whoever compares it may take what it has learned
                checkpoints.wait()
            where = {"step": float(state.step), "total_steps": float(plan.total_steps), "done": float(done)}
            goes_on = group.all(group.report({**where, "score": score, **metrics}))
            stopping, done = float(bool(stopping) or not (goes_on or done)), done or not goes_on
        if stopping:
            reasons = [f"rank {rank}: {why}" for rank, why in enumerate(group.gather(asked)) if why]
            log.write({"kind": "stop", "step": state.step, "reason": "; ".join(reasons) or "asked to"})
        if noticed:  # no end of the group's: until Ray takes the machine away there is time to learn
            log.write({"kind": "drain", "step": state.step})
    feed.close()
    checkpoints.wait()

    # -- export ------------------------------------------------------------------------------------------------
    if plan.bundle is None or stopping:  # what all agreed on, not the file: all ranks must go the same way
        log.used()
        post.close()
        return
    post.at("export")
    best = checkpoints.best()
    assert best is not None, "the last step always saves a checkpoint"
    engine.load(best.path)
    chosen = {"step": best.step, "score": best.loop["score"], "wait_share": meter.wait_share()}
    learner.export(engine, validation_rows, group, chosen)
    group.all(True)
    log.used()
    post.close()


class Feed:
    """Makes the next steps' batches in a thread while this one computes; the errors of the thread are raised here. The
    thread ends when it is closed, or gone with a training that failed."""

    def __init__(self, steps: Callable[[Iterator[pa.Table]], Iterator[Step]], tables: Iterator[pa.Table]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2)
        closed = threading.Event()
        self.close = weakref.finalize(self, closed.set)
        arguments = (self._queue, closed, steps, tables)
        threading.Thread(target=_fill, args=arguments, daemon=True, name="feed").start()

    def next(self, meter: Meter) -> tuple[pa.Table, Step]:
        """The rows of the next step, and what was made of them."""
        started = time.perf_counter()
        item = self._queue.get()
        waited = time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        meter.waited(waited)
        table, step = item
        return table, step


def _fill(
    filled: queue.Queue[Any],
    closed: threading.Event,
    steps: Callable[[Iterator[pa.Table]], Iterator[Step]],
    tables: Iterator[pa.Table],
) -> None:
    """The life of a feed's thread."""
    read: deque[pa.Table] = deque()

    def noted() -> Iterator[pa.Table]:
        for table in tables:
            read.append(table)
            yield table

    def put(item: Any) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                filled.put(item, timeout=1.0)
                return

    try:
        for item in steps(noted()):
            put((read.popleft(), item))
            if closed.is_set():
                return
        put(RuntimeError("the stream ended before the last step"))
    except BaseException as error:  # noqa: BLE001  goes to the loop, which raises it
        put(error)


def _save_due(config: Config, step: int, since_s: float) -> bool:
    """Whether a checkpoint is due beside those of validations."""
    steps, minutes = config.train.checkpoint_every_steps, config.train.checkpoint_every_minutes
    return bool(steps and step % steps == 0) or bool(minutes and since_s >= minutes * 60)


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


def cool(state: State, config: Config, total_steps: int) -> str:
    """After a validation: settles the last step where patience is used up, and says so; empty where it is not.

    A run that learns no more at a high rate has not learned all it can: its weights jump about a good place.
    """
    if state.end or not 0 < config.train.patience <= state.unimproved:
        return ""
    more = round(config.train.cooldown * state.step)
    state.cooling, state.end = state.step, min(total_steps, state.step + more)
    since = f"no better validation since step {state.best_step}"
    return f"{since}: the learning rate falls, and step {state.end} is the last" if more else f"{since}: training ends"


def last_step(state: State, plan: Plan) -> int:
    return min(state.end or plan.total_steps, plan.total_steps)


def factor(state: State, plan: Plan) -> float:
    """The learning rate of the next step, as a share of its peak."""
    if state.end > state.step:
        return engines.cooldown(state.step, state.cooling, state.end, plan.total_steps, plan.config)
    return engines.schedule(state.step, plan.total_steps, plan.config)


def state_dict(state: State) -> dict[str, Any]:
    return {**asdict(state), "position": asdict(state.position)}


def restore(checkpoint: Checkpoint) -> State:
    """The loop's state of a checkpoint."""
    loop = checkpoint.loop
    return State(**{**loop, "position": Position(**loop["position"]), "usual": Usual(**loop["usual"])})


def seed_step(seed: int, step: int, rank: int) -> None:
    """Sets all that is random in one step on one rank: dropout, and what models of Transformers draw from numpy."""
    made = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(made)
    np.random.seed(made)
    random.seed(made)
