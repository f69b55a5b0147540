"""The desk of the lanes, without Ray: who waits for whom, what is done again, and what is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from jobs import lanes
from jobs.lanes import Desk


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, timeout=20))


def test_a_run_waits_at_each_report_for_a_word() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.submit("t0#1", b"job", 0)
        start = await desk.began(0)
        assert await desk.take(0, start, 0) == b"job"
        told = asyncio.create_task(desk.report("t0#1", {"score": 0.5}))
        assert (await desk.outcome("t0#1")).report == {"score": 0.5}
        await asyncio.sleep(0.05)
        assert not told.done()  # nobody has said whether it goes on
        following = asyncio.create_task(desk.outcome("t0#1"))
        assert await told  # to ask for more is the word
        await desk.finished(0, 0, "")
        assert (await following) == lanes.Outcome()

    run(story())


def test_a_run_that_is_stopped_at_a_report_ends_there() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.submit("t0#1", b"job", 0)
        start = await desk.began(0)
        await desk.take(0, start, 0)
        told = asyncio.create_task(desk.report("t0#1", {"score": 0.5}))
        await desk.outcome("t0#1")
        stopping = asyncio.create_task(desk.stop("t0"))
        assert not await told
        assert not stopping.done()  # its lane is not free yet
        await desk.finished(0, 0, "")
        await stopping
        assert not await desk.report("t0#1", {"score": 0.6})

    run(story())


def test_a_job_that_waits_is_taken_back() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.submit("t0#1", b"one", 0)
        await desk.submit("t1#1", b"two", 0)
        await desk.stop("t0")
        assert await desk.take(0, await desk.began(0), 0) == b"two"

    run(story())


def test_every_rank_of_a_lane_gets_the_same_jobs_and_lanes_share_them() -> None:
    async def story() -> None:
        desk = Desk()
        starts = [await desk.began(lane) for lane in (0, 1)]
        early = asyncio.create_task(desk.take(0, starts[0], 0))  # before there is a job
        await asyncio.sleep(0)
        await desk.submit("t0#1", b"one", 0)
        await desk.submit("t1#1", b"two", 0)
        assert await early == b"one"
        assert await desk.take(0, starts[0], 0) == b"one"  # the other rank
        assert await desk.take(1, starts[1], 0) == b"two"
        last = asyncio.create_task(desk.take(0, starts[0], 1))
        await asyncio.sleep(0)
        await desk.close()
        assert await last is None

    run(story())


def test_a_job_whose_workers_die_is_done_again_and_then_given_up() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.submit("t0#1", b"job", 1)
        first = await desk.began(0)
        await desk.take(0, first, 0)
        assert await desk.in_hand(0) == b"job"
        await desk.failed(0, "killed: out of memory")
        second = await desk.began(0)
        assert await desk.take(0, second, 0) == b"job"
        assert await desk.take(0, first, 1) is None  # a rank of the group before
        await desk.failed(0, "killed: out of memory")
        assert (await desk.outcome("t0#1")).failed == "killed: out of memory"
        await desk.submit("t1#1", b"next", 0)
        assert await desk.take(0, await desk.began(0), 0) == b"next"

    run(story())


def test_a_group_that_vanishes_without_a_word_loses_its_job_once() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.submit("t0#1", b"job", 0)
        await desk.take(0, await desk.began(0), 0)
        await desk.began(0)
        assert (await desk.outcome("t0#1")).failed == "its workers were gone"

    run(story())


def test_a_run_that_nobody_asks_for_leaves_its_lane_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_WORD_TIMEOUT_S", 0.05)

    async def story() -> None:
        desk = Desk()
        await desk.submit("t0#1", b"one", 0)
        await desk.take(0, await desk.began(0), 0)
        told = asyncio.create_task(desk.report("t0#1", {"score": 0.5}))
        await desk.outcome("t0#1")
        await asyncio.sleep(0.2)
        assert not told.done()  # nobody else wants the lane
        await desk.submit("t1#1", b"two", 0)
        assert not await told
        assert (await desk.outcome("t0#1")).put_off

    run(story())


def test_where_no_lane_is_left_jobs_are_given_up() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.began(0)
        await desk.submit("t0#1", b"job", 0)
        await desk.gone(0, "no room for the workers")
        assert (await desk.outcome("t0#1")).failed == "no room for the workers"

    run(story())
