"""The stream of shards on a real Ray: every row once, in the same order each time, to the rank that it is meant for."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs import stream
from jobs.stream import Layout
from mmagent.buckets import cuts
from mmagent.config import Config, resolve
from mmagent.order import Order, Position
from mmagent.record import Media, Record
from mmagent.rows import parse
from mmagent.shards import Dataset
from mmagent.share import Share

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORLD, MICRO, ACCUMULATION = 2, 3, 2  # 12 rows of a global batch
ROWS = 90


@pytest.fixture
def dataset(tmp_path: Path, make_dataset: Callable[..., Dataset], make_png: Any) -> Dataset:
    """90 rows of words and pictures in row groups of 16."""
    pictures = [make_png(colour) for colour in ("red", "blue")]
    records = [
        parse({"id": f"row-{i}", "text": f"shape {i}?", "image": pictures[i % 2], "label": "red", "split": "train"})
        for i in range(ROWS)
    ]
    records[7] = replace(records[7], images=(Media(b"no picture"),))  # which is for whoever decodes it to find
    records[50] = replace(records[50], weight=0.25)
    return make_dataset(tmp_path / "data", {"train": records})


@pytest.fixture
def config(tiny_recipe: dict[str, Any]) -> Config:
    return resolve(
        tiny_recipe,
        {"cluster.workers": WORLD, "train.micro_batch": MICRO, "train.accumulation": ACCUMULATION,
         "data.window_rows": 36},
    )  # fmt: skip


def test_all_that_a_task_reads_travels(tmp_path: Path, config: Config, make_dataset: Any, make_png: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "which?", "candidates": [{"content": "a"}, {"image": make_png()}], "label": "1"},
        {"text": "a b", "spans": [{"start": 0, "end": 1, "label": "x"}], "weight": 0.5, "form": "said"},
        {"messages": [{"role": "context", "content": "a b"}, {"role": "user", "content": "?"}], "answers": ["b"]},
    ]
    records = [parse({"id": str(index), "split": "train", **row}) for index, row in enumerate(rows)]
    made = make_dataset(tmp_path / "rows", {"train": records})
    [table] = stream.tables(order_of(made, config), layout_of(config, 1, 3), Position(), 1)
    found = {record.id: record for record in map(Record.from_row, table.to_pylist())}
    for record in records:
        # What fills a batch up weighs nothing; where a row came from is no concern of a task.
        same = {"weight": 0.0, "split": "", "created_ms": 0, "origin": ""}
        assert found[record.id].to_row() | same == record.to_row() | same


def order_of(dataset: Dataset, config: Config) -> Order:
    return stream.order_of(dataset, "train", seed=config.seed, window_rows=config.data.window_rows)


def layout_of(config: Config, world: int, batch: int) -> Layout:
    return replace(stream.layout_of(config, world), share=Share(batch, MICRO, world))


def weighty(table: pa.Table) -> list[str]:
    """The rows that count, each once."""
    rows = [row for row in table.to_pylist() if row["weight"] > 0]
    return list(dict.fromkeys(row["id"] for row in rows))


def drain(order: Order, layout: Layout, position: Position, steps: int) -> list[list[pa.Table]]:
    """The blocks that each rank gets, as training workers take them: all ranks at once."""
    world = layout.share.world
    iterators = stream.split_in_turn(stream.training_stream(order, layout, position, steps), world, 1.0)
    out: list[list[pa.Table]] = [[] for _ in range(world)]
    faults: list[BaseException] = []

    def take(rank: int) -> None:
        try:
            out[rank] = list(stream.rank_steps(iterators[rank], rank))
        except Exception as error:  # noqa: BLE001  raised below, in the test's thread
            faults.append(error)

    threads = [threading.Thread(target=take, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if faults:
        raise faults[0]
    return out


def names(blocks: list[pa.Table]) -> list[list[str]]:
    return [block["id"].to_pylist() for block in blocks]


def test_an_epoch_as_the_ranks_see_it(dataset: Dataset, config: Config) -> None:
    order, layout = order_of(dataset, config), stream.layout_of(config, WORLD)
    assert layout.share == Share(batch=12, micro_batch=MICRO, world=2)
    steps = order.steps(1, 12)
    ranks = drain(order, layout, Position(), steps)

    # Every rank has a block of the same size for every step.
    assert [[len(block) for block in blocks] for blocks in ranks] == [[6] * steps] * 2
    rows = [row for blocks in ranks for block in blocks for row in block.to_pylist()]
    assert {row["rank"] for row in ranks[1][0].to_pylist()} == {1}
    assert {row["epoch"] for row in rows} == {0}

    # Every row exactly once, but for those that fill the last batch up, which weigh nothing.
    assert Counter(row["id"] for row in rows if row["weight"] > 0) == Counter(
        {f"row-{index}": 1 for index in range(ROWS)}
    )
    blank = [row for row in rows if row["weight"] == 0]
    assert 0 < len(blank) <= steps * 12 - ROWS
    assert next(row["weight"] for row in rows if row["id"] == "row-50" and row["weight"]) == 0.25

    # The words are tokenised; media stay as they were.
    first = next(row for row in rows if row["id"] == "row-12")
    assert len(first["ids"]) > 2
    assert first["images"][0]["bytes"].startswith(b"\x89PNG")

    # A short last batch is short on every rank alike.
    last = [sum(weight > 0 for weight in blocks[-1]["weight"].to_pylist()) for blocks in ranks]
    assert max(last) - min(last) <= 2

    # Another run, from the middle of a window: the same rows in the same order.
    position = Position()
    for _ in range(4):
        position = order.advance(position, 12)
    assert position.row > 0
    rest = drain(order, layout, position, steps - 4)
    assert [names(blocks) for blocks in rest] == [names(blocks[4:]) for blocks in ranks]


def held(block: Any) -> list[pa.RecordBatch]:
    """The steps of a block."""
    return list(pa.ipc.open_stream(block["steps"][0].as_buffer()))


def test_a_window_is_cut_into_blocks_by_the_task_that_reads_it(dataset: Dataset, config: Config) -> None:
    """In another task all its bytes would go through the object store once more. A block holds the steps of a window:
    three whole ones of 36 rows each time."""
    made = stream.training_stream(order_of(dataset, config), stream.layout_of(config, WORLD), Position(), 6)
    blocks: list[Any] = list(made.iter_batches(batch_size=None, batch_format="pyarrow"))
    assert [block["rank"].to_pylist() for block in blocks] == [[0], [1]] * 2
    steps = [[len(rows) for rows in held(block)] for block in blocks]
    assert steps == [[6] * 3] * 4
    assert "->StreamingRepartition" in made.stats()


@pytest.mark.parametrize(("setting", "steps"), [("_BLOCK_BYTES", [1, 1, 1]), ("_BLOCK_STEPS", [2, 1])])
def test_a_block_is_no_larger_than_it_may_be(
    dataset: Dataset, config: Config, monkeypatch: pytest.MonkeyPatch, setting: str, steps: list[int]
) -> None:
    monkeypatch.setattr(stream, setting, 2)
    order, layout = order_of(dataset, config), stream.layout_of(config, WORLD)
    parts = list(order.parts(Position(), 3, 12))
    blocks = list(stream.read_blocks({"id": np.array([0])}, order=order, layout=layout, parts=parts))
    assert [block["rank"].to_pylist() for block in blocks] == [[0], [1]] * len(steps)
    for rank in range(WORLD):
        mine = [held(block) for block in blocks[rank::WORLD]]
        assert [len(rows) for rows in mine] == steps
        found = [rows["id"].to_pylist() for block in mine for rows in block]
        assert found == names(list(stream.tables(order, layout, Position(), 3, rank)))


def test_the_stream_goes_on_into_the_next_epoch(dataset: Dataset, config: Config) -> None:
    order, layout = order_of(dataset, config), stream.layout_of(config, WORLD)
    one = order.steps(1, 12)
    ranks = drain(order, layout, Position(), one + 2)
    epochs = [[set(block["epoch"].to_pylist()) for block in blocks] for blocks in ranks]
    assert epochs[0][:one] == [{0}] * one
    # The last window is read to its end; the loop takes the steps it wants.
    assert epochs[0][one : one + 2] == [{1}, {1}]
    assert names(ranks[0])[0] != names(ranks[0])[one]


@pytest.mark.parametrize(("world", "batch"), [(1, 12), (2, 12), (3, 12), (5, 12), (2, 7), (16, 12)])
def test_any_number_of_ranks_shares_out_the_same_batches(
    dataset: Dataset, config: Config, world: int, batch: int
) -> None:
    """The number of workers does not change what is in a batch, also where it does not divide: blanks fill it up."""
    order, position, steps = order_of(dataset, config), Position(), 9
    layout = layout_of(config, world, batch)
    ranks = [
        list(itertools.islice(stream.tables(order, layout, position, steps, rank), steps)) for rank in range(world)
    ]
    alone = list(itertools.islice(stream.tables(order, layout_of(config, 1, batch), position, steps), steps))
    assert {len(table) for tables in ranks for table in tables} == {-(-batch // world)}
    for step, table in enumerate(alone):
        wanted = Counter(weighty(table))
        assert sum((Counter(weighty(tables[step])) for tables in ranks), start=Counter()) == wanted
        counts = [len(weighty(tables[step])) for tables in ranks]
        assert max(counts) - min(counts) <= 1
        position = order.advance(position, batch)


def test_the_ranks_of_a_stream_take_what_each_would_alone(dataset: Dataset, config: Config) -> None:
    order, layout = order_of(dataset, config), layout_of(config, 3, 10)
    ranks = drain(order, layout, Position(), 4)
    for rank, blocks in enumerate(ranks):
        assert names(blocks)[:4] == names(list(stream.tables(order, layout, Position(), 4, rank)))[:4]


def test_a_run_that_goes_on_with_other_workers_sees_each_row_once(dataset: Dataset, config: Config) -> None:
    """An epoch cut at uneven places, between groups of other sizes."""
    order, position, seen = order_of(dataset, config), Position(), []
    for world, steps in ((2, 2), (1, 1), (5, 2), (3, 99)):
        layout = layout_of(config, world, 12)
        ranks = [list(stream.tables(order, layout, position, steps, rank)) for rank in range(world)]
        for step in range(steps):
            if position.epoch == 0:
                seen += [name for tables in ranks for name in weighty(tables[step])]
                position = order.advance(position, 12)
    assert position == Position(epoch=1)
    assert Counter(seen) == Counter(f"row-{index}" for index in range(ROWS))


def test_fewer_rows_than_ranks(tmp_path: Path, config: Config, make_dataset: Any) -> None:
    made = make_dataset(tmp_path / "one", {"train": [parse({"id": "only", "text": "one", "label": "red"})]})
    order, layout = order_of(made, config), layout_of(config, 3, 12)
    ranks = drain(order, layout, Position(), 2)
    assert [[weighty(block) for block in blocks[:2]] for blocks in ranks] == [[["only"]] * 2, [[], []], [[], []]]
    assert {len(block) for blocks in ranks for block in blocks} == {4}


def test_a_share_of_the_data_is_whole_row_groups_drawn_by_the_seed(dataset: Dataset) -> None:
    def share(seed: int, part: float) -> Order:
        return stream.order_of(dataset, "train", seed=seed, window_rows=16, share=part)

    half = share(0, 0.5)
    assert half.rows in (48, 42)  # three of six groups; the last one is short
    assert {share(seed, 0.17).part(Position()).pieces for seed in range(8)} != {half.part(Position()).pieces}
    assert share(0, 0.5).part(Position()) == half.part(Position())
    assert share(0, 0.0001).rows > 0
    assert share(0, 1.0).rows == ROWS


def test_a_step_is_cut_alike_for_all_ranks_by_length(config: Config, tmp_path: Path, make_dataset: Any) -> None:
    """What is in a step stays; which rank and micro-batch takes it follows the lengths of the texts."""
    rows = [
        parse({"id": str(index), "text": "red " * (1 + index * 7 % 23), "label": "red", "split": "train"})
        for index in range(48)
    ]
    order = stream.order_of(make_dataset(tmp_path / "lengths", {"train": rows}), "train", seed=0, window_rows=48)
    [window] = order.parts(Position(), 2, 24)
    known = []
    for alike, tokens in ((True, None), (False, None), (True, 60)):
        layout = replace(layout_of(config, 2, 24), alike=alike, micro_tokens=tokens)
        steps = list(stream.read_part(window, order=order, layout=layout))
        known.append([sorted(step["id"].to_pylist()) for step in steps])
        for step in steps:
            first, second = step.slice(0, 12), step.slice(12, 12)
            assert (pc.unique(first["rank"]).to_pylist(), pc.unique(second["rank"]).to_pylist()) == ([0], [1])
            assert first["micro"].equals(second["micro"])
            lengths = [[len(ids) for ids in part["ids"].to_pylist()] for part in (first, second)]
            assert alike == (abs(sum(lengths[0]) - sum(lengths[1])) < 8 and lengths[0] == sorted(lengths[0])[::-1])
            for part in cuts(first["micro"].to_numpy()) if tokens else ():
                assert max(len(each[part]) * max(each[part]) for each in lengths) <= 60
    assert known[0] == known[1] == known[2]


def test_a_split_is_asked_row_by_row_in_order(dataset: Dataset) -> None:
    class Worker:  # in here, so that it travels with its code: Ray's processes do not know this file
        def __init__(self, mark: str) -> None:
            self.mark = mark

        def __call__(self, table: pa.Table) -> pa.Table:
            return pa.table({"id": table["id"], "mark": [self.mark] * len(table), "rows": [len(table)] * len(table)})

    answers = pa.concat_tables(
        stream.apply(dataset, "train", Worker, {"mark": "m"}, workers=2, batch_rows=10, threads=1)
    )
    assert answers["id"].to_pylist() == [f"row-{index}" for index in range(ROWS)]
    assert set(answers["mark"].to_pylist()) == {"m"}
    assert max(answers["rows"].to_pylist()) <= 10


def test_a_row_for_another_rank_ends_the_run(dataset: Dataset, config: Config) -> None:
    order, layout = order_of(dataset, config), stream.layout_of(config, WORLD)
    whole = stream.split_in_turn(stream.training_stream(order, layout, Position(), 1), 1, 0.0)[0]
    with pytest.raises(RuntimeError, match="rank 0 was handed rows meant for"):
        list(stream.rank_steps(whole, 0))


def test_steps_of_one_length_are_the_same_for_whoever_goes_on(
    config: Config, tmp_path: Path, make_dataset: Any
) -> None:
    """Each row once in an epoch; in the middle of a window the steps that were left, for another world too."""
    rows = [
        parse({"id": str(index), "text": "red " * (1 + index * 7 % 23), "label": "red", "split": "train"})
        for index in range(100)
    ]
    order = stream.order_of(make_dataset(tmp_path / "lengths", {"train": rows}), "train", seed=0, window_rows=64)

    def steps(position: Position, world: int, count: int, **settings: Any) -> list[list[tuple[str, int]]]:
        layout = replace(layout_of(config, world, 12), **settings)
        ranks = [list(stream.tables(order, layout, position, count, rank)) for rank in range(world)]
        return [
            sorted(
                (row["id"], len(row["ids"])) for table in tables for row in table.to_pylist() if row["weight"]
            )
            for tables in zip(*ranks, strict=True)
        ]  # fmt: skip

    gathered, drawn = (steps(Position(), 2, 9, gathered=each) for each in (True, False))
    assert [len(step) for step in gathered] == [len(step) for step in drawn] == [12] * 5 + [4] + [12] * 3
    assert sorted(itertools.chain(*gathered)) == sorted(itertools.chain(*drawn))
    assert len(set(itertools.chain(*gathered))) == 100

    def padding(found: list[list[tuple[str, int]]]) -> int:
        return sum(max(size for _, size in step) * len(step) - sum(size for _, size in step) for step in found)

    assert padding(gathered) < 0.4 * padding(drawn)
    shortest = [min(size for _, size in step) for step in gathered[:5]]
    assert shortest not in (sorted(shortest), sorted(shortest)[::-1])  # not the short ones first
    position = Position()
    for _ in range(3):
        position = order.advance(position, 12)
    assert steps(position, 1, 3, gathered=True) == gathered[3:6]
    assert steps(Position(epoch=1), 1, 6, gathered=True) != gathered[:6]


def test_tables_are_cut_to_the_row_groups() -> None:
    def made(*sizes: int) -> Any:
        start = 0
        for size in sizes:
            yield pa.table({"id": range(start, start + size)})
            start += size

    parts = list(stream.cut(made(3, 4, 1, 5), [2, 8, 3]))
    assert [len(part) for part in parts] == [2, 8, 3]
    assert [id for part in parts for id in part["id"].to_pylist()] == list(range(13))
