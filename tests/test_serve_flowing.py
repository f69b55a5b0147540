"""Requests whose texts are written together: short ones do not wait for long ones, those who leave make room, and a bad
one costs only itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmagent.batch import Sample
from mmagent.predictor import Predictor
from mmagent.writer import Writing
from serve.engine import Here
from serve.flowing import Flowing
from tests.test_generate import INFOS, configured, rows, trained

LONG, SHORT = Writing(40), Writing(2)


@pytest.fixture(scope="module")
def predictor(writers: dict[str, Path], tiny_recipe: dict[str, Any], make_wav: Callable[..., bytes]) -> Predictor:
    """Untrained, so that no text comes to an end by itself."""
    return trained(configured(tiny_recipe, writers["decoder"]), rows("text", make_wav), INFOS, steps=1)[1]


@pytest.fixture
def sample(predictor: Predictor, make_wav: Callable[..., bytes]) -> Sample:
    record = rows("text", make_wav)[0]
    return predictor.prepare(replace(record, target=type(record.target)()))


def running(predictor: Predictor, size: int, work: Callable[[Flowing], Any]) -> Any:
    async def run() -> Any:
        flow = predictor.flow()
        assert flow is not None
        flowing = Flowing(predictor, flow, size)
        try:
            return await work(flowing)
        finally:
            await flowing.close()

    return asyncio.run(run())


def test_a_short_text_does_not_wait_for_a_long_one(predictor: Predictor, sample: Sample) -> None:
    ended: list[str] = []

    async def work(flowing: Flowing) -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def ask(name: str, how: Writing, hear: Any = None) -> None:
            answer, waited_s = await flowing.submit(replace(sample, writing=how, hear=hear))
            assert len(answer.tokens) == how.max_tokens
            assert waited_s >= 0
            ended.append(name)

        long = asyncio.create_task(ask("long", LONG, lambda _: loop.call_soon_threadsafe(begun.set)))
        await begun.wait()
        await asyncio.gather(long, *(ask("short", SHORT) for _ in range(3)))

    running(predictor, 4, work)
    assert ended == ["short"] * 3 + ["long"]


def test_who_goes_away_makes_room(predictor: Predictor, sample: Sample) -> None:
    async def work(flowing: Flowing) -> int:
        begun, heard = asyncio.Event(), 0
        loop = asyncio.get_running_loop()

        def hear(_: str) -> None:
            nonlocal heard
            heard += 1
            loop.call_soon_threadsafe(begun.set)

        first = asyncio.create_task(flowing.submit(replace(sample, writing=LONG, hear=hear)))
        await begun.wait()
        first.cancel()
        await flowing.submit(replace(sample, writing=SHORT))  # there is room for one
        with pytest.raises(asyncio.CancelledError):
            await first
        return heard

    assert running(predictor, 1, work) < LONG.max_tokens


def test_a_bad_one_costs_only_itself_and_a_step_that_fails_its_texts(
    predictor: Predictor, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = replace(sample, views=())
    good = replace(sample, writing=SHORT)

    async def work(flowing: Flowing) -> None:
        first, wrong, second = await asyncio.gather(
            flowing.submit(good), flowing.submit(bad), flowing.submit(good), return_exceptions=True
        )
        assert isinstance(wrong, Exception)
        assert not isinstance(first, BaseException)
        assert not isinstance(second, BaseException)
        assert first[0].text == second[0].text

        def breaks(_: Any) -> Any:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(predictor, "proceed", breaks)
            with pytest.raises(RuntimeError, match="out of memory"):
                await flowing.submit(good)
        assert flowing.failed_in_a_row == 1
        assert (await flowing.submit(good))[0].text == first[0].text
        assert flowing.failed_in_a_row == 0

    running(predictor, 4, work)


def test_the_engine_writes_so_and_tells_those_who_wait_when_it_ends(predictor: Predictor, sample: Sample) -> None:
    async def run() -> None:
        here = Here(predictor, batch_size=2, batch_wait_s=0.0, on_the_way=lambda: 1)
        await here.warm_up()
        waiting = [asyncio.create_task(here.answer(replace(sample, writing=LONG))) for _ in range(3)]
        await asyncio.sleep(0.02)
        await here.close()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert any(isinstance(each, asyncio.CancelledError) for each in found)

    asyncio.run(run())
