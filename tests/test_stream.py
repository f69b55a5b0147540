"""The stream of shards on a real Ray: every row once, in the same order each time, to the rank that it is meant for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import stream
from jobs.stream import Layout
from mmagent.config import Config, resolve
from mmagent.order import Order, Position
from mmagent.record import Media, Record
from mmagent.rows import parse
from mmagent.shards import Dataset

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
    layout = replace(stream.layout_of(config), world=1, rows_per_rank=3)
    [table] = stream.tables(order_of(made, config), layout, Position(), 1)
    found = {record.id: record for record in map(Record.from_row, table.to_pylist())}
    for record in records:
        # What fills a batch up weighs nothing; where a row came from is no concern of a task.
        same = {"weight": 0.0, "split": "", "created_ms": 0, "origin": ""}
        assert found[record.id].to_row() | same == record.to_row() | same


def order_of(dataset: Dataset, config: Config) -> Order:
    return stream.order_of(dataset, "train", seed=config.seed, window_rows=config.data.window_rows)


def drain(order: Order, layout: Layout, position: Position, steps: int) -> list[list[pa.Table]]:
    """The blocks that each rank gets, as training workers take them: all ranks at once."""
    iterators = stream.split_in_turn(stream.training_stream(order, layout, position, steps), layout.world, 1.0)
    out: list[list[pa.Table]] = [[] for _ in range(layout.world)]
    faults: list[BaseException] = []

    def take(rank: int) -> None:
        try:
            out[rank] = list(stream.rank_blocks(iterators[rank], rank))
        except Exception as error:  # noqa: BLE001  raised below, in the test's thread
            faults.append(error)

    threads = [threading.Thread(target=take, args=(rank,), daemon=True) for rank in range(layout.world)]
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
    order, layout = order_of(dataset, config), stream.layout_of(config)
    assert (layout.world, layout.rows_per_rank, layout.global_batch) == (2, 6, 12)
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


def test_a_window_is_cut_into_blocks_by_the_task_that_reads_it(dataset: Dataset, config: Config) -> None:
    """In another task all its bytes would go through the object store once more."""
    made = stream.training_stream(order_of(dataset, config), stream.layout_of(config), Position(), 6)
    assert [len(block) for block in made.iter_batches(batch_size=None, batch_format="pyarrow")] == [6] * 12
    assert "->StreamingRepartition" in made.stats()


def test_the_stream_goes_on_into_the_next_epoch(dataset: Dataset, config: Config) -> None:
    order, layout = order_of(dataset, config), stream.layout_of(config)
    one = order.steps(1, 12)
    ranks = drain(order, layout, Position(), one + 2)
    epochs = [[set(block["epoch"].to_pylist()) for block in blocks] for blocks in ranks]
    assert epochs[0][:one] == [{0}] * one
    # The last window is read to its end; the loop takes the steps it wants.
    assert epochs[0][one : one + 2] == [{1}, {1}]
    assert names(ranks[0])[0] != names(ranks[0])[one]


def test_all_ranks_together_see_what_one_alone_sees(dataset: Dataset, config: Config) -> None:
    """The number of workers shares a global batch out; it does not change what is in it."""
    order, layout = order_of(dataset, config), stream.layout_of(config)
    single = replace(layout, world=1, rows_per_rank=12)
    alone = [Counter(table["id"].to_pylist()) for table in stream.tables(order, single, Position(), 3)]
    ranks = drain(order, layout, Position(), 3)
    shared = [sum((Counter(blocks[step]["id"].to_pylist()) for blocks in ranks), start=Counter()) for step in range(3)]
    assert shared == alone[:3]


def test_a_share_of_the_data_is_whole_row_groups_drawn_by_the_seed(dataset: Dataset) -> None:
    def share(seed: int, part: float) -> Order:
        return stream.order_of(dataset, "train", seed=seed, window_rows=16, share=part)

    half = share(0, 0.5)
    assert half.rows in (48, 42)  # three of six groups; the last one is short
    assert {share(seed, 0.17).part(Position()).pieces for seed in range(8)} != {half.part(Position()).pieces}
    assert share(0, 0.5).part(Position()) == half.part(Position())
    assert share(0, 0.0001).rows > 0
    assert share(0, 1.0).rows == ROWS


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
    order, layout = order_of(dataset, config), stream.layout_of(config)
    whole = stream.split_in_turn(stream.training_stream(order, layout, Position(), 1), 1, 0.0)[0]
    with pytest.raises(RuntimeError, match="rank 0 was handed rows meant for"):
        list(stream.rank_blocks(whole, 0))


def test_without_ray_there_is_one_rank(dataset: Dataset, config: Config) -> None:
    with pytest.raises(ValueError, match="2 ranks share a stream"):
        next(stream.tables(order_of(dataset, config), stream.layout_of(config), Position(), 1))
