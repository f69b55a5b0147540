"""Drift of inputs, labels and confidence, by kind of input; and a bundle that does worse in life is taken back."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmagent import channels
from mmagent.answer import Answer
from mmagent.calibration import Calibration
from mmagent.predictor import Predictor
from mmagent.targets import TaskInfo
from serve.config import ServeConfig
from serve.drift import FEWEST, Drift
from serve.sentinel import Sentinel
from serve.service import Service
from tests.serving import running

INFOS = {"classify": TaskInfo("classify", ("a", "b"), {"a": 500, "b": 500})}
CURVE = ((0.9, 0.5, 0.99), (0.4, 1.0, 0.9))


def answer(label: str = "a", confidence: float = 0.9, novelty: float = 0.5) -> Answer:
    return Answer(task="classify", confidence=confidence, abstained=False, bundle="b", words=label, label=label,
                  novelty=novelty)  # fmt: skip


def told(answers: list[Answer], modalities: str = "text") -> dict[str, Any]:
    drift = Drift(INFOS, {"classify": Calibration(curve=CURVE)})
    for each in answers:
        drift.add(each, modalities)
    return drift.told()


def test_what_is_as_it_was_drifts_in_nothing() -> None:
    found = told([answer("a"), answer("b")] * 100)
    assert found["all"] == found["text"]
    assert found["all"]["inputs"] == 0.0
    assert found["all"]["labels"] == pytest.approx(0.0, abs=1e-3)
    assert found["all"]["confidence"] == 0.0


def test_each_kind_of_drift_is_told() -> None:
    found = told([answer("a", 0.6, 0.95)] * 200)["all"]
    assert found["inputs"] == pytest.approx(0.45)
    share = 200.5 / 201
    wanted = (share - 0.5) * math.log(share / 0.5) + (0.5 / 201 - 0.5) * math.log(0.5 / 201 / 0.5)
    wanted -= (1 + 3 * math.sqrt(2)) * (1 / 200 + 1 / 1000)  # what chance may make of it
    assert found["labels"] == pytest.approx(wanted, rel=1e-2)
    assert found["confidence"] == pytest.approx(0.3)


def test_few_answers_say_nothing() -> None:
    assert told([answer()] * (FEWEST - 1)) == {}


def counted(
    sentinel: Sentinel, bundle: str, *, answers: int = 0, unsure: int = 0, right: int = 0, wrong: int = 0
) -> None:
    for n in range(answers):
        sentinel.answered(bundle, unsure=n < unsure)
    for says, count in (("right", right), ("wrong", wrong), ("other", 5)):
        for n in range(count):
            sentinel.judged(bundle, f"{says}-{n}", says)


def test_a_bundle_that_is_called_wrong_more_often_is_complained_of() -> None:
    sentinel = Sentinel(0.1)
    counted(sentinel, "old", right=90, wrong=10)
    counted(sentinel, "new", right=10, wrong=15)
    assert sentinel.complaint("new", "old") == "15 of 25 answers were called wrong, 10 of 100 before"
    assert sentinel.complaint("old", "new") is None


def test_who_judges_one_answer_many_times_is_counted_once() -> None:
    sentinel = Sentinel(0.1)
    counted(sentinel, "old", right=90, wrong=10)
    counted(sentinel, "new", right=20)
    for _ in range(30):
        sentinel.judged("new", "one", "wrong")
    assert sentinel.complaint("new", "old") is None
    assert (sentinel.records["new"].verdicts, sentinel.records["new"].wrong) == (21, 1)
    sentinel.judged("new", "one", "right")
    assert (sentinel.records["new"].verdicts, sentinel.records["new"].wrong) == (21, 0)
    sentinel.forget("new")
    sentinel.judged("new", "one", "wrong")
    assert (sentinel.records["new"].verdicts, sentinel.records["new"].wrong) == (1, 1)


def test_and_one_that_is_unsure_more_often() -> None:
    sentinel = Sentinel(0.1)
    counted(sentinel, "old", answers=200, unsure=20)
    counted(sentinel, "new", answers=60, unsure=30)
    assert "30 of 60 answers were unsure" in str(sentinel.complaint("new", "old"))


@pytest.mark.parametrize(("right", "wrong"), [(18, 2), (3, 9), (70, 16)])
def test_chance_and_few_verdicts_are_no_reason(right: int, wrong: int) -> None:
    sentinel = Sentinel(0.1)
    counted(sentinel, "old", right=90, wrong=10)
    counted(sentinel, "new", right=right, wrong=wrong)
    assert sentinel.complaint("new", "old") is None
    assert Sentinel(None, sentinel.records).complaint("new", "old") is None


def test_a_promoted_bundle_that_users_call_wrong_is_taken_back(
    storage: Path, tiny_bundle: Path, make_bundle: Callable[..., Path]
) -> None:
    """A real service: the first bundle's answers are called right, those of the second wrong."""
    first = shutil.copytree(tiny_bundle, storage / "first")
    second = make_bundle(
        storage / "second", {"classify": TaskInfo("classify", ("red", "green", "blue", "black"))}, "classify"
    )
    channels.append("production", first, share=1.0, act="promote", by="tests")
    service = Service(Predictor.load(first, device="cpu"), ServeConfig(), "production")
    with running(service) as address, httpx.Client(base_url=address, timeout=60) as client:

        def judged(verdict: str, count: int) -> None:
            for number in range(count):
                id = (
                    client.post("/v1/predict", json={"text": f"is it number {number}?"}).raise_for_status().json()["id"]
                )
                client.post("/v1/feedback", json={"answer": id, "verdict": verdict}).raise_for_status()

        judged("right", 25)
        client.post("/admin/bundles", json={"bundle": str(second)}).raise_for_status()
        assert client.get("/admin/status").json()["bundle"] == "second"
        judged("wrong", 25)
        end = time.monotonic() + 20
        while client.get("/admin/status").json()["bundle"] != "tiny" and time.monotonic() < end:
            time.sleep(0.1)
        status = client.get("/admin/status").json()
        assert status["bundle"] == "tiny"
        assert status["history"][-1]["act"] == "rollback"
        assert "answers were called wrong" in status["history"][-1]["by"]
        assert status["drift"] == {} or "all" in status["drift"]
        acts = client.get("/admin/audit").json()["data"]
        assert any(each["act"] == "taken back" and each["bundle"] == "second" for each in acts)
        assert "mmagent_taken_back_total" in client.get("/metrics").text
