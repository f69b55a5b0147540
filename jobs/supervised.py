"""What a run teaches by labels: the model of a config, its micro-batches, its losses, and the bundle that it leaves."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from jobs import anchor
from jobs.anchor import Anchor
from jobs.engine import Engine, pinned
from jobs.export import export
from jobs.loop import Plan, Step
from jobs.validation import answers, calibrations, validate
from jobs.workers import Group
from mmagent import bundle as bundles
from mmagent import features, freeze, inheritance, lora, targets
from mmagent.assembly import Model, assemble, load_language, load_reading
from mmagent.augment import Words, augment
from mmagent.batch import Inputs, PartError, Sample
from mmagent.buckets import cuts
from mmagent.config import AugmentConfig, Config
from mmagent.frozen import FrozenStates
from mmagent.model import Batch, align_loss
from mmagent.order import sample_rng
from mmagent.reading import View
from mmagent.record import Message, Record
from mmagent.targets import TargetError
from mmagent.tasks import Task, make_all
from mmagent.text import TextEncoder


class Supervised:
    """Teaches tasks by labels, and leaves a bundle."""

    def __init__(self, plan: Plan) -> None:
        config = plan.config
        self._plan, self._config = plan, config
        self._tasks = make_all(plan.tasks)
        self._encoder = load_language(config.model, self._tasks, dropout=config.model.backbone_dropout)
        self._anchor: Anchor | None = None
        self._tokenizer = load_reading(config.model)
        self._inputs = Inputs(config.model, config.data, self._tokenizer, self._tasks, self._encoder)
        self.model = build(config, self._tasks, self._encoder)
        self._stored = {kept.kind for kept in plan.features}
        self._inputs.stored = towers_stored(self.model, self._stored)
        scores = {task.score for task in self._tasks.values()}
        self.main = scores.pop() if len(self._tasks) == 1 else "score"

    def begin(self, device: torch.device) -> None:
        options = {"max_mb": 0} if "text" in self._stored else {}
        frozen = (
            FrozenStates(self._encoder, device=device, exact=True, **options) if self.model.backbone is None else None
        )
        self._batches = Batches(self._inputs, frozen, self._config, self._plan.label_weights, device)
        start = self._config.start
        if start.hold != "none" or start.distil:
            self._anchor = Anchor(self._config, self.model, device)

    @property
    def last_error(self) -> str:
        return self._batches.last_error

    @property
    def notes(self) -> list[str]:
        return self._encoder.unpacked()

    def rows(self, tables: Iterator[pa.Table]) -> list[Sample]:
        found = (self._batches.sample(row, None)[0] for table in tables for row in table.to_pylist())
        samples = [sample for sample in found if sample.weight > 0]
        if self._anchor is not None and self._anchor.wants_rows:
            config, batches = self._config, self._batches
            encoder = load_language(config.model, self._tasks, dropout=config.model.backbone_dropout)
            fresh = build(config, self._tasks, encoder)
            towers_stored(fresh, self._stored)
            given = functools.partial(loss_of, tasks=self._tasks, config=config)
            self._anchor.weigh(fresh, samples, batches.make, given, batches.device)
        return samples

    def steps(self, tables: Iterator[pa.Table]) -> Iterator[Step]:
        return self._batches.steps(tables)

    def loss(self, out: Batch, batch: Batch) -> torch.Tensor:
        loss = loss_of(out, batch, self._tasks, self._config)
        return loss if self._anchor is None else loss + self._anchor.loss(out, batch)

    def hits(self, out: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return hits_of(out, batch, self._tasks)

    def validate(self, engine: Engine, rows: list[Sample], group: Group) -> tuple[float, dict[str, float]]:
        return validate(engine, self._batches, rows, group)

    def export(self, engine: Engine, rows: list[Sample], group: Group, chosen: dict[str, Any]) -> None:
        answered, _ = answers(engine, self._batches, rows, group)
        weights = engine.state(self._plan.folder)
        if group.rank == 0:
            path, fitted = self._plan.bundle, calibrations(self._tasks, answered)
            assert path is not None
            # Merged weights are the export's alone, which lets them go when they are written.
            given = (self._encoder, self._tokenizer, fitted, chosen)
            export(path, self._plan, lora.merged(self.model, weights), *given)


def build(config: Config, tasks: Mapping[str, Task], encoder: TextEncoder, *, weights: bool = True) -> Model:
    """The module that trains; the language model is part of it unless its states may be kept in memory.

    Raises:
        ValueError: the config makes no model.
    """
    torch.manual_seed(config.seed)
    trained = freeze.needs_backbone(config.freeze.strategy) or config.train.cache == "none"
    begun = bundles.load(config.start.bundle) if config.start.bundle and weights else None
    model = assemble(config.model, tasks, encoder, trained=trained, weights=weights and begun is None)
    if begun is not None:
        inheritance.take(model, begun)
    freeze.apply(model, config.freeze)
    if config.train.gradient_checkpointing:
        freeze.compute_again(model)
    return model


def towers_stored(model: Model, kinds: Collection[str]) -> dict[str, tuple[int, int]]:
    """Has towers take states that were computed before; the shape of each one's."""
    found = {}
    for kind in ("image", "audio"):
        if kind in kinds:
            tower = getattr(model, f"{kind}_tower")
            tower.stored = True
            found[kind] = tower.shape
    return found


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

    def steps(self, tables: Iterator[pa.Table]) -> Iterator[Step]:
        """For each table of a stream its micro-batches."""
        for table in tables:
            pairs = [self.sample(row, row["epoch"]) for row in table.to_pylist()]
            samples = [sample for sample, _ in pairs]
            made = [self.make(samples[part], train=True) for part in cuts(table["micro"].to_numpy())]
            yield Step(made, sum(bad for _, bad in pairs), sum(sample.cut > 0 for sample in samples))

    def sample(self, row: dict[str, Any], epoch: int | None) -> tuple[Sample, bool]:
        """A row decoded, augmented where `epoch` is given; a blank of weight 0 and True where it cannot be read."""
        record = Record.from_row(row)
        try:
            targets.check(record)
            known = features.unpacked(row.get(features.COLUMN))
            sample = self.inputs.sample(record, View(np.asarray(row["ids"], dtype=np.int64), cut=row["cut"]), known)
        except (PartError, TargetError) as error:
            self.last_error = f"row {row['id']!r}: {error}"
            return self._blank(row["id"]), True
        if epoch is None:
            return sample, False
        weight = self.label_weights.get(sample.task, {}).get(sample.record.target.label or "", 1.0)
        sample = replace(sample, weight=sample.weight * weight)
        if self.config.augment == AugmentConfig():
            return sample, False
        rng = sample_rng(self.config.seed, epoch, sample.id)
        return augment(sample, self.config.augment, self.words, rng), False

    def _blank(self, id: str) -> Sample:
        """What stands for a row that cannot be read."""
        return replace(self.blank, record=replace(self.blank.record, id=id))

    @torch.no_grad()
    def make(self, samples: list[Sample], *, train: bool = False) -> Batch:
        """The tensors of a micro-batch, with the states of a frozen language model where there is one; ready to go to
        the device."""
        batch = self.inputs.batch(samples)
        if self.config.start.distil:
            batch[anchor.REPLAYED] = anchor.replayed(samples, batch["sample_row"])
        if self.frozen is not None:
            known = {key: states for sample in samples for key, states in sample.known.items()}
            batch["text_states"] = self.frozen(batch["ids"], batch["mask"], known)
            if train and "transcript_ids" in batch:
                batch["transcript_states"] = self.frozen(batch["transcript_ids"], batch["transcript_mask"], known)
        return pinned(batch, self.device)
