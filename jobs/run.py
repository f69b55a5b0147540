"""A run: its folder, its lock, and what is fixed before the first step, whoever starts it (a command or a search).

runs/NAME/{config.yaml, metrics.jsonl, tb/, checkpoints/step_N/, evaluation.json, report.html, timing.json, bundle/}
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from jobs import anchor, draw, fitting, states, stream, workers
from jobs.checkpoint import Checkpoints
from jobs.loop import STOP_FILE, Plan, train
from jobs.stream import Layout
from jobs.supervised import Supervised, build
from mmagent import bundle as bundles
from mmagent import defaults, freeze, inheritance, storage, text, towers
from mmagent.assembly import load_language, load_reading
from mmagent.batch import Inputs
from mmagent.bundle import Bundle
from mmagent.config import Config, override, resolve, value
from mmagent.order import Order, Position
from mmagent.shards import Dataset
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all

CONFIG_FILE = "config.yaml"
_SPLITS = ("train", "validation")  # that a run reads


class RunError(ValueError):
    """A run that cannot start; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path
    config: Config
    dataset: Dataset
    plan: Plan
    notes: tuple[str, ...] = ()  # what the recipe left to the data set (see `mmagent.defaults`)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def exported(self) -> bool:
        """Whether the run has its bundle, or what else it makes: nothing is left to train."""
        if self.plan.bundle is not None:
            storage.refresh(self.plan.bundle)
        return self.plan.bundle is not None and (self.plan.bundle / self.plan.seal).is_file()

    def resumed_step(self) -> int:
        found = _checkpoints(self.folder).latest()
        return found.step if found else 0

    def at_its_end(self) -> Run:
        """The same run with no step left: to export what it has."""
        return replace(self, plan=replace(self.plan, total_steps=self.resumed_step()))

    def fit(self) -> bool:
        """Trains to the end and exports, or until asked to stop; whether it came to the end.

        Raises:
            WorkersFailed: see `jobs.workers.run`.
            StatesError: see `jobs.states.keep`.
        """
        stop = self.folder / STOP_FILE
        stop.unlink(missing_ok=True)
        try:
            plan = replace(self.plan, features=states.keep(self.plan, self.dataset, stop.exists))
        except states.Stopped:
            return False
        work = functools.partial(train, plan=plan)
        workers.run(work, self.config, self.folder, streams(plan, self.dataset))
        return self.exported

    def stop(self) -> None:
        """Asks the workers to save and end at their next step."""
        (self.folder / STOP_FILE).touch()


def prepare(
    config: Config, folder: Path, *, name: str | None = None, bundle: Path | None = None, export: bool = True
) -> Run:
    """Checks all that can be checked before a worker starts, and writes the run's config.

    Args:
        folder: the run's own.
        name, bundle: the bundle's name and folder; the run's own name, and ``bundle`` in its folder, where not given.
        export: whether the run ends with a bundle.

    Raises:
        DatasetError, BackboneError: what is missing, and where.
        RunError: a split without rows, a label that training never has, a config that makes no model, or a folder that
            holds another config.
    """
    dataset = Dataset.open(storage.folder("data", config.data.name))
    config = inheritance.settle(config)
    begun = bundles.load(config.start.bundle) if config.start.bundle else None
    _check_splits(dataset, begun)
    if config.data.labels_per_class is not None:
        dataset = _drawn(dataset, config, folder)
    config, notes = defaults.settle(keep_batch(config, folder), dataset)
    text.check(config.model.backbone, config.data.max_text_tokens)
    towers.check(config.model)
    tasks = defaults.described(config, dataset)
    if begun is not None:
        tasks = inheritance.described(tasks, begun)
    anchor.check(config)
    parts, takes = _check_model(config, tasks)
    if config.model.join == "native":
        _check_media(config, dataset, takes)
    if not config.train.micro_batch:
        config, note = _fitted(config, folder, tasks, dataset)
        notes.append(note)
    hold(config, folder)
    order = training_order(dataset, config)
    steps = total_steps(order, config)
    plan = Plan(
        learner=Supervised,
        root=storage.variables(),
        config=config,
        tasks=tasks,
        task=begun.task if begun else dataset.task,
        label_weights={name: _label_weights(info, config.train.class_balance) for name, info in dataset.tasks.items()},
        folder=folder,
        name=name or folder.name,
        bundle=(bundle or folder / "bundle") if export else None,
        seal=bundles.MANIFEST,
        data=config.data.name,
        order=order,
        total_steps=min(steps, config.train.max_steps or steps),
        max_bad_rows=int(config.data.max_bad_share * max(steps * config.global_batch, order.rows)),
        golden_source=tuple(dataset.shard_files("validation")),
        parts=parts,
    )
    return Run(folder, config, dataset, plan, tuple(notes))


