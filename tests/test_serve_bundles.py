"""Deploying without a restart: the gate, a swap under load, a canary by conversation, and back; the channel's file."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from jobs import promote
from mmagent import bundle as bundles
from mmagent import channels
from mmagent.predictor import Predictor
from serve import parity
from serve.app import build
from serve.bundles import part_of
from serve.config import ServeConfig
from serve.service import Service

QUESTION = "what color is the shape?"


def copied(tiny_bundle: Path, place: Path, name: str, **golden: Any) -> Path:
    """The tiny bundle under another name; with changes to its golden answers."""
    shutil.copytree(tiny_bundle, place)
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "name": name}))
    rows = bundles.load(place).golden() or golden_rows(place)
    for row in rows:
        row["answer"] = {**row["answer"], **golden}
    bundles.add(place, {"golden.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    return place


def golden_rows(place: Path) -> list[dict[str, Any]]:
    rows = [{"text": QUESTION}, {"text": "is there a circle?"}]
    answers = Predictor.load(place).predict(rows)
    return [{"record": row, "answer": a.to_dict(timings=False)} for row, a in zip(rows, answers, strict=True)]


@pytest.fixture
def first(storage: Path, tiny_bundle: Path) -> Path:
    place = copied(tiny_bundle, storage / "runs" / "first" / "bundle", "first")
    channels.append("production", place, share=1, act="promote", by="test")
    return place


@pytest.fixture
def second(storage: Path, tiny_bundle: Path) -> Path:
    return copied(tiny_bundle, storage / "runs" / "second" / "bundle", "second")


@pytest.fixture
def client(first: Path) -> Iterator[TestClient]:
    yield from served(first)


def served(first: Path, channel: str | None = "production") -> Iterator[TestClient]:
    service = Service(Predictor.load(first), ServeConfig(), channel)
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def answered(client: TestClient, conversation: str | None = None) -> str:
    body = {"messages": [{"role": "user", "content": QUESTION}], "conversation": conversation}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == reply.json()["mmagent"]["bundle"]  # no answer is of two
    return str(reply.json()["model"])


def test_a_swap_under_load_drops_nothing_and_mixes_nothing(client: TestClient, second: Path) -> None:
    seen: list[tuple[float, str]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            name = answered(client)
            seen.append((time.monotonic(), name))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    told = client.post("/admin/bundles", json={"bundle": "second"}).json()
    swapped = time.monotonic()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert (told["passed"], told["golden_asked"], told["bundle"], told["replicas"]) == (
        True, 2, "second", {"follow": 1, "alive": 1},
    )  # fmt: skip
    assert {name for at, name in seen if at > swapped + 0.1} == {"second"}
    assert {name for at, name in seen} == {"first", "second"}
    assert client.get("/healthz").json()["bundle"] == "second"
    back = client.post("/admin/rollback").json()
    assert (back["bundle"], answered(client)) == ("first", "first")


def test_the_gate_refuses_other_answers(client: TestClient, storage: Path, tiny_bundle: Path) -> None:
    copied(tiny_bundle, storage / "runs" / "changed" / "bundle", "changed", label="blue", probabilities={"blue": 1.0})
    refused = client.post("/admin/bundles", json={"bundle": "changed"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "parity_failed")
    assert "label is" in refused.json()["error"]["message"]
    assert answered(client) == "first"
    assert len(channels.read("production").lines) == 1
    acts = client.get("/admin/audit").json()["data"]
    assert (acts[-1]["act"], acts[-1]["bundle"], acts[-1]["key"]) == ("deploy", "changed", "local")


def test_bundles_that_cannot_be_loaded_change_nothing(client: TestClient, storage: Path, second: Path) -> None:
    (second / "model.safetensors").write_bytes(b"torn")
    for name, says in (("nothing", "no bundle"), ("second", "damaged"), ("../../etc", "no bundle")):
        refused = client.post("/admin/bundles", json={"bundle": name})
        assert refused.status_code == 422, refused.text
        assert says in refused.json()["error"]["message"]
    assert answered(client) == "first"
    assert client.post("/admin/bundles", json={"bundle": "second", "share": 0}).status_code == 422
    assert client.post("/admin/bundles", json={"bundle": "second", "channel": "x"}).status_code == 409
    assert client.post("/admin/rollback").json()["error"]["code"] == "nothing_before"


def test_a_canary_gets_its_share_and_keeps_its_conversations(client: TestClient, second: Path) -> None:
    told = client.post("/admin/bundles", json={"bundle": "second", "share": 0.3}).json()
    assert (told["bundle"], told["canary"], told["share"]) == ("first", "second", 0.3)
    names = [f"c{n}" for n in range(60)]
    once = {name: answered(client, name) for name in names}
    assert all(answered(client, name) == once[name] for name in names[:10])
    assert once == {name: "second" if part_of(name) < 0.3 else "first" for name in names}
    assert 8 <= Counter(once.values())["second"] <= 28
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert listed == ["first", "second", "production"]
    body = {"text": QUESTION, "model": "second"}
    assert {client.post("/v1/predict", json=body).json()["model"] for _ in range(5)} == {"second"}
    status = client.get("/admin/status").json()
    assert (status["canary"], status["replicas"][0]["canary"]) == ("second", "second")
    ended = client.post("/admin/rollback").json()
    assert (ended["bundle"], ended["canary"]) == ("first", None)
    assert {answered(client, name) for name in names} == {"first"}


def test_a_replica_follows_what_others_write(client: TestClient, second: Path) -> None:
    channels.append("production", second, share=1, act="promote", by="another replica")
    end = time.monotonic() + 20
    while answered(client) != "second" and time.monotonic() < end:
        time.sleep(0.1)
    assert answered(client) == "second"
    channels.append("production", second.parent / "gone", share=1, act="promote", by="a mistake")
    time.sleep(1.5)
    assert answered(client) == "second"  # what cannot be followed is told, and changes nothing
    assert "no bundle" in client.get("/admin/status").json()["trouble"]


def test_a_service_without_a_channel_says_so(first: Path) -> None:
    for client in served(first, None):
        refused = client.post("/admin/bundles", json={"bundle": "first"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_channel")


def test_promote_without_a_service_asks_the_golden_examples_itself(
    first: Path, second: Path, tiny_bundle: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert promote.main(["--bundle", "second"]) == 0
    assert channels.read("production").bundle == str(second)
    copied(tiny_bundle, storage / "runs" / "changed" / "bundle", "changed", label="blue")
    assert promote.main(["--bundle", "changed"]) == promote.EXIT_REFUSED
    assert promote.main(["--bundle", "second", "--canary", "0.1"]) == 2
    assert promote.main(["--rollback"]) == 0
    assert channels.read("production").bundle == str(first)
    assert promote.main(["--show"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("promote") >= 2
    assert "no traffic to share out" in shown.err
    assert promote.main(["--channel", "none", "--rollback"]) == 2
    assert promote.main([]) == 2


def test_questions_of_golden_examples_are_the_records(predictor: Predictor, make_png: Any, make_wav: Any) -> None:
    from mmagent.rows import parse
    from serve.parts import Draft

    rows = [
        {"text": r"is <image> or \<audio> red?", "image": make_png(), "audio": make_wav()},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
                      {"role": "user", "content": "<image> what color  is it?"}], "images": [make_png("blue")]},
        {"context": "Ann works for Acme.", "text": "who?", "task": "extract"},
        {"text": "Ann works for Acme.", "task": "relate", "label": "x",
         "spans": [{"start": 0, "end": 3, "label": "head"}, {"start": 14, "end": 18, "label": "tail"}]},
        {"text": "which?", "task": "match", "candidates": ["a <image>", "b"], "label": "0"},
    ]  # fmt: skip
    for row in rows:
        record = parse(row)
        made = Draft(ServeConfig(), predictor.limits).build(parity.as_request(record), record.task, "x")
        assert [(m.role, m.content) for m in made.messages] == [(m.role, m.content) for m in record.messages]
        assert (made.images, made.audios) == (record.images, record.audios)
        assert [c["content"] for c in made.candidates] == [c["content"] for c in record.candidates]
        if record.task == "relate":
            assert made.target.spans == record.target.spans


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


def test_the_command_moves_a_running_service(
    first: Path, second: Path, tiny_bundle: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from serve.launch import record
    from tests.serving import running

    with running(Service(Predictor.load(first), ServeConfig(), "production")) as address:
        record("production", address)
        assert promote.service_of("production") == address
        assert promote.main(["--bundle", "second", "--canary", "0.5"]) == 0
        assert "a canary of 50% is second" in capsys.readouterr().out
        assert promote.main(["--bundle", "second"]) == 0
        assert "second answers; 2 golden examples within" in capsys.readouterr().out
        copied(tiny_bundle, storage / "runs" / "changed" / "bundle", "changed", label="blue")
        assert promote.main(["--bundle", "changed"]) == promote.EXIT_REFUSED
        assert "the gate refuses" in capsys.readouterr().err
        assert promote.main(["--rollback"]) == 0
        assert "first answers again" in capsys.readouterr().out
        assert promote.main(["--bundle", "second", "--channel", "other", "--url", address]) == 2
        assert "follows the channel 'production'" in capsys.readouterr().err
    assert promote.service_of("production") is None
    assert promote.main(["--bundle", "second", "--url", address]) == 2
    assert "does not answer" in capsys.readouterr().err
