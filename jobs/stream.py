"""The only home of `ray.data`: shards stream through it into training workers, and through predictors in evaluation.

Training: a read task takes one window of the order (`mmagent.order`), reads its rows, tokenises their text and lays
them out step by step, rank by rank, texts of one length together in a micro-batch, or where asked for in a step
(`mmagent.buckets`). The stream is cut into blocks of one rank's share of a few optimizer steps and handed out in turn,
so that every rank gets its rows in the same order in every run, whatever the timing. Where a batch is short or does not
divide, rows of weight 0 fill it up. Media stay encoded.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from jobs import placement
from mmagent import features, storage, text
from mmagent.buckets import Buckets, together
from mmagent.config import Config
from mmagent.features import Kept
from mmagent.order import Order, Part, Position
from mmagent.record import Record
from mmagent.shards import Dataset
from mmagent.share import Share

_PACE_S = 0.03
# Of a block. What Ray Data does for each one cost the training beside it half a millisecond a row, as long as a block
# was one step of 32 rows (LOG.md).
_BLOCK_BYTES, _BLOCK_STEPS = 16 << 20, 64

COLUMNS = ["id", "task", "messages", "images", "audios", "candidates", "target", "weight", "meta"]


class Pace(ExecutionCallback):
    """Lets the executor's loop breathe. While a task has results that nobody has room for, Ray 2.60 loops without a
    pause and takes half a core from the training beside it (measured: LOG.md)."""

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(_PACE_S)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a global batch is shared out, and what the read tasks need to know."""

    share: Share
    micro_tokens: int | None  # of a micro-batch, in place of a number of samples
    alike: bool  # whether samples of one length share a micro-batch
    gathered: bool  # whether those of one length share a step
    tokenizer: str
    max_text_tokens: int
    states: tuple[Mapping[str, str], ...] = ()  # files of states that come with the rows, by data shard

    @property
    def buckets(self) -> Buckets:
        share = self.share
        return Buckets(share.world, share.rows, share.micro_batch, self.micro_tokens, alike=self.alike)


def order_of(dataset: Dataset, split: str, *, seed: int, window_rows: int, share: float = 1.0) -> Order:
    """The order of a split's samples, or of a share of its row groups, drawn by the seed."""
    always, turns = dataset.turns(split)
    groups, *others = [[group for file in part for group in row_groups_of(str(file))] for part in (always, *turns)]
    if share < 1:
        drawn = np.random.default_rng([seed, 2]).permutation(len(groups))[: max(1, round(share * len(groups)))]
        groups = [groups[index] for index in sorted(drawn)]
    return Order(groups, seed=seed, window_rows=window_rows, turns=others)


def row_groups(dataset: Dataset, split: str) -> list[tuple[str, int, int]]:
    """File, index and rows of every row group of a split, in order."""
    return [group for file in dataset.shard_files(split) for group in row_groups_of(str(file))]


def row_groups_of(file: str) -> list[tuple[str, int, int]]:
    """The same of one shard."""
    footer = pq.read_metadata(storage.source(file))
    return [(file, index, footer.row_group(index).num_rows) for index in range(footer.num_row_groups)]


def layout_of(config: Config, world: int, kept: Sequence[Kept] = ()) -> Layout:
    """For a group of so many workers; with the states that are kept of frozen parts."""
    return Layout(
        share=config.share(world),
        micro_tokens=config.train.micro_tokens,
        alike=not compares(config),
        gathered=config.data.bucket_by_length,
        tokenizer=text.locate(config.model.backbone),
        max_text_tokens=config.data.max_text_tokens,
        states=tuple(each.files for each in kept),
    )


def compares(config: Config) -> bool:
    """Whether a loss compares the samples of a micro-batch with each other: which ones are together counts then."""
    return config.model.match == "dual" or config.pretrain.objective == "align"


