"""The only home of `ray.data`: shards stream through it into training workers, and through predictors in evaluation.

Training: a read task takes one window of the order (`mmagent.order`), reads its rows, tokenises their text and lays
them out step by step, rank by rank. The stream is cut into blocks of one rank's
share of one optimizer step and handed out in turn, so that every rank gets its rows in the same order in every run,
whatever the timing. A short last batch is filled up with rows of weight 0. Media stay encoded.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from mmagent import text
from mmagent.config import Config
from mmagent.order import Order, Part, Position
from mmagent.record import Record
from mmagent.shards import Dataset

_PACE_S = 0.03

COLUMNS = ["id", "task", "messages", "images", "audios", "candidates", "target", "weight", "meta"]


class Pace(ExecutionCallback):
    """Lets the executor's loop breathe. While a task has results that nobody has room for, Ray 2.60 loops without a
    pause and takes half a core from the training beside it (measured: LOG.md)."""

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(_PACE_S)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a global batch is shared out, and what the read tasks need to know."""

    world: int
    rows_per_rank: int  # of one optimizer step
    tokenizer: str
    max_text_tokens: int

    @property
    def global_batch(self) -> int:
        return self.world * self.rows_per_rank


def order_of(dataset: Dataset, split: str, *, seed: int, window_rows: int, share: float = 1.0) -> Order:
    """The order of a split's samples, or of a share of its row groups, drawn by the seed."""
    groups = row_groups(dataset, split)
    if share < 1:
        drawn = np.random.default_rng([seed, 2]).permutation(len(groups))[: max(1, round(share * len(groups)))]
        groups = [groups[index] for index in sorted(drawn)]
    return Order(groups, seed=seed, window_rows=window_rows)


def row_groups(dataset: Dataset, split: str) -> list[tuple[str, int, int]]:
    """File, index and rows of every row group of a split, in order."""
    groups: list[tuple[str, int, int]] = []
    for file in dataset.shard_files(split):
        footer = pq.read_metadata(file)
        groups += [(str(file), index, footer.row_group(index).num_rows) for index in range(footer.num_row_groups)]
    return groups


def layout_of(config: Config) -> Layout:
    return Layout(
        world=config.cluster.workers,
        rows_per_rank=config.train.micro_batch * config.train.accumulation,
        tokenizer=text.locate(config.model.backbone),
        max_text_tokens=config.data.max_text_tokens,
    )


def training_stream(order: Order, layout: Layout, position: Position, steps: int) -> ray.data.Dataset:
    """A data set of blocks, one for each (step, rank) in turn: the columns of a record, ``ids`` (its tokens), ``cut``
    (how many were left out), ``rank`` and ``epoch``. To be split among ranks by `split_in_turn`."""
    parts = list(order.parts(position, steps, layout.global_batch))
    read = functools.partial(read_part, order=order, layout=layout, parts=parts)
    # Not `ray.data.range`: its tasks ask for a whole CPU each, which a busy cluster may never have.
    windows = ray.data.from_items([{"id": index} for index in range(len(parts))], override_num_blocks=len(parts))
    # Without a wish of its own for CPUs: only then does Ray Data cut a window into blocks in the task that read it, and
    # not in another, through which all bytes would go once more.
    rows = windows.map_batches(read, batch_size=1)
    return rows.repartition(target_num_rows_per_block=layout.rows_per_rank)


def tables(order: Order, layout: Layout, position: Position, steps: int) -> Iterator[pa.Table]:
    """The same rows without Ray, for one process alone: a table for each optimizer step."""
    if layout.world != 1:
        raise ValueError(f"{layout.world} ranks share a stream; without Ray there is one")
    parts = list(order.parts(position, steps, layout.global_batch))
    for index in range(len(parts)):
        for window in read_part({"id": np.array([index])}, order=order, layout=layout, parts=parts):
            for start in range(0, len(window), layout.global_batch):
                yield window.slice(start, layout.global_batch)


def split_in_turn(stream: ray.data.Dataset, world: int, reserved_cpus: float) -> list[Any]:
    """One iterator for each rank; block n goes to rank n modulo `world`.

    Args:
        reserved_cpus: what the training workers hold, which the read tasks must leave alone.
    """
    options = stream.context.execution_options
    options.preserve_order = True
    options.exclude_resources = options.exclude_resources.add(ray.data.ExecutionResources(cpu=reserved_cpus))
    stream.context.enable_progress_bars = False
    stream.context.custom_execution_callback_classes = [Pace]
    # Not `equal`: that holds blocks back to even out the ends, and these blocks are even.
    return stream.streaming_split(world, equal=False)


