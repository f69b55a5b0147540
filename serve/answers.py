"""The trace of every answer, by its id: what was understood, how sure, by which bundle, in which steps.

Beside the trace lies the question, as a record with its media, where the policy keeps it: feedback on the answer then
becomes a training row. Both end after `keep_days`. Written in the background, many at once; asked for before it is
written, a trace comes from memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmagent import feedback
from mmagent.record import Record
from serve.config import ServeConfig
from serve.store import Store

_KIND = "answer"
_PAUSE_S = 0.05  # between writes: what comes meanwhile is written together
_MOST_WAITING = 10_000  # traces in memory; beyond, the oldest is given up, and counted
_LOOK_AGAIN_S = (0.0, 0.1, 0.3)  # another replica may not have written it yet

logger = logging.getLogger("mmagent.serve")


@dataclass(frozen=True, slots=True)
class Trace:
    """What there is to know of an answer."""

    owner: str
    told: Mapping[str, Any]  # what GET /v1/answers/{id} says
    question: Record | None  # as far as the policy keeps it


class Answers:
    """Belongs to one event loop.

    Attributes:
        lost: traces that could not be written.
    """

    def __init__(self, store: Store, config: ServeConfig) -> None:
        self._store, self._config = store, config
        self._keep_s = config.keep_days * 86_400
        self._waiting: OrderedDict[str, Trace] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._task: asyncio.Task[None] | None = None
        self.lost = 0

    def keeps(self, confidence: float, threshold: float) -> bool:
        """Whether the policy keeps the question of an answer of this confidence."""
        policy = self._config.keep
        if policy == "sampled":
            return random.random() < self._config.keep_share
        return policy == "all" or (policy == "unsure" and confidence < threshold)

    def note(self, id: str, trace: Trace) -> None:
        """Takes a trace; it is on the disk a moment later."""
        with self._lock:
            self._waiting[id] = trace
            while len(self._waiting) > _MOST_WAITING:
                self._waiting.popitem(last=False)
                self.lost += 1
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write())

    async def find(self, id: str) -> Trace | None:
        for pause_s in _LOOK_AGAIN_S:
            await asyncio.sleep(pause_s)
            with self._lock:
                if (waiting := self._waiting.get(id)) is not None:
                    return waiting
            if (held := await self._stored(id)) is not None:
                return held
        return None

    async def kept(self, limit: int, before: str) -> tuple[list[tuple[str, Trace]], str | None]:
        """The newest traces older than `before` (an id; empty: than none), and the last id where there are more."""
        ids = await self._in_thread(self._store.ids, _KIND, limit + 1, before)
        found = [(id, await self._stored(id)) for id in ids[:limit]]
        cursor = ids[limit - 1] if len(ids) > limit else None
        return [(id, trace) for id, trace in found if trace is not None], cursor

    async def _stored(self, id: str) -> Trace | None:
        held = await self._in_thread(self._store.read, _KIND, id)
        if held is None:
            return None
        question = _record(json.loads(held.items[1])) if len(held.items) > 1 else None
        return Trace(held.owner, json.loads(held.items[0]), question)

    async def forget(self, id: str) -> bool:
        """Deletes a trace and its question; whether there was one."""
        with self._lock:
            here = self._waiting.pop(id, None) is not None
        return bool(await self._in_thread(self._store.delete, _KIND, id)) or here

    async def close(self) -> None:
        """Writes what is left."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=True)

    async def _write(self) -> None:
        await asyncio.sleep(_PAUSE_S)
        while self._waiting:
            await self._in_thread(self._write_all)
            await asyncio.sleep(_PAUSE_S)

    def _write_all(self) -> None:
        with self._lock:
            taken = list(self._waiting.items())
        for id, trace in taken:
            items = [json.dumps(trace.told, ensure_ascii=False).encode()]
            if trace.question is not None:
                items.append(json.dumps(feedback.plain(trace.question.to_row()), ensure_ascii=False).encode())
            try:
                self._store.append(_KIND, id, trace.owner, items, self._keep_s)
            except Exception:
                self.lost += 1
                logger.exception("the trace of %s could not be written", id)
            with self._lock:
                if self._waiting.get(id) is trace:
                    del self._waiting[id]

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def now_ms() -> int:
    return int(time.time() * 1000)


def _record(row: Any) -> Record:
    return Record.from_row(feedback.restored(row))