def training_stream(order: Order, layout: Layout, position: Position, steps: int) -> ray.data.Dataset:
    """A data set of blocks for each rank in turn, to be split among them by `split_in_turn` and opened by `rank_steps`.

    A block is one row: ``rank``, and ``steps``, an Arrow stream whose record batches are that rank's rows of successive
    optimizer steps. These have the columns of a record, ``ids`` (its tokens), ``cut`` (how many were left out),
    ``rank``, ``micro`` (the number of its micro-batch), ``epoch``, and ``states`` where some are kept (see
    `mmagent.features`).
    """
    parts = list(order.parts(position, steps, layout.share.batch))
    read = functools.partial(read_blocks, order=order, layout=layout, parts=parts)
    # Not `ray.data.range`: its tasks ask for a whole CPU each, which a busy cluster may never have.
    windows = ray.data.from_items([{"id": index} for index in range(len(parts))], override_num_blocks=len(parts))
    # Without a wish of its own for CPUs: only then does Ray Data cut a window into blocks in the task that read it, and
    # not in another, through which all bytes would go once more.
    return windows.map_batches(read, batch_size=1).repartition(target_num_rows_per_block=1)


def tables(order: Order, layout: Layout, position: Position, steps: int, rank: int = 0) -> Iterator[pa.Table]:
    """The same rows for one rank without Ray: a table for each optimizer step, at least as many as are asked for."""
    rows = layout.share.rows
    for part in order.parts(position, steps, layout.share.batch):
        for step in read_part(part, order=order, layout=layout):
            yield step.slice(rank * rows, rows)


def split_in_turn(stream: ray.data.Dataset, world: int, reserved_cpus: float) -> list[Any]:
    """One iterator for each rank; block n goes to rank n modulo `world`.

    Args:
        reserved_cpus: what the training workers hold, which the read tasks must leave alone.
    """
    options = stream.context.execution_options
    options.preserve_order = True
    options.label_selector = placement.selector("data") or None
    options.exclude_resources = options.exclude_resources.add(ray.data.ExecutionResources(cpu=reserved_cpus))
    stream.context.enable_progress_bars = False
    stream.context.custom_execution_callback_classes = [Pace]
    # Not `equal`: that holds blocks back to even out the ends, and these blocks are even.
    return stream.streaming_split(world, equal=False)


def rank_steps(iterator: Any, rank: int) -> Iterator[pa.Table]:
    """The rows of one rank, a table for each optimizer step.

    Raises:
        RuntimeError: a block meant for another rank: the order of the run can no longer be trusted.
    """
    for block in iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        meant = block["rank"].to_pylist()
        if meant != [rank]:
            raise RuntimeError(f"rank {rank} was handed rows meant for {meant}: Ray Data split the stream differently")
        for rows in pa.ipc.open_stream(block["steps"][0].as_buffer()):
            yield pa.Table.from_batches([rows])


def apply(
    dataset: Dataset,
    split: str,
    worker: type,
    kwargs: dict[str, Any],
    *,
    workers: int,
    batch_rows: int,
    threads: int,
    gpu: float = 0.0,
    groups: Sequence[tuple[str, int]] | None = None,
) -> Iterator[pa.Table]:
    """Runs every row of a split through `worker(**kwargs)`, built once in each of `workers` actors and called with
    tables of record rows; yields the tables it gives back, in the order of the rows.

    Args:
        gpu: of a GPU that each actor takes.
        groups: (file, row group) of those that are wanted; none: all.
    """
    _quiet()
    # A row group is a task: small enough to spread, large enough to be worth it.
    pieces = [(file, group) for file, group, _ in row_groups(dataset, split)] if groups is None else groups
    tasks = ray.data.from_items([{"file": f, "group": g} for f, g in pieces], override_num_blocks=len(pieces))
    tasks.context.execution_options.preserve_order = True
    tasks.context.execution_options.label_selector = None if gpu else placement.selector("data") or None
    rows = tasks.map_batches(_read_group, batch_size=1, num_cpus=0.25)
    size = min(workers, len(pieces))
    yield from _through(rows, worker, kwargs, actors=size, batch_rows=batch_rows, threads=threads, gpu=gpu)


