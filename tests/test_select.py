"""Labelling what was asked: a queue out of a running service, filled in as CSV, JSONL or in Label Studio, and back."""

from __future__ import annotations

import base64
import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from jobs import queue, select
from mmagent import channels, feedback
from mmagent.predictor import Predictor
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running

COLOURS = ("red", "green", "blue", "black", "white", "orange")


@pytest.fixture
def asked(storage: Path, tiny_bundle: Path, make_png: Callable[..., bytes]) -> Iterator[tuple[str, list[str]]]:
    """The address of a service that was asked, and the ids of its answers."""
    channels.append("production", tiny_bundle, share=1.0, act="promote", by="tests")
    with running(Service(Predictor.load(tiny_bundle, device="cpu"), ServeConfig(), "production")) as address:
        ids = []
        for number in range(24):
            picture = base64.b64encode(make_png(COLOURS[number % 6], (16 + number, 16))).decode()
            body = {"text": "what color is it?", "image": f"data:image/png;base64,{picture}"}
            ids.append(httpx.post(f"{address}/v1/predict", json=body).raise_for_status().json()["id"])
        while not kept(address, ids):
            time.sleep(0.05)
        yield address, ids


def kept(address: str, ids: list[str]) -> bool:
    """Traces are written in the background."""
    rows = httpx.get(f"{address}/admin/questions?limit=200").raise_for_status().json()["data"]
    return {row["answer"] for row in rows} == set(ids)


def run(address: str, *arguments: str) -> int:
    return select.main(["--url", address, *arguments])


def test_a_queue_goes_out_and_comes_back(
    asked: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, ids = asked
    out = tmp_path / "queue.csv"
    assert run(address, "--n", "8", "--out", str(out)) == 0
    assert "8 of 24 questions to label" in capsys.readouterr().out
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len({row["answer"] for row in rows}) == 8
    assert {row["answer"] for row in rows} <= set(ids)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(Path(row["image"]).read_bytes().startswith(b"\x89PNG") for row in rows)
    for row in rows[:5]:
        row["label"] = "red"
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert run(address, "--labels", str(out)) == 0
    assert "5 labels taken as feedback of 'labeller', 3 rows without one" in capsys.readouterr().out
    said = feedback.read(feedback.folder()).said
    assert {each.content["answer"] for each in said} == {row["answer"] for row in rows[:5]}
    assert all(feedback.record(each).target.label == "red" and feedback.record(each).images for each in said)
    assert all(each.answered["channel"] == "production" for each in said)
    assert run(address, "--labels", str(out)) == 0  # again: nothing is counted twice
    assert "0 labels taken as feedback of 'labeller', 3 rows without one, 5 were known" in capsys.readouterr().out
    assert run(address, "--n", "100", "--out", str(tmp_path / "rest.jsonl")) == 0
    left = {json.loads(line)["answer"] for line in (tmp_path / "rest.jsonl").read_text().splitlines()}
    assert left == set(ids) - {row["answer"] for row in rows[:5]}


def test_label_studio_is_read_as_it_exports(asked: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = asked
    out = tmp_path / "tasks.json"
    assert run(address, "--n", "4", "--out", str(out), "--format", "label-studio") == 0
    tasks = json.loads(out.read_text())
    for task in tasks[:3]:
        task["annotations"] = [{"result": [{"type": "choices", "value": {"choices": ["blue"]}}]}]
    out.write_text(json.dumps(tasks))
    assert queue.take(out, "ann") == (3, 0, 1)
    assert {each.key for each in feedback.read(feedback.folder()).said} == {"ann"}


def test_pages_of_kept_questions(asked: tuple[str, list[str]]) -> None:
    address, ids = asked
    seen: list[str] = []
    cursor = ""
    while True:
        page = httpx.get(f"{address}/admin/questions", params={"limit": 10, "before": cursor}).json()
        seen += [row["answer"] for row in page["data"]]
        cursor = page["next"]
        if not cursor:
            break
    assert seen == sorted(ids, reverse=True)
    assert httpx.get(f"{address}/admin/questions?limit=0").status_code == 422


def test_mistakes_are_told(asked: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address, _ = asked
    file = tmp_path / "labels.jsonl"
    cases = {
        '{"answer": "ans_unknown", "label": "red"}': "is of no queue that was made here",
        '{"label": "red"}': "row 1 has no answer id",
        "{not json": "line 1: not JSON",
    }
    for text, words in cases.items():
        file.write_text(text + "\n")
        assert run(address, "--labels", str(file)) == 2
        assert words in capsys.readouterr().err
    assert run(address) == 2
    assert "--out FILE is wanted" in capsys.readouterr().err
    assert select.main(["--out", str(file)]) == 2
    assert "no service follows the channel 'production'" in capsys.readouterr().err
