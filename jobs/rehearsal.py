"""A run rehearsed before it begins: a few of its real steps, and what all of them would take. `jobs.train --dry-run`.

The steps run in processes of their own, as many as the run has workers where this machine holds them, with the run's
engine, model and rows, but without Ray. One more step takes the longest rows that were seen, since a peak of memory is
of those. Nothing is left behind.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from jobs import engine as engines
from jobs import stream
from jobs.loop import Feed, Plan, seed_step
from jobs.meter import Meter
from jobs.ranks import together
from jobs.workers import Group
from mmagent import freeze, measurement, storage
from mmagent.config import Config
from mmagent.order import Order, Position
from mmagent.shards import Dataset
from mmagent.share import Share

_WARM_STEPS = 2  # while memory is asked for and caches fill
_STEPS = (3, 20)  # measured: at least, at most
_LONG_ENOUGH_S = 15.0
_LOOKED_AT = 512  # rows whose tokens are counted, over all ranks
_VALIDATED = 64  # rows of the measured validation, over all ranks


class RehearsalError(RuntimeError):
    """A run that cannot be rehearsed on this machine."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one rank saw of itself."""

    rows: int  # looked at
    tokens: int  # of those rows
    cut_rows: int  # of those rows
    steps_s: tuple[float, ...]
    validation_s: float  # of one validation of `train.eval_rows`
    peak_bytes: int  # of the process, weights, data and Python included; with a GPU, of its memory
    checkpoint_bytes: int  # of all ranks


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What was measured, and on what."""

    ranks: tuple[Measured, ...]
    available_bytes: int  # memory that was free before
    free_bytes: int  # of the disk of the storage root

    @property
    def step_s(self) -> float:
        """An optimizer step: ranks wait for the slowest."""
        return max(statistics.median(rank.steps_s) for rank in self.ranks)

    @property
    def peak_bytes(self) -> int:
        return max(rank.peak_bytes for rank in self.ranks)


def rehearse(plan: Plan, dataset: Dataset) -> Rehearsal:
    """Measures a few steps of a run.

    Args:
        plan: of a run whose folder may be written into.

    Raises:
        RehearsalError: it wants a GPU, and there is none.
        RanksFailed: a step failed, or its process was killed.
    """
    world = _world(plan.config)
    gpu = plan.config.cluster.gpu
    available = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    ranks = together(functools.partial(_measure, plan, dataset), world, plan.config)
    return Rehearsal(tuple(ranks), available, psutil.disk_usage(str(storage.root())).free)


def _world(config: Config) -> int:
    """As many ranks as the run has, where this machine holds them, else one."""
    room = torch.cuda.device_count() if config.cluster.gpu else os.cpu_count() or 1
    if not room:
        raise RehearsalError("cluster.gpu=true, but this machine has no GPU to rehearse on: cluster.gpu=false")
    return config.cluster.workers if config.cluster.workers <= room else 1


def _measure(plan: Plan, dataset: Dataset, group: Group) -> Measured:
    """One rank's part of a rehearsal: `jobs.loop.train` in short."""
    storage.use(plan.root)
    config = plan.config
    learner = plan.learner(plan)
    engine = engines.make(learner.model, freeze.groups(learner.model, config), config)
    learner.begin(engine.device)
    seen: list[pa.Table] = []

    def step(taught: Any, number: int) -> None:
        seed_step(config.seed, number, group.rank)
        stage = freeze.stage(learner.model, config.freeze, plan.total_steps, plan.total_steps)  # the costliest
        freeze.thaw(learner.model, config.freeze, stage)
        engine.set_lr(0.0, stage)  # what learns does not move: the loss may not, in so few steps of a high rate
        engine.begin(len(taught.micros))
        for micro in taught.micros:
            batch = engines.moved(micro, engine.device)
            engine.backward(learner.loss(engine.forward(batch), batch))
            engine.step()
        if config.cluster.gpu:
            torch.cuda.synchronize()

    feed, meter = Feed(learner.steps, _kept(_tables(dataset, "train", config, group), seen)), Meter()
    times: list[float] = []
    wanted = _WARM_STEPS + _STEPS[0]
    while len(times) < wanted:
        started = time.perf_counter()
        step(feed.next(meter)[1], len(times))
        times.append(time.perf_counter() - started)
        if len(times) == _WARM_STEPS:
            slowest = max(group.gather(times[-1]))
            wanted = _WARM_STEPS + int(min(max(_LONG_ENOUGH_S / slowest, _STEPS[0]), _STEPS[1]))
    feed.close()
    rows = pa.concat_tables(seen)
    step(next(learner.steps(iter([_longest(rows, config.share(group.world))]))), len(times))
    peak = torch.cuda.max_memory_allocated() if config.cluster.gpu else measurement.resident_peak()
    looked = learner.rows(iter([rows.slice(0, max(1, _LOOKED_AT // group.world))]))
    return Measured(
        rows=len(looked),
        tokens=sum(sample.tokens for sample in looked),
        cut_rows=sum(sample.cut > 0 for sample in looked),
        steps_s=tuple(times[_WARM_STEPS:]),
        validation_s=_validate(learner, engine, dataset, config, group),
        peak_bytes=peak,
        checkpoint_bytes=_saved(engine, plan.folder / "rehearsed", group),
    )


def _tables(dataset: Dataset, split: str, config: Config, group: Group) -> Iterator[pa.Table]:
    """This rank's rows, a table for each optimizer step, without end: other rows than it will have in the run, and as
    many. Windows are small, since reading them is no work of a training worker."""
    share = Share(config.share(group.world).rows, config.train.micro_batch, 1)
    layout = replace(stream.layout_of(config, 1), share=share)
    order: Order = stream.order_of(dataset, split, seed=config.seed, window_rows=share.rows)
    position = Position()
    while True:
        epoch = order.steps(1, share.rows)
        yield from itertools.islice(
            stream.tables(order, layout, position, epoch), group.rank % epoch, None, group.world
        )
        position = Position(epoch=position.epoch + 1)


def _kept(tables: Iterator[pa.Table], seen: list[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        if sum(map(len, seen)) < _LOOKED_AT:
            seen.append(table)
        yield table


def _longest(rows: pa.Table, share: Share) -> pa.Table:
    """As many rows as a step has: one half has the longest texts, the other the largest sounds and pictures."""
    size = share.rows
    words = rows["ids"].combine_chunks().value_lengths().to_pylist()
    media = [
        sum(len(item["bytes"] or b"") for kind in ("audios", "images") for item in row[kind] or ())
        for row in rows.select(["images", "audios"]).to_pylist()
    ]
    by_words = sorted(range(len(rows)), key=lambda index: -words[index])
    by_media = sorted(range(len(rows)), key=lambda index: -media[index])
    chosen = [index for pair in zip(by_words, by_media, strict=True) for index in pair][:size]
    taken = rows.take(list(itertools.islice(itertools.cycle(chosen), size)))
    micro = pa.array(np.arange(size) // share.micro_batch, pa.int32())
    return taken.set_column(taken.schema.get_field_index("micro"), "micro", micro)


def _validate(learner: Any, engine: Any, dataset: Dataset, config: Config, group: Group) -> float:
    """Seconds of one validation, from one of fewer rows."""
    whole = min(config.train.eval_rows, dataset.rows("validation")) / group.world
    size = config.share(group.world).rows
    steps = max(1, int(min(_VALIDATED / group.world, whole) // size))
    tables = list(itertools.islice(_tables(dataset, "validation", config, group), steps))
    rows = learner.rows(iter(tables))
    started = time.perf_counter()
    learner.validate(engine, rows, group)
    return (time.perf_counter() - started) * max(1.0, whole / max(1, len(rows)))


def _saved(engine: Any, folder: Path, group: Group) -> int:
    """Bytes of a checkpoint."""
    if group.rank == 0:
        folder.mkdir(parents=True)
    group.all(True)
    engine.save(folder)
    group.all(True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
