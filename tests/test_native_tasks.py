"""Every task with a native multimodal model, on words, pictures and sounds: it learns, keeps still what is frozen, and
says the same from its bundle, alone and among others, and over HTTP."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from mmagent.record import Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service
from tests import multimodal
from tests.multimodal import Made, configured

LABELS = ("blue", "red")
INFOS = {
    "classify": TaskInfo("classify", LABELS),
    "multilabel": TaskInfo("multilabel", LABELS),
    "regress": TaskInfo("regress", mean=0.0, deviation=1.0),
    "tag": TaskInfo("tag", LABELS),
    "relate": TaskInfo("relate", LABELS),
    "extract": TaskInfo("extract"),
    "match": TaskInfo("match"),
    "match:dual": TaskInfo("match:dual", dual=True),
    "generate": TaskInfo("generate"),
}
FAMILY = {"text": "llava", "image": "llava", "audio": "qwen2_audio"}
SAID = {"classify": "label", "multilabel": "labels", "regress": "value", "tag": "spans", "relate": "label",
        "extract": "text", "match": "label", "match:dual": "label", "generate": "text"}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: multimodal.write(family, root / family) for family in ("llava", "qwen2_audio")}


def body(task: str, modality: str, index: int, make_png: Any, make_wav: Any) -> dict[str, Any]:
    """A question whose answer the modality alone tells."""
    given: dict[str, Any] = {
        "text": {"text": f"{('the sea', 'a fire')[index]} so?"},
        "image": {"text": "so so?", "image": make_png(LABELS[index])},
        "audio": {"text": "so so?", "audio": make_wav((220.0, 880.0)[index])},
    }[modality]
    if task == "relate":
        given["spans"] = [{"start": 0, "end": 2, "label": "head"}, {"start": 3, "end": 5, "label": "tail"}]
    if task == "extract":
        given["context"] = "red or blue"
    if task.startswith("match"):
        given["candidates"] = ["it is blue", "it is red"]
    return {"task": task, **given}


def answered(task: str, index: int) -> dict[str, Any]:
    label = LABELS[index]
    return {
        "multilabel": {"labels": [label]},
        "regress": {"value": 2.0 * index - 1},
        "tag": {"spans": [{"start": 0, "end": 2, "label": label}]},
        "extract": {"answers": [label]},
        "generate": {"answer": label},
    }.get(task.partition(":")[0], {"label": f"it is {label}" if task.startswith("match") else label})


def rows(task: str, modality: str, make_png: Any, make_wav: Any) -> list[Record]:
    out = []
    for index in range(2):
        row = body(task, modality, index, make_png, make_wav)
        more = answered(task, index)
        if task == "relate":
            row |= {"label": more["label"]}
            more = {}
        out.append(parse({"id": str(index), **row, **more}))
    return out


def told(answer: Any) -> dict[str, Any]:
    return answer.to_dict(timings=False)


def same(a: dict[str, Any], b: dict[str, Any], task: str) -> None:
    said = SAID[task]
    if said == "spans":
        places = [[(span["start"], span["end"], span["label"]) for span in each.get(said, ())] for each in (a, b)]
        assert places[0] == places[1]
    else:
        assert a[said] == (pytest.approx(b[said], abs=1e-4) if said == "value" else b[said])
    assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-3)


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
@pytest.mark.parametrize("task", INFOS)
def test_a_task_is_learnt_kept_and_served(
    folders: dict[str, Path], make_png: Any, make_wav: Any, tmp_path: Path, task: str, modality: str
) -> None:
    made = Made(configured(folders[FAMILY[modality]]), {task: INFOS[task]})
    records = rows(task, modality, make_png, make_wav)
    losses = made.fit(records)
    assert min(losses) < losses[0] / 2
    for name, parameter in made.encoder.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, made.before[name]), name
    predictor = made.predictor()
    together = [told(answer) for answer in predictor.predict(records)]
    alone = [told(predictor.predict([record])[0]) for record in records]
    again = [told(answer) for answer in made.bundled(tmp_path / "b").predict(records)]
    for a, b, c in zip(together, alone, again, strict=True):
        same(a, b, task)
        same(a, c, task)
    with TestClient(build(Service(predictor, ServeConfig()))) as client:
        for index, answer in enumerate(together):
            asked = body(task, modality, index, make_png, make_wav)
            for kind in ("image", "audio"):
                if kind in asked:
                    asked[kind] = base64.b64encode(asked[kind]).decode()
            reply = client.post("/v1/predict", json=asked)
            assert reply.status_code == 200, reply.text
            found = reply.json()["mmagent"]
            ahead = len(records[index].messages[-1].content) - len(asked["text"])  # the client wrote no placeholder
            if task == "tag":
                found["spans"] = [{**s, "start": s["start"] + ahead, "end": s["end"] + ahead} for s in found["spans"]]
            same(found, answer, task)
