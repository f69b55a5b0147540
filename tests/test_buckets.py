"""How a step's samples are shared out: each once, those of one length together, the same work for every rank."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmagent.buckets import Buckets, cuts

# (ranks, samples of a rank, of a micro-batch, tokens of one)
SHAPES = [(1, 8, 8, None), (2, 32, 32, None), (3, 24, 4, None), (2, 32, 8, 1024), (4, 16, 4, 400), (2, 5, 2, 1)]


def drawn(buckets: Buckets, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 201, buckets.world * buckets.rows)


def micros_of(buckets: Buckets, lengths: np.ndarray, real: np.ndarray | None = None) -> list[list[np.ndarray]]:
    """For each rank its micro-batches, as places in the step."""
    real = np.ones(len(lengths), bool) if real is None else real
    places, numbers = buckets.deal(lengths, real)
    return [[place[part] for part in cuts(number)] for place, number in zip(places, numbers, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alike", [True, False])
def test_every_sample_once_and_as_many_for_every_rank(shape: tuple[int, int, int, int | None], alike: bool) -> None:
    buckets = Buckets(*shape, alike=alike)
    ranks = micros_of(buckets, drawn(buckets))
    assert sorted(itertools.chain(*(part for rank in ranks for part in rank))) == [*range(buckets.world * buckets.rows)]
    # The same number of micro-batches, of the same sizes: ranks compute them together.
    assert len({tuple(len(part) for part in rank) for rank in ranks}) == 1
    if buckets.tokens is None or not alike:
        assert {len(part) for part in ranks[0][:-1]} <= {buckets.micro}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_function_of_the_lengths(shape: tuple[int, int, int, int | None]) -> None:
    buckets = Buckets(*shape)
    lengths, real = drawn(buckets), np.ones(buckets.world * buckets.rows, bool)
    first, again = buckets.deal(lengths, real), buckets.deal(lengths.copy(), real)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_hold_what_fits_and_little_padding(seed: int) -> None:
    buckets = Buckets(2, 64, 8, tokens=1000)
    lengths = drawn(buckets, seed)
    ranks = micros_of(buckets, lengths)
    padded = [len(part) * lengths[part].max() for rank in ranks for part in rank]
    assert max(padded) <= 1000
    assert lengths.sum() > 0.85 * sum(padded)
    assert len(ranks[0]) < 64 // 8 + 3  # few, though they are cut by their longest
    # One more sample on each rank would not have fitted.
    for part, after in itertools.pairwise(ranks[0]):
        both = np.concatenate([part, after[:1]])
        assert len(both) * max(lengths[ranks[1][0]].max() if part is ranks[0][0] else 0, lengths[both].max()) > 900


@pytest.mark.parametrize("shape", [(2, 32, 32, None), (4, 16, 4, None), (2, 64, 8, 1000)])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_get_about_as_many_tokens(shape: tuple[int, int, int, int | None], seed: int) -> None:
    buckets = Buckets(*shape)
    lengths = drawn(buckets, seed)
    for together in zip(*micros_of(buckets, lengths), strict=True):
        longest = [lengths[part].max() for part in together]
        assert max(longest) - min(longest) <= 30
    sums = [sum(int(lengths[part].sum()) for part in rank) for rank in micros_of(buckets, lengths)]
    assert max(sums) <= 1.05 * min(sums)


@pytest.mark.parametrize("alike", [True, False])
def test_what_fills_a_step_up_is_shared_by_all(alike: bool) -> None:
    buckets = Buckets(3, 8, 4, alike=alike)
    real = np.arange(24) < 11
    counts = [sum(int(real[part].sum()) for part in rank) for rank in micros_of(buckets, drawn(buckets), real)]
    assert sum(counts) == 11
    assert max(counts) - min(counts) <= 1


def test_samples_that_are_compared_stay_in_their_order() -> None:
    buckets = Buckets(2, 4, 2, alike=False)
    ranks = micros_of(buckets, drawn(buckets))
    assert [[part.tolist() for part in rank] for rank in ranks] == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_the_longest_come_first() -> None:
    buckets = Buckets(1, 64, 8)
    lengths = drawn(buckets)
    longest = [int(lengths[part].max()) for part in micros_of(buckets, lengths)[0]]
    assert longest == sorted(longest, reverse=True)
