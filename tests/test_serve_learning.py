"""The labelling queue over HTTP for every kind of task, its labels as feedback, and what is told of rounds."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mmagent import channels, feedback
from mmagent.predictor import Predictor
from mmagent.targets import TaskInfo
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service
from tests.test_serve_tasks import BODIES, INFOS

RIGHT: dict[str, dict[str, Any]] = {
    "classify": {"label": "red"}, "classify:mood": {"label": "blue"}, "multilabel": {"labels": ["red", "blue"]},
    "regress": {"value": 2.5}, "match": {"label": "1"}, "tag": {"spans": [{"start": 18, "end": 21, "label": "red"}]},
    "relate": {"label": "green"}, "extract": {"text": "red"},
}  # fmt: skip


@pytest.fixture(scope="module")
def many(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "many", INFOS, "classify")


@pytest.fixture
def client(many: Path, storage: Path) -> Iterator[TestClient]:
    channels.append("production", many, share=1.0, act="promote", by="tests")
    service = Service(Predictor.load(many, device="cpu"), ServeConfig(), "production")
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def asked(client: TestClient, bodies: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The ids of answers by task, once the questions are kept."""
    ids = {task: client.post("/v1/predict", json={"task": task, **body}).json()["id"] for task, body in bodies.items()}
    while len(client.get("/admin/questions?limit=200").json()["data"]) < len(ids):
        time.sleep(0.02)
    return ids


def test_every_kind_of_answer_can_be_labelled(client: TestClient) -> None:
    ids = asked(client, BODIES)
    found = client.get("/admin/queue").json()
    rows = {row["task"]: row for row in found["data"]}
    assert found["waiting"] == len(rows) == len(BODIES)
    scores = [row["score"] for row in found["data"]]
    assert scores == sorted(scores, reverse=True)
    assert rows["relate"]["ends"] == {"head": "the red circle", "tail": "blue image"}
    assert [each["text"] for each in rows["match"]["candidates"]] == ["red", "it is blue", "no"]
    assert rows["extract"]["words"] == BODIES["extract"]["context"]
    for task, right in RIGHT.items():
        row = rows[task]
        assert row["answer"] == ids[task]
        assert set(row["agreed"]) == {row["field"]} == set(right)
        taken = client.post("/admin/labels", json={"answer": row["answer"], **right})
        assert taken.status_code == 200, taken.text
    made = {
        each.question.task: feedback.record(each) for each in feedback.read(feedback.folder()).said if each.question
    }
    assert made["tag"].target.spans == ({"start": 18, "end": 21, "label": "red"},)
    assert made["match"].target.labels == ("1",)
    assert made["extract"].target.texts == ("red",)
    assert made["regress"].target.value == 2.5
    assert made["multilabel"].target.labels == ("red", "blue")
    assert {made[task].target.label for task in ("classify", "classify:mood", "relate")} == {"red", "blue", "green"}
    assert client.get("/admin/queue").json() == {"object": "list", "data": [], "waiting": 0}
    # Labels of the hardest questions are no verdict on the bundle.
    assert 'mmagent_feedback_total{bundle="many"' not in client.get("/metrics").text


def test_agreeing_says_what_the_present_bundle_answers(client: TestClient) -> None:
    asked(client, {task: BODIES[task] for task in ("tag", "classify", "regress")})
    for row in client.get("/admin/queue").json()["data"]:
        assert client.post("/admin/labels", json={"answer": row["answer"], **row["agreed"]}).status_code == 200
    for said in feedback.read(feedback.folder()).said:
        told, made = said.answered["understood"], feedback.record(said).target
        if "spans" in told:
            assert [{k: s[k] for k in ("start", "end", "label")} for s in told["spans"]] == [*(made.spans or ())]
        else:
            assert made.label == told.get("label")
            assert made.value == (pytest.approx(told["value"], abs=1e-4) if "value" in told else None)


def test_media_come_along_and_mistakes_are_told(client: TestClient, make_png: Callable[..., bytes]) -> None:
    shown = base64.b64encode(make_png("red")).decode()
    body = {"text": "what is it?", "image": f"data:image/png;base64,{shown}"}
    asked(client, {"classify": body})
    [row] = client.get("/admin/queue?limit=1").json()["data"]
    assert row["images"] == [shown]
    assert client.post("/admin/labels", json={"answer": "ans_unknown", "label": "red"}).status_code == 404
    assert client.post("/admin/labels", json={"answer": row["answer"]}).status_code == 422
    assert client.get("/admin/queue?limit=0").status_code == 422


def test_the_bundle_before_has_its_say(
    client: TestClient, storage: Path, make_bundle: Callable[..., Path], many: Path
) -> None:
    """Another bundle that answers otherwise: its questions score higher; one that is gone has no say."""
    asked(client, {"classify": BODIES["classify"]})
    [alone] = client.get("/admin/queue").json()["data"]
    labels = tuple(f"other {n}" for n in range(3))
    other = make_bundle(storage / "other", {"classify": TaskInfo("classify", labels)}, "classify")
    for place in (other, many):
        channels.append("production", place, share=1.0, act="promote", by="tests")
    [both] = client.get("/admin/queue").json()["data"]
    assert both["score"] == pytest.approx(alone["score"] + 0.5, abs=1e-3)


def test_rounds_are_told_with_their_verdict(client: TestClient, storage: Path) -> None:
    assert client.get("/admin/rounds").json()["data"] == []
    told = {"said": 60, "train": 40, "replayed": 80, "aside": {"unknown label": 2}, "created_ms": 5}
    check = {"rows": 100, "before": 0.9, "after": 0.8, "low": -0.1, "high": 0.0, "rule": "r"}
    checks = [{**check, "name": name, "passed": fine} for name, fine in
              (("fixed", True), ("fixed, classify=red", False), ("fixed, classify=blue", True))]  # fmt: skip
    for name, state in (("r001", "accepted"), ("r002", "refused")):
        place = storage / "refine" / "production" / name
        place.mkdir(parents=True)
        (place / "round.json").write_text(json.dumps({**told, "state": state}))
    (place / "gate.json").write_text(json.dumps({"accepted": False, "checks": checks}))
    new, old = client.get("/admin/rounds").json()["data"]
    assert (new["name"], new["state"], new["failed"], new["aside"]) == ("production-r002", "refused", 1, 2)
    assert [each["name"] for each in new["checks"]] == ["fixed", "fixed, classify=red"]
    assert (old["state"], old["checks"]) == ("accepted", [])
