"""The order of samples: every row once in an epoch, the same whoever asks, and a position that goes on anywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmagent.order import Order, Part, Position, sample_rng

# (rows of each row group, rows of a window, global batch)
SHAPES = [
    ([10], 4, 4),
    ([16, 16, 16], 16, 8),
    ([5, 1, 7, 3], 4, 3),
    ([256, 256, 31], 128, 48),
    ([3, 3], 100, 7),
    ([0, 4, 0, 9], 6, 1),
]


def order_of(sizes: list[int], window: int, seed: int = 0) -> Order:
    return Order(
        [(f"part-{index // 2}", index % 2, rows) for index, rows in enumerate(sizes)], seed=seed, window_rows=window
    )


def rows_of(order: Order, part: Part) -> list[tuple[str, int, int]]:
    """The rows of a part as they are consumed: (file, row group, row)."""
    stored = [(p.file, p.row_group, row) for p in part.pieces for row in range(p.start, p.stop)]
    assert len(stored) == part.rows
    return [stored[place] for place in order.shuffle(part)]


def batches(order: Order, position: Position, steps: int, size: int) -> list[tuple[tuple[str, int, int], ...]]:
    out = []
    for part in order.parts(position, steps, size):
        rows = rows_of(order, part)
        cut = [tuple(rows[at : at + size]) for at in range(0, len(rows), size)]
        assert len(cut) == part.steps(size)
        out += cut
    return out[:steps]


@pytest.mark.parametrize(("sizes", "window", "batch"), SHAPES)
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_row_once_in_an_epoch(sizes: list[int], window: int, batch: int, epoch: int) -> None:
    order = order_of(sizes, window)
    steps = order.steps(1, batch)
    seen = list(itertools.chain(*batches(order, Position(epoch), steps, batch)))
    wanted = {(f"part-{i // 2}", i % 2, row) for i, rows in enumerate(sizes) for row in range(rows)}
    assert len(seen) == len(wanted) == order.rows
    assert set(seen) == wanted


@pytest.mark.parametrize(("sizes", "window", "batch"), SHAPES)
def test_going_on_from_any_position_gives_what_was_left(sizes: list[int], window: int, batch: int) -> None:
    order = order_of(sizes, window)
    steps = order.steps(2, batch) + 1
    whole = batches(order, Position(), steps, batch)
    position = Position()
    for step in range(steps):
        assert batches(order, position, steps - step, batch) == whole[step:]
        position = order.advance(position, batch)
    assert position.epoch >= 2


def test_it_is_a_function_of_the_seed_and_the_epoch() -> None:
    sizes, window = [64, 64, 64], 64
    first = batches(order_of(sizes, window), Position(), 12, 16)
    assert first == batches(order_of(sizes, window), Position(), 12, 16)
    assert first != batches(order_of(sizes, window, seed=1), Position(), 12, 16)
    assert first != batches(order_of(sizes, window), Position(epoch=1), 12, 16)


def test_neighbours_in_the_file_are_torn_apart() -> None:
    rows = list(itertools.chain(*batches(order_of([1000], 1000), Position(), 100, 10)))
    places = np.array([row for _, _, row in rows])
    assert abs(np.corrcoef(places, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("epochs", "batch", "steps"), [(1, 16, 8), (0.5, 16, 4), (3, 16, 24), (0.001, 16, 1), (1, 48, 4)]
)
def test_steps_of_so_many_epochs(epochs: float, batch: int, steps: int) -> None:
    # Windows of 64 and 60 rows; a window's last batch may be short.
    assert order_of([124], 64).steps(epochs, batch) == steps


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="the split is empty"):
        order_of([0, 0], 8)


def test_a_samples_random_numbers_are_its_own() -> None:
    def draw(seed: int, epoch: int, name: str) -> float:
        return float(sample_rng(seed, epoch, name).random())

    assert draw(0, 1, "a") == draw(0, 1, "a")
    others = [draw(0, 1, "a"), draw(1, 1, "a"), draw(0, 2, "a"), draw(0, 1, "b"), draw(0, 1, ""), draw(0, 1, "ä")]
    assert len(set(others)) == len(others)


def test_parts_take_turns_and_each_epoch_has_as_many_rows() -> None:
    own, first, second = [("own", 0, 5)], [("first", 0, 3), ("first", 1, 1)], [("second", 0, 4)]
    order = Order(own, seed=0, window_rows=4, turns=[first, second])
    assert (order.rows, order.steps(2, 3)) == (9, 10)
    for epoch in range(4):
        read = list(itertools.chain(*batches(order, Position(epoch), order.steps(1, 3), 3)))
        turn = {("first", 0, row) for row in range(3)} | {("first", 1, 0)}
        other = {("second", 0, row) for row in range(4)}
        assert len(read) == 9
        assert set(read) == {("own", 0, row) for row in range(5)} | (other if epoch % 2 else turn)
    with pytest.raises(ValueError, match="epochs of 6 and of 9 rows"):
        Order(own, seed=0, window_rows=4, turns=[first, [("second", 0, 1)]])