def _fitted(config: Config, folder: Path, tasks: Mapping[str, TaskInfo], dataset: Dataset) -> tuple[Config, str]:
    """`train.micro_batch=auto` settled: as the run began, or by trial."""
    if (before := _began(folder)) is not None:
        found = {key: value(before, key) for key in ("train.micro_batch", "train.accumulation")}
        return override(config, found), f"train.micro_batch={before.train.micro_batch}: as the run began"
    measure = functools.partial(workers.beside, fitting.trials) if config.cluster.gpu else fitting.trials
    try:
        return fitting.settle(config, Supervised, tasks, dataset, measure)
    except fitting.FitError as error:
        raise RunError(str(error)) from error


def training_order(dataset: Dataset, config: Config) -> Order:
    """The order of a training split; a window holds one batch at least."""
    window_rows = max(config.data.window_rows, config.global_batch)
    return stream.order_of(dataset, "train", seed=config.seed, window_rows=window_rows, share=config.data.share)


def total_steps(order: Order, config: Config) -> int:
    """The optimizer steps of a settled config's passes over its training split, or the fewest that it allows."""
    assert config.train.epochs != "auto"
    return max(order.steps(config.train.epochs, config.global_batch), config.train.min_steps)


def _checkpoints(folder: Path) -> Checkpoints:
    """Those of a run, to read."""
    return Checkpoints(folder / "checkpoints", rank=0, barrier=bool, keep_last=1)


@dataclass(frozen=True, slots=True)
class Stream:
    """What a run reads of a split: a stream for a number of workers, made anew at each call."""

    plan: Plan
    dataset: Dataset
    split: str

    def __call__(self, world: int) -> Any:
        return stream.training_stream(*reads(self.plan, self.dataset, self.split, world))

    def first(self) -> int:
        """The number of the first step it brings."""
        found = _checkpoints(self.plan.folder).latest() if self.split == "train" else None
        return found.step if found else 0

    def key(self, world: int) -> str:
        """Streams of one key bring the same rows at the same step, to the same end."""
        order, layout, _, steps = reads(self.plan, self.dataset, self.split, world)
        end = self.plan.total_steps if self.split == "train" else steps
        return hashlib.sha256(pickle.dumps((order, layout, end))).hexdigest()


def streams(plan: Plan, dataset: Dataset) -> dict[str, Stream]:
    return {split: Stream(plan, dataset, split) for split in _SPLITS}


def reads(plan: Plan, dataset: Dataset, split: str, world: int) -> tuple[Order, Layout, Position, int]:
    """What `jobs.stream` takes to make a split's stream for so many workers, with Ray or without: training's from where
    the newest checkpoint stands, so anew whenever they start; validation's first rows in seeded order, the same for any
    number of workers."""
    storage.use(plan.root)
    layout = stream.layout_of(plan.config, world, plan.features)
    if split == "train":
        found = _checkpoints(plan.folder).latest()
        position = Position(**found.loop["position"]) if found else Position()
        return plan.order, layout, position, max(1, plan.total_steps - (found.step if found else 0))
    order = stream.order_of(dataset, split, seed=plan.config.seed, window_rows=plan.config.train.eval_rows)
    return order, layout, Position(), order.part(Position()).steps(layout.share.batch)


def _drawn(dataset: Dataset, config: Config, folder: Path) -> Dataset:
    wanted = config.data.labels_per_class
    if not isinstance(wanted, int):
        raise RunError(
            f"data.labels_per_class={list(wanted or ())} is a learning curve, which jobs.train makes: give one"
        )
    try:
        return draw.drawn(dataset, wanted, config.seed, folder / "drawn")
    except draw.DrawError as error:
        raise RunError(str(error)) from error


