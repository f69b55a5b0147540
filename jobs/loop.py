"""The training loop, as one worker runs it: read it top to bottom.

Its state is named (`State`) and saved with every checkpoint; everything random in a step is a function of the seed,
the step and the sample, so that a run that was stopped and goes on does what it would have done.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from jobs import engine as engines
from jobs.checkpoint import Checkpoint, Checkpoints
from jobs.engine import Engine
from jobs.export import export
from jobs.meter import Log, Meter
from jobs.workers import Group
from mmagent import freeze, lora, text
from mmagent.augment import Words, augment
from mmagent.batch import Inputs, PartError, Sample
from mmagent.calibration import Calibration
from mmagent.config import Config
from mmagent.model import Batch, MultimodalModel, align_loss
from mmagent.order import Order, Position, sample_rng
from mmagent.predictor import modalities_of
from mmagent.reading import View
from mmagent.record import Message, Record
from mmagent.targets import TaskInfo
from mmagent.tasks import Outcome, Task, make_all
from mmagent.text import FrozenStates, TextEncoder

UNSCORED = -1e30  # below any score; JSON has no infinity
STOP_FILE = "stop"  # in the run's folder: the loop saves and ends at the next step
_LOG_EVERY_S = 5.0


class BadRowsError(ValueError):
    """More rows that cannot be read than the config allows; names the last."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every rank knows before the first step."""

    config: Config
    tasks: Mapping[str, TaskInfo]
    label_weights: Mapping[str, Mapping[str, float]]  # of training samples, by task and label (train.class_balance)
    folder: Path  # of the run
    name: str  # of the bundle
    bundle: Path | None  # where it goes; none: the run ends without
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
    best_score: float = UNSCORED
    best_step: int = 0
    gained_score: float = UNSCORED  # the last that was better by `train.min_gain`
    unimproved: int = 0
    bad_rows: int = 0


def train(group: Group, plan: Plan) -> None:
    """One worker's whole run: set up, resume, train, export.

    Raises:
        CheckpointError: a checkpoint could not be written.
        FloatingPointError: the loss is no number.
        BadRowsError: more bad rows than `data.max_bad_share` allows.
    """
    # -- set up ------------------------------------------------------------------------------------------------
    config = plan.config
    encoder = text.load_encoder(config.model.backbone, dropout=config.model.backbone_dropout)
    tokenizer = text.load_tokenizer(config.model.backbone)
    tasks = make_all(plan.tasks)
    inputs = Inputs(config.model, config.data, tokenizer, tasks)
    model = build(config, tasks, encoder)
    engine = engines.make(model, freeze.groups(model, config), config)
    frozen = FrozenStates(encoder, device=engine.device) if model.backbone is None else None
    batches = Batches(inputs, frozen, config, plan.label_weights, engine.device)
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
    validation = [batches.sample(row, None) for table in group.blocks("validation") for row in table.to_pylist()]
    validation_rows = [sample for sample, _ in validation if sample.weight > 0]

    # -- train -------------------------------------------------------------------------------------------------
    meter = Meter()
    feed = Feed(batches.steps(group.blocks("train")))
    done, stopping, stage = state.step >= plan.total_steps, 0.0, -1
    while not done:
        micros, bad = feed.next(meter)
        torch.manual_seed(step_seed(config.seed, state.step, group.rank))
        if (opened := freeze.stage(model, config.freeze, state.step, plan.total_steps)) != stage:
            freeze.thaw(model, config.freeze, stage := opened)
        rate = engine.set_lr(engines.schedule(state.step, plan.total_steps, config), stage)
        for batch in micros:
            out = engine.forward(batch)
            loss = loss_of(out, batch, tasks, config)
            meter.add(*hits_of(out, batch, tasks), config.train.micro_batch, loss)
            engine.backward(loss)
            engine.step()
        state.step, state.position = state.step + 1, plan.order.advance(state.position, config.global_batch)
        meter.end_step()

        stop = (plan.folder / STOP_FILE).exists() if group.rank == 0 else False
        due = state.step % config.train.eval_every_steps == 0 or state.step >= plan.total_steps
        log_due = group.rank == 0 and (meter.since_log_s() >= _LOG_EVERY_S or due)
        stopping, logging, bad_rows = group.sum([float(stop), float(log_due), float(bad)])
        state.bad_rows += int(bad_rows)
        if state.bad_rows > plan.max_bad_rows:
            raise BadRowsError(
                f"{state.bad_rows} rows could not be read, more than data.max_bad_share={config.data.max_bad_share} "
                f"of the split allows ({plan.max_bad_rows}); the last: {batches.last_error}"
            )
        if logging:
            figures = meter.read(group)
            log.write(
                {
                    "kind": "train",
                    "step": state.step,
                    "total_steps": plan.total_steps,
                    "lr": rate,
                    "epoch": state.position.epoch,
                    **figures,
                }
            )
        if due:
            score, metrics = validate(engine, batches, validation_rows, group)
            note(state, score, config.train.min_gain)
            told = {"main": batches.main, "score": score, **metrics}
            log.write({"kind": "validation", "step": state.step, "epoch": state.position.epoch, **told})
        if due or stopping:
            # Only what was validated just now may be taken for the best.
            checkpoints.save(engine.save, state_dict(state if due else replace(state, score=UNSCORED)))
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
    answered, _ = answers(engine, batches, validation_rows, group)
    weights = engine.state()
    if group.rank == 0:
        weights = lora.merged(model, weights)
        chosen = {"step": best.step, "score": best.loop["score"], "wait_share": meter.wait_share()}
        export(plan.bundle, plan, weights, encoder, tokenizer, calibrations(tasks, answered), chosen)
    group.all(True)


