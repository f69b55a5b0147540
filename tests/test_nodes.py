"""Machines that go away under a run: drained with notice, or dead at once. Two machines more, all on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs import cluster
from mmagent.record import Record
from mmagent.shards import Dataset
from tests.machines import join, machine_of, workers_of

CHECKOUT = Path(__file__).parents[1]
FIT = """
import sys, yaml
from pathlib import Path
from jobs import cluster
cluster.connect()
from jobs import run, watch
from mmagent import storage
from mmagent.config import resolve
config = resolve(yaml.safe_load(Path(sys.argv[1]).read_text()), {})
work = run.prepare(config, storage.folder("runs", "moved"), export=False)
watch.fit(work.fit, work.stop, work.folder)
"""


@pytest.fixture
def machines() -> Iterator[cluster.Cluster]:
    """A head with no room for two workers, and two machines of four CPUs each."""
    head = cluster.start(num_cpus=1, object_store_bytes=200_000_000)
    try:
        for _ in range(2):
            join(head)
        yield head
    finally:
        cluster.stop(head)


def kill(raylet: psutil.Process, address: str, environment: dict[str, str]) -> None:
    raylet.kill()


def drain(raylet: psutil.Process, address: str, environment: dict[str, str]) -> None:
    """With a notice of 20 s."""
    node = next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id="))
    command = [str(cluster.ray_command()), "drain-node", f"--address={address}", f"--node-id={node}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=20"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("hurt", [kill, drain])
def test_a_run_moves_from_machines_that_go_away(
    machines: cluster.Cluster, storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
    hurt: Callable[[psutil.Process, str, dict[str, str]], None],
) -> None:  # fmt: skip
    make_dataset(storage / "data" / "tiny", {"train": make_records(48), "validation": make_records(8, "validation")})
    recipe = {
        **tiny_recipe,
        "train": {
            "micro_batch": 4, "epochs": 1000, "max_steps": 3000, "eval_every_steps": 1500, "eval_rows": 8,
            "checkpoint_every_steps": 50, "trace": True,
        },
        "cluster": {"workers": 2, "max_failures": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = storage / "runs" / "moved"
    environment = {
        **os.environ, **machines.environment, "MMAGENT_STORAGE": str(storage), "PYTHONPATH": str(CHECKOUT),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    }  # fmt: skip
    with open(tmp_path / "said", "w") as said:
        driver = subprocess.Popen(
            [sys.executable, "-c", FIT, str(tmp_path / "recipe.yaml")], env=environment, stdout=said,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            found = workers_of(folder, 30)
            assert all(each.phase != "end" for each in found)
            hurt(machine_of(found[0]), machines.address, environment)
            assert driver.wait(400) == 0, (tmp_path / "said").read_text()[-3000:]
        finally:
            driver.kill()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kind = "restart" if hurt is kill else "drain"
    assert [row["kind"] for row in rows if row["kind"] not in ("train", "validation")] == [kind]
    for rank in range(2):
        lines = (folder / "trace" / f"rank_{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 3001))
