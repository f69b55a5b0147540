"""Where a bundle's forward passes run: in this process, beside the requests, or in a deployment of their own, whose
replicas (with a GPU each, say) are shared by many processes that speak HTTP and decode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from mmagent import familiar
from mmagent.answer import Answer
from mmagent.batch import Sample
from mmagent.predictor import Predictor
from mmagent.record import Message, Record, Target
from mmagent.targets import HEAD, TAIL, kind
from serve.batcher import Batcher
from serve.config import ServeConfig
from serve.flowing import Flowing

FAILURES = 3  # forward passes that fail in a row before a process calls itself ill
Passed = tuple[Answer, float]  # an answer, and how many seconds it waited for its forward pass


class Engine(Protocol):
    """Belongs to one event loop."""

    @property
    def failed_in_a_row(self) -> int:
        """Forward passes, the last ones, that this process should not outlive."""
        ...

    async def answer(self, sample: Sample) -> Passed: ...

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(predictor, *arguments)`` where the weights are: one at a time, beside the forward passes."""
        ...

    async def warm_up(self) -> None:
        """The first passes of a process are slow: they are nobody's request. Raises what the bundle raises."""
        ...

    async def close(self) -> None: ...


class Here:
    """The weights are in this process.

    Args:
        on_the_way: how many requests may come soon.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        batch_size: int,
        batch_wait_s: float,
        on_the_way: Callable[[], int],
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._predictor, self._size = predictor, batch_size
        predictor.tells_states = bool(familiar.load(predictor.path)) if predictor.path is not None else False
        self._work = ThreadPoolExecutor(1, thread_name_prefix="aside")

        def forward(samples: Sequence[Sample]) -> list[Answer]:
            on_batch(len(samples))
            return predictor.answer(samples)

        self._batcher: Batcher[Sample, Answer] = Batcher(
            forward, size=batch_size, wait_s=batch_wait_s, on_the_way=on_the_way
        )
        flow = predictor.flow()
        self._flowing = Flowing(predictor, flow, batch_size, on_batch) if flow is not None else None

    @property
    def failed_in_a_row(self) -> int:
        flowing = self._flowing.failed_in_a_row if self._flowing is not None else 0
        return max(self._batcher.failed_in_a_row, flowing)

    async def answer(self, sample: Sample) -> Passed:
        if self._flowing is not None and self._predictor.tasks[sample.task].generates:
            return await self._flowing.submit(sample)
        return await self._batcher.submit(sample)

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._work, function, self._predictor, *arguments)

    async def warm_up(self) -> None:
        samples = [self._predictor.prepare(first_question(task)) for task in self._predictor.tasks]
        for sample in samples:
            await self.answer(sample)
        full = [samples[index % len(samples)] for index in range(self._size)]
        await asyncio.gather(*map(self.answer, full))

    async def close(self) -> None:
        await self._batcher.close()
        if self._flowing is not None:
            await self._flowing.close()
        self._work.shutdown(wait=False)


def load(folder: Path, config: ServeConfig) -> Predictor:
    """A bundle for a process that computes."""
    return Predictor.load(folder, threads=config.threads, cache_mb=config.cache_mb, precision=config.precision)


def first_question(task: str) -> Record:
    """A small one that every model can answer."""
    ends = ({"start": 0, "end": 2, "label": HEAD}, {"start": 3, "end": 5, "label": TAIL})
    more: dict[str, dict[str, Any]] = {
        "match": {"candidates": ({"content": "yes"}, {"content": "no"})},
        "relate": {"target": Target(spans=ends)},
    }
    return Record("warm-up", (Message("user", "is it there?"),), task=task, **more.get(kind(task), {}))