def over(
    table: pa.Table, worker: type, kwargs: dict[str, Any], *, workers: int, batch_rows: int, threads: int
) -> Iterator[pa.Table]:
    """As `apply`, of the rows of a table in memory, in any order."""
    _quiet()
    parts = [table.slice(at, batch_rows) for at in range(0, len(table), batch_rows)]
    rows = ray.data.from_arrow(parts)
    yield from _through(
        rows, worker, kwargs, actors=min(workers, len(parts)), batch_rows=batch_rows, threads=threads, gpu=0.0
    )


def _quiet() -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plan, its log files, its missing progress bars


def _through(
    rows: ray.data.Dataset,
    worker: type,
    kwargs: dict[str, Any],
    *,
    actors: int,
    batch_rows: int,
    threads: int,
    gpu: float,
) -> Iterator[pa.Table]:
    """What so many actors, each a `worker(**kwargs)`, make of tables of rows."""
    rows.context.custom_execution_callback_classes = [Pace]
    made = rows.map_batches(
        worker,
        fn_constructor_kwargs=kwargs,
        batch_size=batch_rows,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=max(1, actors)),
        num_cpus=0.5,
        num_gpus=gpu,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )
    yield from made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def cut(tables: Iterator[pa.Table], sizes: Sequence[int]) -> Iterator[pa.Table]:
    """The same rows in tables of these sizes, each given out as soon as it is whole."""
    held: list[pa.Table] = []
    for size in sizes:
        while sum(map(len, held)) < size:
            held.append(next(tables))
        joined = pa.concat_tables(held)
        yield joined.slice(0, size)
        held = [joined.slice(size)] if len(joined) > size else []


def _read_group(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
    for file, group in zip(batch["file"], batch["group"], strict=True):
        yield pq.ParquetFile(storage.source(str(file))).read_row_group(int(group))


def read_blocks(batch: dict[str, np.ndarray], *, order: Order, layout: Layout, parts: list[Part]) -> Iterator[pa.Table]:
    """What a read task makes of windows: blocks for each rank in turn, see `training_stream`."""
    share = layout.share
    for index in batch["id"]:
        held: list[pa.Table] = []
        size = 0
        for step in read_part(parts[int(index)], order=order, layout=layout):
            if held and (size + step.nbytes > _BLOCK_BYTES * share.world or len(held) == _BLOCK_STEPS):
                yield from _blocks(held, share)
                held, size = [], 0
            held.append(step)
            size += step.nbytes
        yield from _blocks(held, share)


def _blocks(steps: Sequence[pa.Table], share: Share) -> Iterator[pa.Table]:
    for rank in range(share.world):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, steps[0].schema) as writer:
            for step in steps:
                # One record batch a step, on which `rank_steps` counts.
                (rows,) = step.slice(rank * share.rows, share.rows).combine_chunks().to_batches()
                writer.write_batch(rows)
        data = sink.getvalue()
        ends = pa.py_buffer(np.array([0, data.size], np.int64))
        yield pa.table(
            {"rank": pa.array([rank], pa.int32()),
             "steps": pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])}
        )  # fmt: skip


def read_part(part: Part, *, order: Order, layout: Layout) -> Iterator[pa.Table]:
    """The rows of a window, a table for each optimizer step, rank by rank."""
    tables = []
    for piece in part.pieces:
        table = pq.ParquetFile(storage.source(piece.file)).read_row_group(piece.row_group, columns=COLUMNS)
        tables.append(table.slice(piece.start, piece.stop - piece.start))
    stored = pa.concat_tables(tables).combine_chunks()
    words = _words(stored["messages"], layout)
    lengths = np.array([len(ids) for ids, _ in words])
    drawn = _gathered(lengths, order, part, layout.share.batch) if layout.gathered else order.shuffle(part)
    taken, factor = _filled(drawn, part.steps(layout.share.batch), layout.share)
    place, rank, micro = _dealt(lengths[taken], factor > 0, layout.buckets)
    chosen = taken[place]
    rows = stored.take(pa.array(chosen))
    marks = {"rank": rank, "micro": micro, "epoch": np.full(len(rows), part.epoch)}
    made = _annotate(rows, [words[index] for index in chosen], factor[place], marks)
    # States are larger than all else of a row: those of a step at a time are put in its order.
    states = _States(part, layout.states) if layout.states else None
    size = layout.share.world * layout.share.rows
    for start in range(0, len(made), size):
        step = made.slice(start, size)
        yield step if states is None else step.append_column(features.COLUMN, states.take(chosen[start : start + size]))


