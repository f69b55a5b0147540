"""Many requests, one forward pass: those that arrive while a pass runs go into the next one together.

A request that is alone goes at once. Where others are on their way (being decoded), the batch waits for them, `wait_s`
at most. An error of a pass is blamed on nobody: its requests are tried one by one, and only the guilty one gets it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[tuple[Result, float]]
    since_s: float


class Batcher(Generic[Item, Result]):
    """Belongs to one event loop; `forward` runs in one thread of its own, so that the loop stays live.

    Args:
        forward: all items of a batch at once; called by one thread at a time.
        on_the_way: how many items may come soon, those submitted included.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        size: int,
        wait_s: float,
        on_the_way: Callable[[], int],
    ) -> None:
        self._forward = forward
        self._size = size
        self._wait_s = wait_s
        self._on_the_way = on_the_way
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._task: asyncio.Task[None] | None = None
        self.failed_in_a_row = 0  # forward passes of a single item, the last ones

    async def submit(self, item: Item) -> tuple[Result, float]:
        """The result of an item, and how many seconds it waited for its batch."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        waiting = _Waiting(item, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.future

    async def close(self) -> None:
        """Ends the worker; whoever still waits is told."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._queue:
            waiting.future.cancel()
        self._thread.shutdown(wait=True)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._gather()
            batch: list[_Waiting[Item, Result]] = []
            while self._queue and len(batch) < self._size:
                waiting = self._queue.popleft()
                if not waiting.future.done():  # its client went away
                    batch.append(waiting)
            if not self._queue:
                self._arrived.clear()
            try:
                if batch:
                    await self._answer(batch)
            finally:
                for waiting in batch:
                    waiting.future.cancel()  # of those without a result: closed during their pass

    async def _gather(self) -> None:
        """Waits while others are on their way and there is room for them."""
        end = time.perf_counter() + self._wait_s
        while len(self._queue) < min(self._size, self._on_the_way()) and time.perf_counter() < end:
            await asyncio.sleep(min(0.0005, self._wait_s))

    async def _answer(self, batch: list[_Waiting[Item, Result]]) -> None:
        started = time.perf_counter()
        try:
            results = await self._in_thread([waiting.item for waiting in batch])
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the one who asked
            if len(batch) == 1:
                self.failed_in_a_row += 1
                if not batch[0].future.done():
                    batch[0].future.set_exception(error)
                return
            for waiting in batch:
                await self._answer([waiting])
            return
        self.failed_in_a_row = 0
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.future.done():
                waiting.future.set_result((result, started - waiting.since_s))

    async def _in_thread(self, items: Sequence[Item]) -> Sequence[Result]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, items)
