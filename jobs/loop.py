"""The training loop, as one worker runs it: read it top to bottom.

Its state is named (`State`) and saved with every checkpoint; everything random in a step is a function of the seed,
the step and the sample, so that a run that was stopped and goes on does what it would have done.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
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
from mmagent import freeze, text
from mmagent.batch import Inputs, PartError, Sample, augment, drop_tokens
from mmagent.calibration import softmax
from mmagent.config import Config
from mmagent.model import Batch, MultimodalModel, align_loss, classify_loss
from mmagent.order import Order, Position, sample_rng
from mmagent.predictor import modalities_of
from mmagent.record import Record
from mmagent.text import FrozenStates, TextEncoder

STOP_FILE = "stop"  # in the run's folder: the loop saves and ends at the next step
_LOG_EVERY_S = 5.0


class BadRowsError(ValueError):
    """More rows that cannot be read than the config allows; names the last."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every rank knows before the first step."""

    config: Config
    labels: tuple[str, ...]
    label_weights: tuple[float, ...]  # of training samples, by label (see train.class_balance)
    folder: Path  # of the run
    name: str  # of the bundle
    bundle: Path | None  # where it goes; none: the run ends without
    data: str  # name of the data set
    order: Order
    total_steps: int
    max_bad_rows: int
    golden_source: tuple[Path, ...]  # shards of the validation split


@dataclass(slots=True)
class State:
    """Where the loop stands; all of it is in every checkpoint."""

    step: int = 0
    position: Position = field(default_factory=Position)
    score: float = -1.0  # of the last validation
    best_score: float = -1.0
    best_step: int = 0
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
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    inputs = Inputs(config.model, config.data, tokenizer, plan.labels)
    model = build(config, len(plan.labels), encoder)
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
    done, stopping = state.step >= plan.total_steps, 0.0
    while not done:
        micros, bad = feed.next(meter)
        torch.manual_seed(step_seed(config.seed, state.step, group.rank))
        rate = engine.set_lr(engines.schedule(state.step, plan.total_steps, config))
        for batch in micros:
            out = engine.forward(batch)
            loss = loss_of(out, batch, config)
            meter.add(out["logits"], batch, loss)
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
            note(state, score)
            log.write({"kind": "validation", "step": state.step, "epoch": state.position.epoch, **metrics})
        if due or stopping:
            # Only what was validated just now may be taken for the best.
            checkpoints.save(engine.save, state_dict(state if due else replace(state, score=-1.0)))
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
    answered = answers(engine, batches, validation_rows, group)
    weights = engine.state()
    if group.rank == 0:
        chosen = {"step": best.step, "score": best.loop["score"], "wait_share": meter.wait_share()}
        export(plan.bundle, plan, weights, encoder, tokenizer, answered, plan.golden_source, chosen)
    group.all(True)


def build(config: Config, num_labels: int, encoder: TextEncoder, *, weights: bool = True) -> MultimodalModel:
    """The module that trains; the language model is part of it unless its states may be kept in memory.

    Raises:
        ValueError: the config makes no model.
    """
    torch.manual_seed(config.seed)
    inside = freeze.needs_backbone(config.freeze.strategy) or not config.train.cache_text
    model = MultimodalModel(config.model, num_labels, encoder.width, encoder if inside else None, weights=weights)
    freeze.apply(model, config.freeze.strategy)
    return model


def loss_of(out: Batch, batch: Batch, config: Config) -> torch.Tensor:
    """The loss of a micro-batch, normalised so that any split of a batch over workers sums to the same."""
    size = config.train.micro_batch
    loss = classify_loss(out["logits"], batch["label"], batch["weight"], size, config.train.label_smoothing)
    if "image_logits" in out:
        assert config.model.image is not None
        row = batch["image_row"]
        weights = batch["weight"][row] * batch["image_real"]
        alone = classify_loss(out["image_logits"], batch["label"][row], weights, size)
        loss = loss + config.model.image.alone * alone
    if "transcript_states" in batch:
        assert config.model.audio is not None
        real = (batch["audio_real"] & (batch["weight"][batch["audio_row"]] > 0)).to(loss.dtype)
        words = batch["transcript_states"], batch["transcript_ids"], batch["transcript_mask"]
        taught = align_loss(out["speech"], *words, real, size)
        loss = loss + config.model.audio.align * taught
    return loss


