"""Feedback that was acknowledged is there: after kill -9 of the service, and when the store is gone it is refused."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mmagent import feedback
from mmagent.predictor import Predictor
from serve import keys
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running

SERVE = """
import sys, time
from mmagent.predictor import Predictor
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running
with running(Service(Predictor.load(sys.argv[1], device="cpu"), ServeConfig(), "production")) as address:
    print(address, flush=True)
    time.sleep(600)
"""


@pytest.mark.long
def test_what_was_acknowledged_survives_kill_9(storage: Path, tiny_bundle: Path) -> None:
    acknowledged: set[str] = set()
    rng = random.Random(0)
    for _ in range(2):
        service = subprocess.Popen([sys.executable, "-c", SERVE, str(tiny_bundle)], stdout=subprocess.PIPE, text=True)
        assert service.stdout is not None
        address = service.stdout.readline().strip()
        over = threading.Event()

        def tell(number: int, address: str = address, over: threading.Event = over) -> None:
            with httpx.Client(base_url=address, timeout=10) as client:
                for count in range(10_000):
                    try:
                        asked = client.post("/v1/predict", json={"text": f"is it {number} or {count}?"})
                        body = {"answer": asked.json()["id"], "label": "red"}
                        taken = client.post("/v1/feedback", json=body)
                    except (httpx.HTTPError, ValueError):
                        return
                    if taken.status_code == 200:
                        acknowledged.add(taken.json()["id"])
                    if over.is_set():
                        return

        threads = [threading.Thread(target=tell, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(1.0 + rng.random())
        os.kill(service.pid, signal.SIGKILL)
        over.set()
        for thread in threads:
            thread.join(20)
        service.wait(20)
    found = feedback.read(feedback.folder())
    assert len(acknowledged) > 20
    assert acknowledged <= {each.id for each in found.said}
    assert all(each.question is not None for each in found.said)


@pytest.fixture
def redis_port() -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    if shutil.which("redis-server") is None:
        pytest.skip("no Redis is installed (Debian: apt-get install redis-server)")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield port, server
    server.kill()
    server.wait()


def test_without_its_store_answers_go_on_and_feedback_is_refused(
    storage: Path, tiny_bundle: Path, redis_port: tuple[int, subprocess.Popen[bytes]]
) -> None:
    port, server = redis_port
    config = ServeConfig(store=f"redis://127.0.0.1:{port}/0")
    with running(Service(Predictor.load(tiny_bundle, device="cpu"), config, "production")) as address:
        client = httpx.Client(base_url=address, timeout=30)
        first = client.post("/v1/predict", json={"text": "is it red?"}).raise_for_status().json()["id"]
        assert client.post("/v1/feedback", json={"answer": first, "label": "red"}).status_code == 200
        server.kill()
        server.wait()
        second = client.post("/v1/predict", json={"text": "is it blue?"})
        assert second.status_code == 200
        refused = client.post("/v1/feedback", json={"answer": first, "label": "blue"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] in ("store_unreachable", "not_stored")
        assert refused.headers["Retry-After"]
        assert client.get("/healthz").status_code == 200
    assert len(feedback.read(feedback.folder()).said) == 1


def test_a_key_that_keeps_nothing_keeps_nothing(storage: Path, tiny_bundle: Path) -> None:
    file = storage / "keys.json"
    secrets = {
        name: keys.add(
            file,
            keys.Key(id=f"key_{name}", name=name, hashes={}, scopes=("ask", "feedback"), keep=name == "open"),
            days=None,
        )
        for name in ("open", "shy")
    }  # fmt: skip
    config = ServeConfig(keys=str(file))
    with running(Service(Predictor.load(tiny_bundle, device="cpu"), config, "production")) as address:
        for name, secret in secrets.items():
            headers = {"Authorization": f"Bearer {secret}"}
            asked = httpx.post(f"{address}/v1/predict", json={"text": "is it red?"}, headers=headers).raise_for_status()
            body = {"answer": asked.json()["id"], "label": "red"}
            httpx.post(f"{address}/v1/feedback", json=body, headers=headers).raise_for_status()
            trace = httpx.get(f"{address}/v1/answers/{asked.json()['id']}", headers=headers).json()
            assert trace["question_kept"] == (name == "open")
    told = {each.key: each.question is not None for each in feedback.read(feedback.folder()).said}
    assert told == {"key_open": True, "key_shy": False}


def test_deleting_an_answer_takes_back_what_was_said_of_it(storage: Path, tiny_bundle: Path) -> None:
    with running(Service(Predictor.load(tiny_bundle, device="cpu"), ServeConfig(), "production")) as address:
        ids = [httpx.post(f"{address}/v1/predict", json={"text": f"is it {n}?"}).json()["id"] for n in range(2)]
        for id in ids:
            httpx.post(f"{address}/v1/feedback", json={"answer": id, "label": "red"}).raise_for_status()
        assert len(feedback.read(feedback.folder()).said) == 2
        httpx.delete(f"{address}/v1/answers/{ids[0]}").raise_for_status()
    assert [each.content["answer"] for each in feedback.read(feedback.folder()).said] == [ids[1]]
