"""What waits for a person: a queue in the store, and a webhook that is told of each.

A letter to the webhook lies in the store beside the request until it is delivered: one that is down, slow or answers
with an error is tried again, with pauses that grow, by whichever replica lives then, and given up after the last. Which
replica tries is settled in the store, too; one that dies in between is followed by another. So a webhook is told at
least once, and knows by the Idempotency-Key what it was told already. The queue holds the request either way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx

from serve.ids import new_id
from serve.store import Store, StoreError

PAUSES_S = (1.0, 5.0, 30.0, 120.0, 600.0, 3600.0)
TIMEOUT_S = 10.0
Delivery = Literal["told", "again", "given up"]

_KIND, _LETTER, _TRY = "handover", "handover_letter", "handover_try"
_LOOK_EVERY_S = 5.0  # for letters that others left, where nothing here is due before
_AT_ONCE = 8  # letters on their way; a slow webhook holds no more
_LETTERS = 1000

logger = logging.getLogger("mmagent.serve")


class Handovers:
    """Belongs to one event loop.

    Args:
        webhook: an address that gets each as JSON; none: the queue alone.
        pauses_s: after each attempt that failed; when they are used up, the webhook is given up.
        timeout_s: of one attempt, from start to end.
        on_delivery: is told how an attempt ended.
    """

    def __init__(
        self,
        store: Store,
        webhook: str | None,
        keep_days: float,
        thread: ThreadPoolExecutor,
        *,
        pauses_s: Sequence[float] = PAUSES_S,
        timeout_s: float = TIMEOUT_S,
        on_delivery: Callable[[Delivery], None] = lambda _: None,
    ) -> None:
        self._store, self._webhook, self._thread = store, webhook, thread
        self._keep_s = keep_days * 86_400
        self._pauses_s, self._timeout_s, self._on_delivery = tuple(pauses_s), timeout_s, on_delivery
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to deliver what is due, what a process before this one left undelivered included."""
        if self._webhook is not None and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._deliver())

    async def put(self, request: Mapping[str, Any]) -> str:
        """Takes a request; its id. It is in the store when this returns.

        Raises:
            StoreError: it could not be stored.
        """
        id = new_id("hand")
        told = {"id": id, "created_ms": int(time.time() * 1000), **request}
        data = json.dumps(told, ensure_ascii=False).encode()
        await self._run(self._store.put, _KIND, id, "service", data, self._keep_s)
        if self._webhook is not None:
            await self._write(id, tries=0, due_s=time.time())
            self._due.set()
        return id

    async def waiting(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest requests that wait."""

        def read() -> list[dict[str, Any]]:
            held = [self._store.read(_KIND, id) for id in self._store.ids(_KIND, limit)]
            return [json.loads(each.items[0]) for each in held if each is not None]

        found: list[dict[str, Any]] = await self._run(read)
        return found

    async def done(self, id: str) -> bool:
        """A person has taken it; whether it waited. A webhook that was not told of it by now need not be."""
        await self._run(self._store.delete, _LETTER, id)
        return bool(await self._run(self._store.delete, _KIND, id))

    async def close(self) -> None:
        """What is not delivered stays in the store."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- the letters -----------------------------------------------------------------------------------------------

    async def _deliver(self) -> None:
        """Tries what is due, waits for what will be."""
        free = asyncio.Semaphore(_AT_ONCE)
        on_the_way: dict[str, asyncio.Task[None]] = {}

        async def attempt(id: str, tries: int) -> None:
            try:
                async with free:
                    await self._attempt(id, tries)
            finally:
                del on_the_way[id]
                self._due.set()

        try:
            while True:
                self._due.clear()
                wait_s = _LOOK_EVERY_S
                try:
                    for id, letter in await self._run(self._letters):
                        left_s = letter["due_s"] - time.time()
                        if left_s > 0:
                            wait_s = min(wait_s, left_s)
                        elif id not in on_the_way:
                            on_the_way[id] = asyncio.create_task(attempt(id, letter["tries"]))
                except StoreError as error:
                    logger.error("the letters to the webhook cannot be read: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):  # not wait_for: Python 3.11's loses a cancellation at the end
                        await self._due.wait()
        finally:
            left = list(on_the_way.values())
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _letters(self) -> list[tuple[str, dict[str, Any]]]:
        """Those that are not delivered yet, the oldest first."""
        held = [(id, self._store.read(_LETTER, id)) for id in reversed(self._store.ids(_LETTER, _LETTERS))]
        return [(id, json.loads(each.items[0])) for id, each in held if each is not None]

    async def _attempt(self, id: str, tries: int) -> None:
        """One attempt, where no other replica makes it."""
        try:
            # The claim ends by itself: a replica that dies with it does not keep the others from trying.
            if await self._run(self._store.count, _TRY, f"{id}.{tries}", self._timeout_s + 5.0) > 1:
                await asyncio.sleep(1.0)  # it is another's; seen again when that one has written what came of it
                return
            held = await self._run(self._store.read, _KIND, id)
            trouble = "" if held is None else await self._post(id, held.items[0])
            if not trouble:
                if held is not None:
                    self._on_delivery("told")
                await self._run(self._store.delete, _LETTER, id)
            elif tries < len(self._pauses_s):
                self._on_delivery("again")
                await self._write(id, tries + 1, time.time() + self._pauses_s[tries])
            else:
                self._on_delivery("given up")
                logger.error("the webhook was not told of the handover %s in %d attempts: %s", id, tries + 1, trouble)
                await self._run(self._store.delete, _LETTER, id)
        except StoreError as error:
            logger.error("the handover %s waits for the store: %s", id, error)
            await asyncio.sleep(1.0)

    async def _post(self, id: str, data: bytes) -> str:
        """Tells the webhook; why it was not told."""
        assert self._webhook is not None
        headers = {"Content-Type": "application/json", "Idempotency-Key": id}
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                httpx.AsyncClient(timeout=self._timeout_s, follow_redirects=False, trust_env=False) as client,
                # What it says beside its status is of no use, and may be long: it is not read.
                client.stream("POST", self._webhook, content=data, headers=headers) as answer,
            ):
                return "" if answer.is_success else f"it answered {answer.status_code}"
        except (httpx.HTTPError, TimeoutError) as error:
            return type(error).__name__

    async def _write(self, id: str, tries: int, due_s: float) -> None:
        letter = json.dumps({"tries": tries, "due_s": due_s}).encode()
        await self._run(self._store.put, _LETTER, id, "service", letter, self._keep_s)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
