"""The order of samples: a pure function of (seed, epoch, data set), and the position in it.

Row groups of all shards are permuted by (seed, epoch) and laid end to end; the line is cut into windows of equal
length; the rows of a window are shuffled by (seed, epoch, window). A reader needs one window in memory, and a
position is (epoch, window, row): no list of ids, nothing read twice but the row group on a window's edge.
Some row groups may take turns, one part of them in each epoch.
Neither the number of workers nor the size of a batch is any part of it: a batch takes the next rows of the window, the
last of a window may be short, and workers share each one out (`mmagent.share`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_Group = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of one row group of one shard file."""

    file: str
    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Position:
    epoch: int = 0
    window: int = 0
    row: int = 0  # rows of the window that were consumed


@dataclass(frozen=True, slots=True)
class Part:
    """What is left of a window: `pieces` hold its rows as stored; the first `skip` of the shuffled are done."""

    epoch: int
    window: int
    pieces: tuple[Piece, ...]
    rows: int
    skip: int

    def steps(self, global_batch: int) -> int:
        return -(-(self.rows - self.skip) // global_batch)


class Order:
    """Args:
    row_groups: (file, row group, rows) of every row group, in a stable order.
    seed: of every permutation.
    window_rows: rows shuffled together.
    turns: row groups of which an epoch has one part beside the others, in turn; each part has as many rows.
    """

    def __init__(
        self,
        row_groups: Sequence[_Group],
        *,
        seed: int,
        window_rows: int,
        turns: Sequence[Sequence[_Group]] = (),
    ) -> None:
        self._epochs = [[group for group in (*row_groups, *turn) if group[2] > 0] for turn in turns or ((),)]
        self.seed = seed
        self.window_rows = window_rows
        sizes = {sum(rows for _, _, rows in groups) for groups in self._epochs}
        if len(sizes) > 1:
            raise ValueError(f"epochs of {min(sizes)} and of {max(sizes)} rows: each turn must have as many")
        [self.rows] = sizes  # of an epoch
        if not self.rows:
            raise ValueError("the split is empty: there is no row to order")
        self.windows = -(-self.rows // window_rows)

    def part(self, position: Position) -> Part:
        """The rest of the window at a position."""
        pieces = self._pieces(position.epoch, position.window)
        return Part(position.epoch, position.window, pieces, sum(p.stop - p.start for p in pieces), position.row)

    def parts(self, position: Position, steps: int, global_batch: int) -> Iterator[Part]:
        """The windows that `steps` optimizer steps from a position need; an epoch's last batch may be short."""
        while steps > 0:
            part = self.part(position)
            yield part
            steps -= part.steps(global_batch)
            position = self._next_window(position)

    def advance(self, position: Position, global_batch: int) -> Position:
        """The position after one more optimizer step."""
        rows = min(self.window_rows, self.rows - position.window * self.window_rows)
        row = position.row + global_batch
        return Position(position.epoch, position.window, row) if row < rows else self._next_window(position)

    def steps(self, epochs: float, global_batch: int) -> int:
        """Optimizer steps of so many passes over the data."""
        sizes = [min(self.window_rows, self.rows - index * self.window_rows) for index in range(self.windows)]
        return max(1, round(epochs * sum(-(-size // global_batch) for size in sizes)))

    def shuffle(self, part: Part) -> np.ndarray:
        """The rows of a part, as places in its pieces laid end to end, in the order they are consumed."""
        return np.random.default_rng([self.seed, part.epoch, part.window, 1]).permutation(part.rows)[part.skip :]

    def _next_window(self, position: Position) -> Position:
        if position.window + 1 < self.windows:
            return Position(position.epoch, position.window + 1, 0)
        return Position(position.epoch + 1, 0, 0)

    def _pieces(self, epoch: int, window: int) -> tuple[Piece, ...]:
        groups = self._epochs[epoch % len(self._epochs)]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(groups))
        first, last = window * self.window_rows, min((window + 1) * self.window_rows, self.rows)
        pieces, at = [], 0
        for index in order:
            file, group, rows = groups[index]
            start, stop = max(first - at, 0), min(last - at, rows)
            if start < stop:
                pieces.append(Piece(file, group, start, stop))
            at += rows
            if at >= last:
                break
        return tuple(pieces)


def sample_rng(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """The random numbers that augment one sample in one epoch, whoever asks and whenever."""
    name = hashlib.blake2b(f"{seed} {epoch} {sample_id}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(name, "little"))
