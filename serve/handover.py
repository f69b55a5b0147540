"""What waits for a person: a queue in the store, and a webhook that is told of each.

A webhook that does not answer is tried again, with pauses, in the background; the queue holds the request either way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from serve.ids import new_id
from serve.store import Store

_KIND = "handover"
_PAUSES_S = (0.5, 5.0, 30.0, 120.0)
_TIMEOUT_S = 10.0

logger = logging.getLogger("mmagent.serve")


class Handovers:
    """Belongs to one event loop.

    Args:
        webhook: an address that gets each as JSON; none: the queue alone.
    """

    def __init__(self, store: Store, webhook: str | None, keep_days: float, thread: ThreadPoolExecutor) -> None:
        self._store, self._webhook, self._thread = store, webhook, thread
        self._keep_s = keep_days * 86_400
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, request: Mapping[str, Any]) -> str:
        """Takes a request; its id."""
        id = new_id("hand")
        told = {"id": id, "created_ms": int(time.time() * 1000), **request}
        task = asyncio.get_running_loop().create_task(self._give(id, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return id

    async def waiting(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest requests that wait."""

        def read() -> list[dict[str, Any]]:
            held = [self._store.read(_KIND, id) for id in self._store.ids(_KIND, limit)]
            return [json.loads(each.items[0]) for each in held if each is not None]

        return await asyncio.get_running_loop().run_in_executor(self._thread, read)

    async def done(self, id: str) -> bool:
        """A person has taken it; whether it waited."""
        return bool(await asyncio.get_running_loop().run_in_executor(self._thread, self._store.delete, _KIND, id))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _give(self, id: str, told: Mapping[str, Any]) -> None:
        data = json.dumps(told, ensure_ascii=False).encode()
        try:
            await asyncio.get_running_loop().run_in_executor(
                self._thread, self._store.put, _KIND, id, "service", data, self._keep_s
            )
        except Exception:
            logger.exception("the handover %s could not be stored", id)
        if self._webhook is None:
            return
        for pause_s in (*_PAUSES_S, None):
            try:
                async with httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
                    answer = await client.post(
                        self._webhook, content=data, headers={"Content-Type": "application/json", "Idempotency-Key": id}
                    )
                if answer.is_success:
                    return
                reason = f"it answered {answer.status_code}"
            except httpx.HTTPError as error:
                reason = type(error).__name__
            if pause_s is None:
                logger.error("the webhook was not told of the handover %s: %s", id, reason)
                return
            await asyncio.sleep(pause_s)