class Batches:
    """Makes the micro-batches of a step from the rows of a stream; counts what cannot be read."""

    def __init__(
        self,
        inputs: Inputs,
        frozen: FrozenStates | None,
        config: Config,
        label_weights: Sequence[float],
        device: torch.device,
    ) -> None:
        self.inputs, self.frozen, self.config, self.device = inputs, frozen, config, device
        self.label_weights = label_weights
        self.last_error = ""
        self.blank = Sample("", np.asarray(inputs.tokenize([""])[0]), False, (), (), -100, 0.0)

    def steps(self, tables: Iterator[pa.Table]) -> Iterator[tuple[list[Batch], int]]:
        """For each table of a stream its micro-batches, and how many rows could not be read."""
        size = self.config.train.micro_batch
        for table in tables:
            pairs = [self.sample(row, row["epoch"]) for row in table.to_pylist()]
            samples = [sample for sample, _ in pairs]
            made = [self.make(samples[at : at + size], samples[at].id) for at in range(0, len(samples), size)]
            yield made, sum(bad for _, bad in pairs)

    def sample(self, row: dict[str, Any], epoch: int | None) -> tuple[Sample, bool]:
        """A row decoded, augmented where `epoch` is given; a blank of weight 0 and True where it cannot be read."""
        if row["error"]:
            self.last_error = f"row {row['id']!r}: {row['error']}"
            return replace(self.blank, id=row["id"]), True
        try:
            sample = self.inputs.sample(Record.from_row(row), np.asarray(row["ids"], dtype=np.int64))
        except PartError as error:
            self.last_error = f"row {row['id']!r}: {error}"
            return replace(self.blank, id=row["id"]), True
        if epoch is None:
            return sample, False
        if sample.label >= 0:
            sample = replace(sample, weight=sample.weight * self.label_weights[sample.label])
        return augment(sample, self.config.augment, sample_rng(self.config.seed, epoch, sample.id)), False

    @torch.no_grad()
    def make(self, samples: list[Sample], drop_key: str | None = None) -> Batch:
        """The tensors of a micro-batch, with the states of a frozen language model where there is one."""
        batch = self.inputs.batch(samples)
        if drop_key is not None:
            rng = sample_rng(self.config.seed, 0, drop_key)
            batch["keep"] = drop_tokens(batch["keep"], self.config.augment.text_drop, rng)
        if self.frozen is not None:
            batch["text_states"] = self.frozen(batch["ids"], batch["mask"])
            if drop_key is not None and "transcript_ids" in batch:
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


@torch.no_grad()
def answers(
    engine: Engine, batches: Batches, samples: list[Sample], group: Group
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ranks' answers to their validation samples, on every rank: logits (n, labels), labels (n,), modalities (n,).

    Every rank makes the same number of forward passes: ZeRO-3 gathers weights in each.
    """
    engine.model.eval()
    size = batches.config.train.micro_batch * 2
    passes = int(max(group.gather(-(-len(samples) // size))))
    logits = []
    for at in range(0, passes * size, size):
        part = samples[at : at + size] or [batches.blank]
        logits.append(
            engine.forward(batches.make(part))["logits"].float().cpu().numpy()[: len(samples[at : at + size])]
        )
    engine.model.train()
    mine = (np.concatenate(logits), np.array([s.label for s in samples]), [modalities_of(s) for s in samples])
    everyones = group.gather(mine)
    return (
        np.concatenate([part[0] for part in everyones]),
        np.concatenate([part[1] for part in everyones]),
        np.array([kind for part in everyones for kind in part[2]]),
    )


def validate(engine: Engine, batches: Batches, samples: list[Sample], group: Group) -> tuple[float, dict[str, float]]:
    """The score (accuracy) on the validation samples, with the loss, and the accuracy for each kind of input."""
    logits, labels, kinds = answers(engine, batches, samples, group)
    right = logits.argmax(1) == labels
    chances = softmax(logits)[np.arange(len(labels)), labels]
    metrics = {"accuracy": float(right.mean()), "loss": float(-np.log(np.maximum(chances, 1e-12)).mean())}
    for kind in sorted(set(kinds.tolist())):
        metrics[f"accuracy/{kind}"] = float(right[kinds == kind].mean())
    return metrics["accuracy"], metrics


def note(state: State, score: float) -> None:
    """Takes a validation's score into the state."""
    state.score = score
    if score > state.best_score:
        state.best_score, state.best_step, state.unimproved = score, state.step, 0
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
