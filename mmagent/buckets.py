"""Which samples of an optimizer step share a micro-batch, and which worker takes them: those of about one length.

What a step learns from is the order's to say (`mmagent.order`), and stays as it is: the mean over its samples is the
same however they are shared out. Texts of about one length are padded or packed with little waste, and ranks that get
about as many tokens do not wait for each other. All ranks have the same number of micro-batches, since they compute
them together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Buckets:
    """How a step is shared out.

    Args:
        world: ranks.
        rows: samples of a rank in one step.
        micro: samples of a micro-batch.
        tokens: of a micro-batch at most, its padding with them, in place of a number of samples; none: `micro` each.
        alike: whether samples of one length share a micro-batch; else they stay in the order they come in, which is
            for losses that compare the samples of a micro-batch with each other.
    """

    world: int
    rows: int
    micro: int
    tokens: int | None = None
    alike: bool = True

    def deal(self, lengths: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of one step: the samples of each rank, and the number of the micro-batch each is in.

        Args:
            lengths: (samples,) tokens of each.
            real: (samples,) bool; others fill up a short step, and are shared out last.

        Returns:
            places in the step, (rank, row), and micro-batches, (rank, row), rising along each rank's rows.
        """
        assert len(lengths) == self.world * self.rows
        if not self.alike:
            # Rank r takes every world-th, so that a short last batch is short on every rank alike.
            places = np.arange(len(lengths)).reshape(self.rows, self.world).T
            return places, np.tile(np.arange(self.rows) // self.micro, (self.world, 1))
        order = np.lexsort((-lengths, ~real))  # the longest first: memory that is too small is known at once
        ranks: list[np.ndarray] = []
        micros: list[np.ndarray] = []
        at = 0
        while at < self.rows:
            count = self._count(lengths[order[at * self.world :]], self.rows - at)
            block = order[at * self.world : (at + count) * self.world].reshape(count, self.world).copy()
            turned = slice((at + 1) % 2, None, 2)  # there and back again, so that no rank always gets the longer one
            block[turned] = block[turned, ::-1]
            ranks.append(block.T)
            micros.append(np.full((self.world, count), len(micros)))
            at += count
        return np.concatenate(ranks, axis=1), np.concatenate(micros, axis=1)

    def _count(self, lengths: np.ndarray, left: int) -> int:
        """Samples of each rank in the next micro-batch, of those that are left."""
        if self.tokens is None:
            return min(self.micro, left)
        longest = np.maximum.accumulate(lengths)[self.world - 1 :: self.world]
        fits = longest * np.arange(1, left + 1) <= self.tokens
        return max(1, left if fits.all() else int(fits.argmin()))


def together(lengths: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Another order of a window's samples: each step's are of about one length, the steps in an order that is drawn.

    Args:
        lengths: (samples,) tokens of each, in an order that was drawn; the last ones, a short step, stay.
        batch: samples of a step.

    Returns:
        their places in that order, (samples,).
    """
    whole = len(lengths) // batch * batch
    steps = np.argsort(lengths[:whole], kind="stable").reshape(-1, batch)
    return np.concatenate([rng.permutation(steps).ravel(), np.arange(whole, len(lengths))])


def cuts(micro: np.ndarray) -> list[slice]:
    """Where the micro-batches of a rank's step lie, by the number of each row's."""
    ends = [*(np.flatnonzero(np.diff(micro)) + 1).tolist(), len(micro)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
