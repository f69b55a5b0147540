"""The model in a deployment of its own: what it answers, what it does when it dies, and how bundles change."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from jobs import cluster, promote
from mmagent import Predictor, bundle
from mmagent.bundle import BundleError
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from serve.apart import Far, Place, deployment
from serve.config import ServeConfig
from serve.loaded import seal_of
from serve.switches import free_ports
from tests.conftest import COLOURS
from tests.test_generate import configured, trained
from tests.test_serve_launch import point
from tests.test_serve_start import start

QUESTION = "what color is the shape?"


def place_of(folder: Path) -> Place:
    return Place(str(folder), seal_of(folder))


@pytest.fixture
def handle(tiny_bundle: Path, storage: Path) -> Any:
    """Of a model in this process, as Ray Serve runs one where there is no Ray."""
    from ray import serve

    config = ServeConfig(apart=True)
    return serve.run(deployment(str(tiny_bundle), None, config, {}), _local_testing_mode=True)


def asked(handle: Any, folder: Path, work: Callable[[Far], Any]) -> Any:
    async def run() -> Any:
        far = Far(handle, place_of(folder), batch_size=4, on_batch=lambda _: None)
        await far.warm_up()
        try:
            return await work(far)
        finally:
            await far.close()

    return asyncio.run(run())


def test_many_are_asked_in_few_calls_and_a_bad_one_costs_only_itself(
    handle: Any, tiny_bundle: Path, make_png: Any
) -> None:
    predictor = Predictor.load(tiny_bundle)
    rows = [{"text": QUESTION, "image": make_png((20 * n, 0, 0))} for n in range(10)]
    samples = [predictor.prepare(predictor.parse(row, default_id=str(n))) for n, row in enumerate(rows)]
    nothing: Any = (None,)
    broken = dataclasses.replace(samples[0], images=nothing)
    calls: list[int] = []

    async def work(far: Far) -> Any:
        far._on_batch = calls.append
        return await asyncio.gather(*map(far.answer, [*samples, broken]), return_exceptions=True)

    *found, error = asked(handle, tiny_bundle, work)
    for (answer, waited_s), known in zip(found, predictor.answer(samples), strict=True):
        assert answer.label == known.label
        assert answer.probabilities == pytest.approx(known.probabilities, abs=1e-4)
        assert waited_s >= 0
    assert isinstance(error, Exception)
    assert sum(calls) == 11
    assert len(calls) < 11


def test_another_bundle_in_the_same_place_is_refused(handle: Any, tiny_bundle: Path) -> None:
    async def run() -> None:
        far = Far(handle, Place(str(tiny_bundle), "0" * 16), batch_size=4, on_batch=lambda _: None)
        await far.warm_up()

    with pytest.raises(BundleError, match="is another one"):
        asyncio.run(run())


def test_a_text_is_told_while_it_is_written(
    handle: Any, writers: dict[str, Path], tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    row: dict[str, Any] = {"task": "generate", "text": "a picture of", "target": {"text": "the red image is blue"}}
    config = configured(tiny_recipe, writers["decoder"])
    infos = {"generate": TaskInfo("generate", ())}
    _, known = trained(config, [parse(row, default_id="0")], infos, steps=60)
    folder = tmp_path / "writer"
    bundle.save(
        folder, name="writer", config=config, tasks=infos, task="generate", calibration=known.calibration,
        state={key: value for key, value in known.model.state_dict().items() if not key.startswith("backbone.")},
        backbone=known.model.backbone, tokenizer=known.inputs.tokenizer, origin={},
    )  # fmt: skip
    predictor = Predictor.load(folder)
    heard: list[str] = []
    sample = dataclasses.replace(predictor.prepare(predictor.parse(row, default_id="0")), hear=heard.append)
    answer, _ = asked(handle, folder, lambda far: far.answer(sample))
    assert answer.text == predictor.answer([dataclasses.replace(sample, hear=None)])[0].text
    assert len(heard) > 1
    assert "".join(heard) == answer.text


@pytest.mark.long
def test_the_service_answers_explains_follows_its_channel_and_outlives_its_model(
    ray_cluster: cluster.Cluster, tiny_bundle: Path, make_bundle: Callable[..., Path], storage: Path, make_png: Any
) -> None:
    other = make_bundle(storage / "other", {"classify": TaskInfo("classify", COLOURS)}, "classify")
    point("apart", tiny_bundle)
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    done = start("--channel", "apart", "--port", str(port), "--apart", "--max-replicas", "1", "--name", "apart")
    assert done.returncode == 0, done.stderr
    try:
        rows = [{"text": QUESTION, "image": make_png((20 * n, 0, 0))} for n in range(12)]
        known = Predictor.load(tiny_bundle).predict(rows)

        def ask(n: int) -> Any:
            row = {**rows[n % 12], "image": base64.b64encode(rows[n % 12]["image"]).decode()}
            return post(f"{url}/v1/predict", row)["mmagent"]

        for n, said in enumerate(map(ask, range(12))):
            assert said["probabilities"] == pytest.approx(known[n].probabilities, abs=1e-4)
        explained = post(f"{url}/v1/predict", {"text": QUESTION, "explain": True})
        assert explained["mmagent"]["evidence"]["tokens"]
        vector = post(f"{url}/v1/embeddings", {"input": QUESTION})["data"][0]["embedding"]
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-4)
        models = [process for process in psutil.process_iter(["cmdline"]) if "Replica:apart:model" in name(process)]
        assert len(models) == 1
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(ask, n) for n in range(40)]
            models[0].kill()
            answers += [pool.submit(ask, n) for n in range(40)]
            assert {each.result()["bundle"] for each in answers} == {"tiny"}, "a question was lost with the model"
        assert promote.main(["--bundle", str(other), "--channel", "apart", "--url", url]) == 0
        assert ask(0)["bundle"] == "other"
    finally:
        assert start("--stop", "--name", "apart").returncode == 0


def name(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=100) as answer:
        return json.load(answer)