def rank_blocks(iterator: Any, rank: int) -> Iterator[pa.Table]:
    """The blocks of one rank, one for each optimizer step.

    Raises:
        RuntimeError: a block meant for another rank: the order of the run can no longer be trusted.
    """
    for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        meant = pc.unique(table["rank"]).to_pylist()
        if meant != [rank]:
            raise RuntimeError(f"rank {rank} was handed rows meant for {meant}: Ray Data split the stream differently")
        yield table


def apply(
    dataset: Dataset,
    split: str,
    worker: type,
    kwargs: dict[str, Any],
    *,
    workers: int,
    batch_rows: int,
    threads: int,
    groups: Sequence[tuple[str, int]] | None = None,
) -> Iterator[pa.Table]:
    """Runs every row of a split through `worker(**kwargs)`, built once in each of `workers` actors and called with
    tables of record rows; yields the tables it gives back, in the order of the rows.

    Args:
        groups: (file, row group) of those that are wanted; none: all.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plan, its log files, its missing progress bars
    # A row group is a task: small enough to spread, large enough to be worth it.
    pieces = [(file, group) for file, group, _ in row_groups(dataset, split)] if groups is None else groups
    tasks = ray.data.from_items([{"file": f, "group": g} for f, g in pieces], override_num_blocks=len(pieces))
    tasks.context.execution_options.preserve_order = True
    tasks.context.custom_execution_callback_classes = [Pace]
    rows = tasks.map_batches(_read_group, batch_size=1, num_cpus=0.25)
    answers = rows.map_batches(
        worker,
        fn_constructor_kwargs=kwargs,
        batch_size=batch_rows,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(workers, len(pieces)))),
        num_cpus=0.5,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )
    yield from answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def _read_group(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
    for file, group in zip(batch["file"], batch["group"], strict=True):
        yield pq.ParquetFile(str(file)).read_row_group(int(group))


def read_part(batch: dict[str, np.ndarray], *, order: Order, layout: Layout, parts: list[Part]) -> Iterator[pa.Table]:
    for index in batch["id"]:
        part = parts[int(index)]
        taken, weights = _laid_out(order.shuffle(part), part.steps(layout.global_batch), layout)
        tables = []
        for piece in part.pieces:
            table = pq.ParquetFile(piece.file).read_row_group(piece.row_group, columns=COLUMNS)
            tables.append(table.slice(piece.start, piece.stop - piece.start))
        rows = pa.concat_tables(tables).combine_chunks().take(pa.array(taken.ravel()))
        world = np.tile(np.repeat(np.arange(layout.world), layout.rows_per_rank), len(taken))
        yield _annotate(rows, layout, part.epoch, world, weights.ravel())


def _laid_out(rows: np.ndarray, steps: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers as (steps, rank x rows of a rank), and the factor of their weights: 0 for what fills the end up."""
    size = steps * layout.global_batch
    factor = np.zeros(size, np.float32)
    factor[: len(rows)] = 1
    filled = np.resize(rows, size)
    # Rank r takes every world-th row, so that a short last batch is short on every rank alike.
    shape = (steps, layout.rows_per_rank, layout.world)
    return (
        filled.reshape(shape).transpose(0, 2, 1).reshape(steps, -1),
        factor.reshape(shape).transpose(0, 2, 1).reshape(steps, -1),
    )


def _annotate(rows: pa.Table, layout: Layout, epoch: int, rank: np.ndarray, factor: np.ndarray) -> pa.Table:
    tokenizer = text.shared_tokenizer(layout.tokenizer)
    words = [text.words(Record.from_row({"id": "", "messages": row})) for row in rows["messages"].to_pylist()]
    known = dict(zip(unique := sorted(set(words)), text.fitted(tokenizer, unique, layout.max_text_tokens), strict=True))
    weight = pc.multiply(pc.fill_null(rows["weight"], 1.0).combine_chunks(), pa.array(factor))
    rows = rows.set_column(rows.schema.get_field_index("weight"), "weight", weight)
    extra = {
        "ids": pa.array([known[word][0] for word in words], pa.list_(pa.int64())),
        "cut": pa.array([known[word][1] for word in words], pa.int32()),
        "rank": pa.array(rank, pa.int32()),
        "epoch": pa.array(np.full(len(rows), epoch), pa.int32()),
    }
    for name, column in extra.items():
        rows = rows.append_column(name, column)
    return rows