class _States:
    """The kept states of a part's rows, as stored."""

    def __init__(self, part: Part, kept: Sequence[Mapping[str, str]]) -> None:
        self._pieces: list[list[pa.Array]] = []  # of each piece, of each kind
        self._starts = np.cumsum([0, *(piece.stop - piece.start for piece in part.pieces)])
        for piece in part.pieces:
            columns = []
            for files in kept:
                table = pq.ParquetFile(storage.source(files[piece.file])).read_row_group(piece.row_group)
                columns.append(table[features.COLUMN].combine_chunks().slice(piece.start, piece.stop - piece.start))
            self._pieces.append(columns)

    def take(self, rows: np.ndarray) -> pa.Array:
        """The items of all kinds of so many rows, by their number in the part."""
        pieces = np.searchsorted(self._starts, rows, side="right") - 1
        found = []
        for row, piece in zip(rows, pieces, strict=True):
            at = int(row - self._starts[piece])
            items = [column.slice(at, 1).flatten() for column in self._pieces[piece]]
            found.append(pa.concat_arrays(items))
        offsets = np.cumsum([0, *map(len, found)])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.concat_arrays(found), type=features.ITEMS)


def _gathered(lengths: np.ndarray, order: Order, part: Part, batch: int) -> np.ndarray:
    """What `Order.shuffle` gives, each step of texts of one length: of the whole window first, so that whoever goes on
    in the middle of it finds the same steps. lengths: (rows,) tokens of the part's rows as stored."""
    rows = order.shuffle(replace(part, skip=0))
    rng = np.random.default_rng([order.seed, part.epoch, part.window, 3])
    return rows[together(lengths[rows], batch, rng)][part.skip :]


def _filled(rows: np.ndarray, steps: int, share: Share) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of whole steps, and the factor of their weights: 0 for what fills a step up."""
    places = np.arange(share.world * share.rows)
    number = np.arange(steps)[:, None] * share.batch + places  # of the part's rows
    real = (places < share.batch) & (number < len(rows))
    return rows[number % len(rows)].ravel(), real.astype(np.float32).ravel()


def _dealt(lengths: np.ndarray, real: np.ndarray, buckets: Buckets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For all rows as they are handed out, step by step and rank by rank: their places, ranks and micro-batches."""
    size = buckets.world * buckets.rows
    places, micros = [], []
    for start in range(0, len(lengths), size):
        place, micro = buckets.deal(lengths[start : start + size], real[start : start + size])
        places.append(start + place.ravel())
        micros.append(micro.ravel())
    rank = np.tile(np.repeat(np.arange(buckets.world), buckets.rows), len(places))
    return np.concatenate(places), rank, np.concatenate(micros)


def _words(messages: pa.ChunkedArray, layout: Layout) -> list[tuple[np.ndarray, int]]:
    """The tokens of each row's text, and how many were left out."""
    tokenizer = text.shared_tokenizer(layout.tokenizer)
    words = [text.words(Record.from_row({"id": "", "messages": row})) for row in messages.to_pylist()]
    known = dict(zip(unique := sorted(set(words)), text.fitted(tokenizer, unique, layout.max_text_tokens), strict=True))
    return [known[word] for word in words]


def _annotate(
    rows: pa.Table, words: Sequence[tuple[np.ndarray, int]], factor: np.ndarray, marks: dict[str, np.ndarray]
) -> pa.Table:
    weight = pc.multiply(pc.fill_null(rows["weight"], 1.0).combine_chunks(), pa.array(factor))
    rows = rows.set_column(rows.schema.get_field_index("weight"), "weight", weight)
    extra = {
        "ids": pa.array([ids for ids, _ in words], pa.list_(pa.int64())),
        "cut": pa.array([cut for _, cut in words], pa.int32()),
        **{name: pa.array(value, pa.int32()) for name, value in marks.items()},
    }
    for name, column in extra.items():
        rows = rows.append_column(name, column)
    return rows
