"""A wanted accuracy on a served bundle: what is not sure enough abstains, and of the rest so many are right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from jobs.validation import Answered, calibrations
from mmagent import bundle
from mmagent.agent.policy import Policy
from mmagent.predictor import Predictor, modalities_of
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from serve import launch
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service
from tests.test_soft import Made, configured

COLOURS = ("red", "green", "blue")
TARGET = 0.9


def rows(count: int, seed: int) -> list[Record]:
    """Half of them say the answer; the others name two colours, and which is meant is a coin's affair (6 to 4)."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        one, other = rng.choice(COLOURS, 2, replace=False)
        clear = number % 2 == 0
        words = f"the shape is {one}" if clear else f"there is {one} not {other}"
        label = one if clear or rng.random() < 0.6 else other
        out.append(parse({"id": str(number), "task": "classify", "text": words, "label": str(label)}))
    return out


@pytest.fixture(scope="module")
def served(tiny_backbone: Path, tiny_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was trained on some of them and calibrated on others, as training does it."""
    recipe = {**tiny_recipe, "model": {**tiny_recipe["model"], "image": None, "audio": None}}
    infos = {"classify": TaskInfo("classify", COLOURS)}
    made = Made(configured(recipe, tiny_backbone, **{"freeze.strategy": "all"}), infos)
    made.fit(rows(64, seed=0), steps=60)
    predictor = made.predictor()
    known = rows(600, seed=1)
    samples = [predictor.prepare(record) for record in known]
    raws = [raw for at in range(0, len(samples), 100) for raw in predictor.raws(samples[at : at + 100])]
    answered = [
        Answered("classify", raw, record, modalities_of(sample))
        for raw, record, sample in zip(raws, known, samples, strict=True)
    ]
    state = {key: value for key, value in made.module.state_dict().items() if not key.startswith("backbone.")}
    folder = tmp_path_factory.mktemp("target") / "doubtful"
    bundle.save(
        folder, name="doubtful", config=made.config, tasks=infos, task="classify", state=state,
        backbone=made.module.backbone, tokenizer=made.tokenizer, calibration=calibrations(made.tasks, answered),
        origin={},
    )  # fmt: skip
    return folder


@contextmanager
def client_of(folder: Path, policy: Policy | None = None, **config: Any) -> Iterator[TestClient]:
    service = Service(Predictor.load(folder), ServeConfig(**config), policy=policy)
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def told(client: TestClient, records: list[Record]) -> list[tuple[dict[str, Any], bool]]:
    """What is answered, and whether it is right."""
    inputs = [{"text": record.messages[0].content} for record in records]
    found = []
    for at in range(0, len(inputs), 100):
        data = client.post("/v1/predict", json={"inputs": inputs[at : at + 100]}).json()["data"]
        found += [each["mmagent"] for each in data]
    return [(one, one["label"] == record.target.label) for one, record in zip(found, records, strict=True)]


def test_those_that_are_sure_reach_it_on_other_rows(served: Path, storage: Path) -> None:
    fresh = rows(400, seed=2)
    with client_of(served, target_accuracy=TARGET) as client:
        found = told(client, fresh)
        sure = [right for one, right in found if not one["abstained"]]
        assert np.mean([right for _, right in found]) < TARGET - 0.05  # all together do not
        assert np.mean(sure) >= TARGET
        assert 0.3 < len(sure) / len(found) < 0.9  # it is not had by saying nothing
        text = client.get("/metrics").text
        assert f'mmagent_abstained_total{{bundle="doubtful",task="classify"}} {len(found) - len(sure)}.0' in text
        one, _ = found[1]  # of a doubtful one
        assert one["abstained"]
        trace = client.get(
            f"/v1/answers/{client.post('/v1/predict', json={'text': 'there is red not blue'}).json()['id']}"
        )
        assert trace.json()["understood"]["threshold"] > one["confidence"]


def test_the_agent_asks_back_where_it_is_not_sure_enough(served: Path, storage: Path) -> None:
    with client_of(served, Policy(unsure=("ask",)), target_accuracy=TARGET) as client:
        for words, outcome in (("the shape is red", "answer"), ("there is red not blue", "ask")):
            body = {"messages": [{"role": "user", "content": words}]}
            assert client.post("/v1/chat/completions", json=body).json()["mmagent"]["outcome"] == outcome


def test_what_validation_never_reached_is_never_sure(
    served: Path, tiny_bundle: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ServeConfig(target_accuracy=0.99)
    service = Service(Predictor.load(tiny_bundle), config)  # it was never validated
    [answer] = service.predictor.predict([{"text": "what color is the shape?"}])
    assert service.threshold(answer, "classify") == math.nextafter(1, 2)
    launch.check_target(config, tiny_bundle)
    assert "the task classify has no accuracy by confidence, and --target-accuracy is 0.99" in capsys.readouterr().err
    launch.check_target(ServeConfig(target_accuracy=TARGET), served)
    assert capsys.readouterr().err == ""
    with client_of(tiny_bundle, target_accuracy=0.99) as client:
        assert client.post("/v1/predict", json={"text": "x"}).json()["mmagent"]["abstained"]