def build(config: Config, tasks: Mapping[str, Task], encoder: TextEncoder, *, weights: bool = True) -> MultimodalModel:
    """The module that trains; the language model is part of it unless its states may be kept in memory.

    Raises:
        ValueError: the config makes no model.
    """
    torch.manual_seed(config.seed)
    inside = freeze.needs_backbone(config.freeze.strategy) or not config.train.cache_text
    model = MultimodalModel(config.model, tasks, encoder.width, encoder if inside else None, weights=weights)
    freeze.apply(model, config.freeze)
    if config.train.gradient_checkpointing:
        freeze.compute_again(model)
    return model


def loss_of(out: Batch, batch: Batch, tasks: Mapping[str, Task], config: Config) -> torch.Tensor:
    """The loss of a micro-batch, normalised so that any split of a batch over workers sums to the same."""
    size, smoothing = config.train.micro_batch, config.train.label_smoothing
    weights = config.train.task_weights
    loss = torch.stack(
        [weights.get(name, 1.0) * task.loss(out[name], batch, size, smoothing) for name, task in tasks.items()]
    ).sum()
    alone = [name for name in tasks if f"image:{name}" in out]
    if alone:
        assert config.model.image is not None
        shown = of_pictures(batch)
        for name in alone:
            each = tasks[name].loss(out[f"image:{name}"], shown, size, smoothing)
            loss = loss + config.model.image.alone * weights.get(name, 1.0) * each
    if "transcript_states" in batch:
        assert config.model.audio is not None
        real = (batch["audio_real"] & (batch["weight"][batch["audio_row"]] > 0)).to(loss.dtype)
        words = batch["transcript_states"], batch["transcript_ids"], batch["transcript_mask"]
        loss = loss + config.model.audio.align * align_loss(out["speech"], *words, real, size)
    return loss


def of_pictures(batch: Batch) -> Batch:
    """What the losses need of a batch, a row for each picture; of the stand-in with weight 0."""
    row = batch["image_row"]
    rows = {key: value[row] for key, value in batch.items() if "/" in key}
    return rows | {"weight": batch["weight"][row] * batch["image_real"], "sample_row": batch["sample_row"][row]}


