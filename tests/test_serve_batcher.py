"""The micro-batcher: who goes together, who waits, who pays for an error."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from serve.batcher import Batcher


class Recorder:
    """Squares numbers, slowly; remembers its batches; cannot bear 13."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        if 13 in items:
            raise ValueError("13 is unlucky")
        return [item * item for item in items]


def make(forward: Recorder, *, size: int = 4, wait_s: float = 0.05, coming: int = 0) -> Batcher[int, int]:
    return Batcher(forward, size=size, wait_s=wait_s, on_the_way=lambda: coming)


async def ask(batcher: Batcher[int, int], *items: int) -> list[Any]:
    return await asyncio.gather(*(batcher.submit(item) for item in items), return_exceptions=True)


def test_results_come_back_to_their_askers_in_batches_of_the_size() -> None:
    async def run() -> None:
        forward = Recorder()
        batcher = make(forward)
        answers = await ask(batcher, *range(10))
        assert [answer for answer, _ in answers] == [n * n for n in range(10)]
        assert sorted(map(len, forward.batches)) == [2, 4, 4]
        assert len(forward.threads) == 1
        assert threading.get_ident() not in forward.threads
        assert answers[9][1] > answers[0][1]  # the last one waited for the batches before it
        await batcher.close()

    asyncio.run(run())


def test_one_alone_goes_at_once_and_waits_where_others_are_coming() -> None:
    async def seconds(coming: int) -> float:
        batcher = make(Recorder(0), wait_s=0.3, coming=coming)
        started = time.perf_counter()
        await ask(batcher, 1)
        await batcher.close()
        return time.perf_counter() - started

    assert asyncio.run(seconds(1)) < 0.2
    assert asyncio.run(seconds(2)) >= 0.3


def test_an_error_costs_only_its_own_request() -> None:
    async def run() -> None:
        batcher = make(Recorder())
        answers = await ask(batcher, 12, 13, 14)
        assert [answer[0] for answer in (answers[0], answers[2])] == [144, 196]
        assert isinstance(answers[1], ValueError)
        assert batcher.failed_in_a_row == 0  # the one after it went well
        await ask(batcher, 13)
        assert batcher.failed_in_a_row == 1
        await batcher.close()

    asyncio.run(run())


def test_what_nobody_waits_for_is_not_computed() -> None:
    async def run() -> None:
        forward = Recorder()
        batcher = make(forward, size=1)
        first = asyncio.create_task(batcher.submit(1))
        gone = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.005)
        gone.cancel()
        assert (await first)[0] == 1
        await ask(batcher, 3)
        assert forward.batches == [[1], [3]]
        await batcher.close()

    asyncio.run(run())


def test_closing_lets_nobody_wait_for_ever() -> None:
    async def run() -> None:
        batcher = make(Recorder(0.1), size=1)
        waiting = [asyncio.create_task(batcher.submit(n)) for n in range(3)]
        await asyncio.sleep(0.02)
        await batcher.close()
        done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 1)
        assert all(isinstance(item, asyncio.CancelledError) for item in done)

    asyncio.run(run())


@pytest.mark.parametrize("size", [1, 7])
def test_the_event_loop_stays_live_during_a_pass(size: int) -> None:
    async def run() -> float:
        batcher = make(Recorder(0.2), size=size)
        task = asyncio.create_task(batcher.submit(1))
        longest, last = 0.0, time.perf_counter()
        while not task.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        await batcher.close()
        return longest

    assert asyncio.run(run()) < 0.15
