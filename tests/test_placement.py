"""Where work runs by the labels of machines, and a storage root that not all of them see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster, placement
from mmagent import roles
from mmagent.config import resolve
from mmagent.record import Record
from mmagent.shards import Dataset
from tests.machines import join

CHECKOUT = Path(__file__).parents[1]
# Trains a tiny run and prints, of its workers and of the tasks that read its data, which machines they ran on.
WHERE = """
import sys, yaml
from pathlib import Path
from jobs import cluster
cluster.connect()
import ray
from ray.util.state import list_actors, list_tasks
from jobs import run, watch
from mmagent import storage
from mmagent.config import resolve
config = resolve(yaml.safe_load(Path(sys.argv[1]).read_text()), {})
work = run.prepare(config, storage.folder("runs", "placed"), export=False)
watch.fit(work.fit, work.stop, work.folder)
address = ray.get_runtime_context().gcs_address
labels = {node["NodeID"]: node["Labels"].get("mmagent.io/role", "none") for node in ray.nodes()}
for actor in list_actors(address, detail=True, limit=1000):
    if actor.class_name == "RayTrainWorker":
        print("worker", labels[actor.node_id])
for task in list_tasks(address, detail=True, limit=10000):
    if "read_blocks" in (task.name or ""):
        print("read", labels[task.node_id])
"""


def node(role: str = "", *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Labels": {roles.LABEL: role} if role else {}}


def test_roles_are_those_of_machines_that_live() -> None:
    nodes = [node(), node("data"), node("serve", alive=False), node("train")]
    assert roles.living(nodes) == {"data", "train"}
    assert roles.living([node()]) == set()


def test_one_machine_without_labels_is_for_everything(
    ray_cluster: cluster.Cluster, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert placement.selector("train") == placement.selector("data") == {}
    recipe = {"data": {"name": "x"}, "model": {"backbone": "x"}}
    assert placement.workers(resolve(recipe, {})) == {}
    monkeypatch.setenv(roles.VARIABLE, "data, train")
    assert placement.selector("train") == {roles.LABEL: "train"}
    assert placement.selector("serve") == {}
    monkeypatch.delenv(roles.VARIABLE)
    with pytest.raises(placement.PlacementError, match=r"cluster\.accelerator=H100: no machine of the cluster has it"):
        placement.workers(resolve(recipe, {"cluster.accelerator": "H100"}))
    placement.check_storage()  # of one machine there is nothing to ask


@pytest.fixture
def machines() -> Iterator[cluster.Cluster]:
    """A head, and one machine for reading and two for training."""
    head = cluster.start(num_cpus=1, object_store_bytes=200_000_000)
    try:
        for role in ("data", "train", "train"):
            join(head, labels={roles.LABEL: role})
        yield head
    finally:
        cluster.stop(head)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_work_runs_where_machines_are_set_aside_for_it(
    machines: cluster.Cluster, storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
) -> None:  # fmt: skip
    make_dataset(storage / "data" / "tiny", {"train": make_records(48), "validation": make_records(8, "validation")})
    recipe = {
        **tiny_recipe,
        "train": {"micro_batch": 4, "epochs": 20, "max_steps": 40, "eval_every_steps": 20, "eval_rows": 8},
        "cluster": {"workers": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {
        **os.environ, **machines.environment, "MMAGENT_STORAGE": str(storage), "PYTHONPATH": str(CHECKOUT)
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", WHERE, str(tmp_path / "recipe.yaml")], env=environment, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    lines = run.stdout.splitlines()
    assert {line for line in lines if line.startswith("worker ")} == {"worker train"}
    assert {line for line in lines if line.startswith("read ")} == {"read data"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="hiding a folder needs root and unshare")
def test_a_storage_root_that_a_machine_does_not_see_is_refused(storage: Path) -> None:
    head = cluster.start(num_cpus=1, object_store_bytes=200_000_000)
    try:
        join(head)
        program = "from jobs import cluster, placement; cluster.connect(); placement.check_storage(); print('seen')"
        environment = {
            **os.environ, **head.environment, "MMAGENT_STORAGE": str(storage), "PYTHONPATH": str(CHECKOUT)
        }  # fmt: skip
        asked = [sys.executable, "-c", program]
        run = subprocess.run(asked, env=environment, check=False, text=True, capture_output=True, timeout=200)
        assert run.stdout == "seen\n", run.stderr
        join(head, hides=storage)
        run = subprocess.run(asked, env=environment, check=False, text=True, capture_output=True, timeout=200)
        assert run.returncode == 1
        assert f"the storage root {storage} is a folder that 127.0.0.1 does not see" in run.stderr
        assert "s3://BUCKET/PREFIX" in run.stderr
        assert not list(storage.glob(".seen-*"))
    finally:
        cluster.stop(head)