def _label_weights(info: TaskInfo, balance: float) -> dict[str, float]:
    """Frequency to the power of -balance for each label, scaled so that the mean over samples is one; for tasks whose
    rows have one label."""
    if not balance or info.kind not in ("classify", "relate"):
        return {}
    counts = np.array([info.counts.get(label, 0) for label in info.labels], float)
    shares = np.maximum(counts, 1) / max(counts.sum(), 1)
    weights = shares**-balance
    return dict(zip(info.labels, (weights / (weights * shares).sum()).tolist(), strict=True))


def _check_splits(dataset: Dataset, begun: Bundle | None) -> None:
    for split in ("train", "validation"):
        if not dataset.rows(split):
            raise RunError(f"the data set {dataset.path} has no rows in its split {split!r}: prepare it again")
    infos = (*dataset.tasks.values(), *(begun.tasks.values() if begun else ()))
    known = {label for info in infos for label in info.labels}
    unknown = sorted(set(dataset.info["splits"]["validation"].get("labels", {})) - known)
    if unknown:
        raise RunError(f"the validation split of {dataset.path} has labels that training never has: {unknown[:5]}")


def _check_model(config: Config, infos: Mapping[str, TaskInfo]) -> tuple[tuple[freeze.Part, ...], tuple[str, ...]]:
    """Builds the model without its weights, and what feeds it: a config that makes none is told here, by one process.
    What its parts train, and the modalities it takes."""
    try:
        tasks = make_all(infos)
        with torch.device("meta"):
            encoder = load_language(config.model, infos, weights=False, dropout=config.model.backbone_dropout)
            parts = freeze.table(build(config, tasks, encoder, weights=False), encoder)
        return parts, Inputs(config.model, config.data, load_reading(config.model), tasks, encoder).modalities
    except ValueError as error:
        raise RunError(str(error)) from error


def _check_media(config: Config, dataset: Dataset, takes: Sequence[str]) -> None:
    """Whether a native model takes what the rows bring; one with towers of ours is given those that they need."""
    if dataset.info["splits"]["train"].get("modalities") and (more := defaults.modalities(dataset) - set(takes)):
        raise RunError(
            f"{dataset.name} holds {' and '.join(sorted(more))}, but {config.model.backbone} takes "
            f"{', '.join(takes)}: prepare the data without it, or give another model.backbone"
        )


# How a run is computed and kept, not what it learns from good batches: it may go on with others. Sizes are here, since
# its global batch makes up for them.
_HOW = (
    "cluster.", "zero.", "data.cache_mb", "train.micro_batch", "train.accumulation", "train.gradient_checkpointing",
    "train.keep_last", "train.keep_best", "train.checkpoint_every_steps", "train.checkpoint_every_minutes",
    "train.on_bad_loss", "train.max_loss_jump", "train.max_skips", "train.alarm_minutes", "train.trace",
    "train.cache_gb", "track.",
)  # fmt: skip


def keep_batch(config: Config, folder: Path) -> Config:
    """The config with its global batch written out: where nobody gave one, that which the run began with, not what
    other workers or another micro-batch would make of it."""
    began = config if config.train.global_batch else _began(folder) or config
    return override(config, {"train.global_batch": began.global_batch})


def hold(config: Config, folder: Path) -> None:
    """Writes the config of a run. One that has a checkpoint or a bundle goes on only with what it began to compute: its
    curve belongs to one. How that is computed, and by how many workers, may change.

    Raises:
        RunError: it began with another.
    """
    if (before := _began(folder)) is not None:
        changed = [line for line in differences(before, config) if not line.startswith(_HOW)]
        if changed:
            raise RunError(
                f"the run {folder.name!r} began with another config ({', '.join(changed)}): give another --name, or "
                f"the same config to go on"
            )
    storage.publish(folder / CONFIG_FILE, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _began(folder: Path) -> Config | None:
    """The config of a run that has a checkpoint or a bundle."""
    file = folder / CONFIG_FILE
    began = _checkpoints(folder).latest() or (folder / "bundle" / bundles.MANIFEST).exists()
    return resolve(yaml.safe_load(file.read_text()), {}) if file.exists() and began else None


def differences(before: Config, now: Config) -> list[str]:
    """The keys of which two configs say different things, and what they say."""
    return _differences(before.model_dump(mode="json"), now.model_dump(mode="json"))


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in a | b for line in _differences(a.get(key), b.get(key), f"{path}{key}.")]
    return [] if a == b else [f"{path[:-1]}: was {a!r}, is {b!r}"]