def hits_of(out: Batch, batch: Batch, tasks: Mapping[str, Task]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many answers are right, and of how many, over all tasks."""
    each = [task.hits(out[name].detach(), batch) for name, task in tasks.items()]
    return torch.stack([right for right, _ in each]).sum(), torch.stack([known for _, known in each]).sum()


class Batches:
    """Makes the micro-batches of a step from the rows of a stream; counts what cannot be read."""

    def __init__(
        self,
        inputs: Inputs,
        frozen: FrozenStates | None,
        config: Config,
        label_weights: Mapping[str, Mapping[str, float]],
        device: torch.device,
    ) -> None:
        self.inputs, self.frozen, self.config, self.device = inputs, frozen, config, device
        self.label_weights = label_weights
        self.last_error = ""
        self.words = Words.of(inputs.tokenizer)
        record = Record("", (Message("user", ""),), task="", weight=0.0)
        self.blank = Sample(record, (View(inputs.tokenize([""])[0]),), False, (), (), 0.0)
        scores = {task.score for task in inputs.tasks.values()}
        self.main = scores.pop() if len(inputs.tasks) == 1 else "score"  # how the score of a validation is called

    def steps(self, tables: Iterator[pa.Table]) -> Iterator[tuple[list[Batch], int]]:
        """For each table of a stream its micro-batches, and how many rows could not be read."""
        size = self.config.train.micro_batch
        for table in tables:
            pairs = [self.sample(row, row["epoch"]) for row in table.to_pylist()]
            samples = [sample for sample, _ in pairs]
            made = [self.make(samples[at : at + size], train=True) for at in range(0, len(samples), size)]
            yield made, sum(bad for _, bad in pairs)

    def sample(self, row: dict[str, Any], epoch: int | None) -> tuple[Sample, bool]:
        """A row decoded, augmented where `epoch` is given; a blank of weight 0 and True where it cannot be read."""
        if row["error"]:
            self.last_error = f"row {row['id']!r}: {row['error']}"
            return self._blank(row["id"]), True
        try:
            sample = self.inputs.sample(Record.from_row(row), np.asarray(row["ids"], dtype=np.int64))
        except PartError as error:
            self.last_error = f"row {row['id']!r}: {error}"
            return self._blank(row["id"]), True
        if epoch is None:
            return sample, False
        weight = self.label_weights.get(sample.task, {}).get(sample.record.target.label or "", 1.0)
        sample = replace(sample, weight=sample.weight * weight)
        rng = sample_rng(self.config.seed, epoch, sample.id)
        return augment(sample, self.config.augment, self.words, rng), False

    def _blank(self, id: str) -> Sample:
        """What stands for a row that cannot be read."""
        return replace(self.blank, record=replace(self.blank.record, id=id))

    @torch.no_grad()
    def make(self, samples: list[Sample], *, train: bool = False) -> Batch:
        """The tensors of a micro-batch, with the states of a frozen language model where there is one."""
        batch = self.inputs.batch(samples)
        if self.frozen is not None:
            batch["text_states"] = self.frozen(batch["ids"], batch["mask"])
            if train and "transcript_ids" in batch:
                batch["transcript_states"] = self.frozen(batch["transcript_ids"], batch["transcript_mask"])
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}


class Feed:
    """Makes the next steps' batches in a thread while this one computes; the errors of the thread are raised here."""

    def __init__(self, steps: Iterator[tuple[list[Batch], int]]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._closed = False
        self._thread = threading.Thread(target=self._fill, args=(steps,), daemon=True, name="feed")
        self._thread.start()

    def next(self, meter: Meter) -> tuple[list[Batch], int]:
        started = time.perf_counter()
        item = self._queue.get()
        waited = time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        meter.waited(waited)
        batches, bad = item
        return batches, bad

    def close(self) -> None:
        self._closed = True

    def _fill(self, steps: Iterator[tuple[list[Batch], int]]) -> None:
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


@dataclass(frozen=True, slots=True)
class Answered:
    """What the model says of a validation row, before calibration."""

    task: str
    raw: Any  # of `Task.raw`
    record: Record  # without its media
    modalities: str


@torch.no_grad()
def answers(
    engine: Engine, batches: Batches, samples: list[Sample], group: Group
) -> tuple[list[Answered], tuple[float, float]]:
    """All ranks' answers to their validation samples, on every rank; and the summed loss, and the weight it is over.

    Every rank makes the same number of forward passes: ZeRO-3 gathers weights in each.
    """
    engine.model.eval()
    size, tasks = batches.config.train.micro_batch * 2, batches.inputs.tasks
    passes = int(max(group.gather(-(-len(samples) // size))))
    mine: list[Answered] = []
    loss = weight = 0.0
    for at in range(0, passes * size, size):
        part = samples[at : at + size]
        batch = batches.make(part or [batches.blank])
        out = engine.forward(batch)
        for name, task in tasks.items():
            loss += float(task.loss(out[name], batch, 1, 0.0))
        weight += sum(sample.weight for sample in part)
        mine += _answered(tasks, out, batch, part)
    freeze.set_modes(engine.model)
    total, over = group.sum([loss, weight])
    return [item for part in group.gather(mine) for item in part], (total, over)


def _answered(tasks: Mapping[str, Task], out: Batch, batch: Batch, samples: list[Sample]) -> list[Answered]:
    found = []
    arrays = {name: out[name].float().cpu().numpy() for name in tasks}
    rows = batch["sample_row"].cpu().numpy()
    for index, sample in enumerate(samples):
        if sample.task in tasks:
            raw = tasks[sample.task].raw(arrays[sample.task][rows == index], sample.views)
            bare = replace(sample.record, images=(), audios=())
            found.append(Answered(sample.task, raw, bare, modalities_of(sample)))
    return found


def calibrations(tasks: Mapping[str, Task], answered: Sequence[Answered]) -> dict[str, Calibration]:
    """What makes each task's confidence mean what it says."""
    found = {}
    for name, task in tasks.items():
        mine = [item for item in answered if item.task == name]
        golds = [task.gold(item.record) for item in mine]
        known = [index for index, gold in enumerate(golds) if gold is not None]
        found[name] = (
            task.calibrate(
                [mine[index].raw for index in known],
                [golds[index] for index in known],
                [mine[index].modalities for index in known],
            )
            if known
            else Calibration()
        )
    return found


def validate(engine: Engine, batches: Batches, samples: list[Sample], group: Group) -> tuple[float, dict[str, float]]:
    """The score on the validation samples (the mean over tasks of each one's own), with the loss, all metrics, and the
    score for each kind of input."""
    answered, (loss, weight) = answers(engine, batches, samples, group)
    tasks, neutral = batches.inputs.tasks, Calibration()
    metrics, scores = {"loss": loss / max(weight, 1e-9)}, []
    for name, task in tasks.items():
        by_kind: dict[str, list[Outcome]] = {}
        for item in answered:
            if item.task == name and (gold := task.gold(item.record)) is not None:
                decision = task.decide(item.raw, item.record, neutral, item.modalities)
                by_kind.setdefault(item.modalities, []).append(Outcome(gold, decision))
        if not by_kind:
            continue
        before = f"{name}/" if len(tasks) > 1 else ""
        found = task.measure([outcome for part in by_kind.values() for outcome in part])
        scores.append(float(found[task.score]["value"] or 0.0))
        metrics |= {f"{before}{key}": float(number["value"] or 0.0) for key, number in found.items()}
        for kind in sorted(by_kind):
            part = task.measure(by_kind[kind])
            if task.score in part:
                metrics[f"{before}{task.score}/{kind}"] = float(part[task.score]["value"] or 0.0)
    return sum(scores) / max(1, len(scores)), metrics


def note(state: State, score: float, min_gain: float) -> None:
    """Takes a validation's score into the state; what is better by less than `min_gain` is the best, but no gain."""
    state.score = score
    if score > state.best_score:
        state.best_score, state.best_step = score, state.step
    if score > state.gained_score + min_gain:
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
