"""The commands with object storage as the root: a Ray of this test's own, which has the credentials, and a real S3
server. Each command has a mirror of its own, as on machines that share nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster
from mmagent.objects import Objects
from tests import s3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def machine(object_storage: str, s3_server: str) -> Iterator[dict[str, str]]:
    """The environment of a command that reaches a Ray with the credentials."""
    head = cluster.start(
        num_cpus=4, object_store_bytes=200_000_000, env={**s3.CREDENTIALS, "AWS_ENDPOINT_URL": s3_server}
    )
    try:
        yield {**os.environ, **head.environment, "PYTHONPATH": str(CHECKOUT)}
    finally:
        cluster.stop(head)


def command(environment: Mapping[str, str], mirror: Path, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", *arguments], env={**environment, "MMAGENT_MIRROR": str(mirror)}, text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_from_rows_to_predictions(
    machine: dict[str, str], object_storage: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    words = {"red": "the warm colour of fire", "blue": "the cold colour of the sea"}
    rows = [{"text": f"{words[label]}, number {n}", "label": label} for n in range(60) for label in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "data": {"name": "colours", "max_text_tokens": 32},
        "model": {"backbone": tiny_recipe["model"]["backbone"], "width": 32, "layers": 1, "heads": 2},
        "train": {
            "micro_batch": 4, "epochs": 200, "max_steps": 400, "eval_every_steps": 40, "checkpoint_every_steps": 20,
            "trace": True,
        },
        "cluster": {"workers": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    command(machine, first, "jobs.prepare", "--source", f"jsonl:{tmp_path / 'rows.jsonl'}", "--name", "colours")
    train = ("jobs.train", "--config", str(tmp_path / "recipe.yaml"), "--name", "colours")

    # Killed on one machine, it goes on on another, which has nothing but the storage.
    with open(tmp_path / "said", "w") as said:
        killed = subprocess.Popen(
            [sys.executable, "-m", *train], env={**machine, "MMAGENT_MIRROR": str(second)}, stdout=said,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 400
        while not any(each.key.endswith("marker.json") for each in Objects(object_storage).list("runs/colours")):
            assert time.monotonic() < end, (tmp_path / "said").read_text()
            assert killed.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.2)
        os.killpg(killed.pid, signal.SIGKILL)
    told = command(machine, third, *train)
    assert (found := re.search(r"goes on at step (\d+)", told)), told
    assert int(found[1]) >= 20
    keys = {each.key for each in Objects(object_storage).list("")}
    assert {"runs/colours/bundle/manifest.json", "runs/colours/report.html", "data/colours/dataset.json"} <= keys
    assert not any(part.startswith(".draft") for key in keys for part in key.split("/"))

    fourth = tmp_path / "fourth"
    command(machine, fourth, "jobs.evaluate", "--bundle", "colours", "--data", "colours", "--out", "eval/colours")
    result = json.loads(Objects(object_storage).read("eval/colours/evaluation.json"))
    assert result["metrics"]["accuracy"]["value"] > 0.9
    command(machine, fourth, "jobs.predict", "--bundle", "colours", "--data", "colours", "--name", "colours")
    assert json.loads(Objects(object_storage).read("predictions/colours/predictions.json"))["answered"] == len(rows)
    assert not list(fourth.glob("data/**/*.parquet"))  # read where they lie
    status = command(machine, tmp_path / "fifth", "jobs.status")
    assert "colours" in status
    assert object_storage in status
