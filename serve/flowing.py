"""Texts of many requests, written together (`mmagent.flow`): a new one joins between two tokens, and one whose client
went away leaves there."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmagent.answer import Answer
from mmagent.batch import Sample
from mmagent.flow import Flow
from mmagent.predictor import Predictor, Underway


@dataclass(eq=False)
class _Waiting:
    sample: Sample
    future: asyncio.Future[tuple[Answer, float]]
    since_s: float
    under: Underway | None = None
    waited_s: float = 0.0


class Flowing:
    """Belongs to one event loop; the model runs in a thread of its own, so that the loop stays live.

    Args:
        flow: of the predictor.
        size: texts that are under way together.
        on_batch: is told how many are, when some have joined.
    """

    def __init__(
        self, predictor: Predictor, flow: Flow, size: int, on_batch: Callable[[int], None] = lambda _: None
    ) -> None:
        self._predictor, self._flow, self._size, self._on_batch = predictor, flow, size, on_batch
        self._arrived: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._under: list[_Waiting] = []
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failed_in_a_row = 0  # steps, and readings of a single request, the last ones

    async def submit(self, sample: Sample) -> tuple[Answer, float]:
        """The answer, and how many seconds it waited until its text was begun."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="write", daemon=True)
            self._thread.start()
        waiting = _Waiting(sample, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._arrived.put(waiting)
        return await waiting.future

    async def close(self) -> None:
        """Ends the thread after its present step; whoever still waits is told."""
        if self._thread is not None:
            self._arrived.put(None)
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            new, ends = self._come()
            if ends:
                for each in [*new, *self._under]:
                    self._resolve(each, asyncio.CancelledError())
                return
            self._leave()
            if new:
                self._begin(new)
            if self._under:
                self._proceed()

    def _come(self) -> tuple[list[_Waiting], bool]:
        """Those that there is room for; where nothing is under way, the first is waited for."""
        new: list[_Waiting] = []
        while len(self._under) + len(new) < self._size:
            try:
                each = self._arrived.get(block=not self._under and not new)
            except queue.Empty:
                break
            if each is None:
                return new, True
            if not each.future.done():
                new.append(each)
        return new, False

    def _leave(self) -> None:
        gone = [each for each in self._under if each.future.done()]
        if gone:
            self._flow.leave([each.under.text for each in gone if each.under is not None])
            self._under = [each for each in self._under if each not in gone]

    def _begin(self, new: Sequence[_Waiting]) -> None:
        """An error is blamed on nobody: they are tried one by one, and only the guilty one gets it."""
        now = time.perf_counter()
        try:
            begun = self._predictor.begin(self._flow, [each.sample for each in new])
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the one who asked
            if len(new) == 1:
                self.failed_in_a_row += 1
                self._resolve(new[0], error)
                return
            for each in new:
                self._begin([each])
            return
        for each, under in zip(new, begun, strict=True):
            each.under, each.waited_s = under, now - each.since_s
            self._under.append(each)
        self._on_batch(len(self._under))

    def _proceed(self) -> None:
        try:
            done = self._predictor.proceed(self._flow)
        except Exception as error:  # noqa: BLE001 - a step is everybody's
            self.failed_in_a_row += 1
            self._flow.leave(self._flow.texts)
            for each in self._under:
                self._resolve(each, error)
            self._under = []
            return
        self.failed_in_a_row = 0
        for each in [one for one in self._under if one.under is not None and one.under.text in done]:
            self._under.remove(each)
            assert each.under is not None
            try:
                self._resolve(each, (self._predictor.finished(each.under), each.waited_s))
            except Exception as error:  # noqa: BLE001
                self._resolve(each, error)

    def _resolve(self, waiting: _Waiting, outcome: tuple[Answer, float] | BaseException) -> None:
        def settle() -> None:
            if waiting.future.done():
                return
            if isinstance(outcome, asyncio.CancelledError):
                waiting.future.cancel()
            elif isinstance(outcome, BaseException):
                waiting.future.set_exception(outcome)
            else:
                waiting.future.set_result(outcome)

        assert self._loop is not None
        self._loop.call_soon_threadsafe(settle)
