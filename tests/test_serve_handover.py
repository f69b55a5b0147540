"""What is passed on to a person: it is in the queue when the client is told so, and a webhook hears of it in the end,
whatever becomes of the webhook or of the service meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from mmagent.agent.policy import Policy
from mmagent.predictor import Predictor
from serve.app import build
from serve.config import ServeConfig
from serve.handover import Delivery, Handovers
from serve.service import Service
from serve.store import SqliteStore, Store

PAUSES_S = (0.05, 0.1, 0.2)


class Desk:
    """A webhook that answers as it is told, and remembers what it heard.

    Args:
        port: of one that was here before; 0: any.
    """

    def __init__(self, port: int = 0) -> None:
        desk = self
        self.statuses: list[int] = []  # for the next requests; 200 when they are used up
        self.slow_s = 0.0
        self.heard: list[tuple[float, str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                desk.heard.append((time.monotonic(), self.headers["Idempotency-Key"], body))
                time.sleep(desk.slow_s)
                self.send_response(desk.statuses.pop(0) if desk.statuses else 200)
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.address = f"http://127.0.0.1:{self.port}/tickets"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    opened = Desk()
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = SqliteStore(tmp_path / "store.sqlite")
    yield opened
    opened.close()


class Told:
    """A process's share in handing over, for a test's own event loop."""

    def __init__(self, store: Store, webhook: str | None, **more: Any) -> None:
        self.ended: list[Delivery] = []
        self._thread = ThreadPoolExecutor(2)
        options: dict[str, Any] = {"pauses_s": PAUSES_S, "timeout_s": 20.0, **more}
        self.handovers = Handovers(store, webhook, 1.0, self._thread, on_delivery=self.ended.append, **options)

    async def __aenter__(self) -> Told:
        self.handovers.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.handovers.close()
        self._thread.shutdown()


async def until(holds: Callable[[], bool], seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        await asyncio.sleep(0.02)


def done(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


def test_the_webhook_hears_of_it_once(store: Store, desk: Desk) -> None:
    async def story() -> None:
        async with Told(store, desk.address) as told:
            id = await told.handovers.put({"asked": "wo ist mein Päckchen?"})
            assert [each["id"] for each in await told.handovers.waiting()] == [id]
            await until(lambda: told.ended == ["told"])
            await asyncio.sleep(0.3)
        [(_, key, body)] = desk.heard
        assert (key, body["id"], body["asked"]) == (id, id, "wo ist mein Päckchen?")
        assert store.ids("handover_letter", 10) == []
        assert store.ids("handover", 10) == [id]  # it waits for a person all the same

    done(story())


@pytest.mark.parametrize("status", [500, 302, 429])
def test_what_answers_wrongly_is_asked_again_after_pauses_that_grow(store: Store, desk: Desk, status: int) -> None:
    async def story() -> None:
        desk.statuses = [status, status, status]
        async with Told(store, desk.address) as told:
            id = await told.handovers.put({"asked": "x"})
            await until(lambda: "told" in told.ended)
        assert told.ended == ["again", "again", "again", "told"]
        times = [at for at, *_ in desk.heard]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert all(gap >= pause for gap, pause in zip(gaps, PAUSES_S, strict=True))
        assert {key for _, key, _ in desk.heard} == {id}

    done(story())


def test_it_is_given_up_at_last_and_waits_for_a_person(
    store: Store, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        desk.statuses = [500] * 50
        async with Told(store, desk.address) as told:
            id = await told.handovers.put({"asked": "a secret"})
            await until(lambda: "given up" in told.ended)
            await asyncio.sleep(0.5)
            assert len(desk.heard) == 1 + len(PAUSES_S)
            assert [each["id"] for each in await told.handovers.waiting()] == [id]
            assert f"not told of the handover {id} in 4 attempts: it answered 500" in caplog.text
            assert "secret" not in caplog.text
            assert store.ids("handover_letter", 10) == []

    done(story())


def test_a_slow_webhook_costs_its_time_and_holds_nobody(store: Store, desk: Desk) -> None:
    async def story() -> None:
        desk.slow_s = 30.0
        async with Told(store, desk.address, timeout_s=0.3) as told:
            began = time.monotonic()
            await asyncio.gather(*(told.handovers.put({"asked": str(n)}) for n in range(5)))
            assert time.monotonic() - began < 5
            await until(lambda: told.ended.count("again") >= 5)
            desk.slow_s = 0.0
            await until(lambda: told.ended.count("told") == 5)

    done(story())


def test_one_that_is_down_is_told_when_it_comes_back_even_by_another_process(store: Store) -> None:
    async def story() -> None:
        gone = Desk()
        gone.close()
        async with Told(store, gone.address, pauses_s=(0.2, 0.4, 30.0)) as told:
            id = await told.handovers.put({"asked": "x"})
            await until(lambda: len(told.ended) == 2)
        desk = Desk(gone.port)
        try:
            async with Told(store, desk.address, pauses_s=(0.2, 0.4, 30.0)) as after:
                await until(lambda: after.ended == ["told"])
            assert [(key, body["asked"]) for _, key, body in desk.heard] == [(id, "x")]
        finally:
            desk.close()

    done(story())


def test_many_processes_tell_it_once(store: Store, desk: Desk) -> None:
    async def story() -> None:
        desk.slow_s = 0.3
        async with Told(store, desk.address) as one, Told(store, desk.address) as other:
            for n in range(4):
                await one.handovers.put({"asked": str(n)})
            other.handovers._due.set()
            await until(lambda: len(one.ended + other.ended) == 4)
            await asyncio.sleep(0.5)
        assert sorted(body["asked"] for *_, body in desk.heard) == ["0", "1", "2", "3"]

    done(story())


def test_one_that_died_while_it_told_is_followed_by_another(store: Store, desk: Desk, tmp_path: Path) -> None:
    async def story() -> None:
        desk.slow_s = 2.0
        async with Told(store, desk.address, timeout_s=60.0) as told:
            id = await told.handovers.put({"asked": "x"})
            await until(lambda: len(desk.heard) == 1)
        desk.slow_s = 0.0
        async with Told(store, desk.address) as after:
            await asyncio.sleep(0.5)
            assert after.ended == []  # the dead one's claim lasts as long as its attempt might
            with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite", timeout=10)) as database, database:
                database.execute("update counts set ends_s = 0 where kind = 'handover_try'")
            await until(lambda: after.ended == ["told"])
        assert [key for _, key, _ in desk.heard] == [id, id]

    done(story())


def test_what_a_person_took_is_told_no_more(store: Store) -> None:
    async def story() -> None:
        gone = Desk()
        gone.close()
        async with Told(store, gone.address, pauses_s=(1.0, 1.0)) as told:
            id = await told.handovers.put({"asked": "x"})
            await until(lambda: told.ended == ["again"])
            assert await told.handovers.done(id)
            assert not await told.handovers.done(id)
            assert store.ids("handover_letter", 10) == []

    done(story())


def test_the_agent_hands_over_and_the_webhook_hears(tiny_bundle: Path, storage: Path, desk: Desk) -> None:
    policy = Policy.model_validate({"threshold": 1.0, "unsure": ["handover"], "handover": {"webhook": desk.address}})
    service = Service(Predictor.load(tiny_bundle), ServeConfig(), policy=policy)
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        answer = client.post("/v1/predict", json={"text": "what color is the shape?"}).json()
        assert answer["mmagent"]["outcome"] == "handover"
        [waiting] = client.get("/admin/handovers").json()["data"]
        assert (waiting["answer"], waiting["asked"]) == (answer["id"], "what color is the shape?")
        end = time.monotonic() + 20
        while 'mmagent_webhook_total{ended="told"} 1.0' not in client.get("/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert [body["answer"] for *_, body in desk.heard] == [answer["id"]]


@pytest.mark.parametrize("webhook", ["desk", "ftp://desk/x", "http://", "https://a b/"])
def test_an_address_that_is_none_is_told_when_the_agent_is_read(webhook: str) -> None:
    with pytest.raises(ValidationError, match="is no address"):
        Policy.model_validate({"handover": {"webhook": webhook}})
