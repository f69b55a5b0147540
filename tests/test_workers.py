"""Groups of workers on a real Ray: as many as there is room for, and again after a failure."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data

from jobs import workers
from jobs.workers import Group, WorkersFailed
from mmagent import storage as storages
from mmagent.config import Config, resolve

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def config(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Config:
    """Three workers are wanted, one is enough; the cluster of the tests has 4 CPUs, of which readers need 1.6."""
    monkeypatch.setattr(workers, "_RELEASE_TIMEOUT_S", 2.0)
    return resolve(tiny_recipe, {"cluster.workers": 3, "cluster.min_workers": 1, "cluster.max_failures": 1})


def test_as_many_start_as_there_is_room_for(config: Config, tiny_recipe: dict[str, Any]) -> None:
    class Service:
        def ready(self) -> bool:
            return True

    assert workers._workers(config) == 2
    service: Any = ray.remote(num_cpus=1.0)(Service).remote()
    ray.get(service.ready.remote())
    assert workers._workers(config) == 1
    assert workers._workers(resolve(tiny_recipe, {"cluster.workers": 3})) == 3  # waits for all
    ray.kill(service)


def numbered(world: int) -> Any:
    """A stream of a block for each of so many workers."""
    tasks = ray.data.from_items([{"rank": rank} for rank in range(world)], override_num_blocks=world)
    return tasks.map_batches(
        lambda batch: pa.table({"rank": batch["rank"], "world": [world]}), batch_size=1, num_cpus=0.1
    )


def work(group: Group, folder: Path, failures: int) -> None:
    [table] = group.blocks("numbered")
    seen = {"rank": group.rank, "world": group.world, "stream": table["world"][0].as_py()}
    with open(folder / f"seen_{group.rank}.jsonl", "a") as file:
        file.write(json.dumps(seen) + "\n")
    if group.rank == 0 and len((folder / "seen_0.jsonl").read_text().splitlines()) <= failures:
        raise FloatingPointError("as if a node were lost")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("failures", [1, 2])
def test_a_group_that_failed_is_counted_and_starts_again(config: Config, tmp_path: Path, failures: int) -> None:
    """Its streams are made for the number that started."""
    run = functools.partial(
        workers.run, functools.partial(work, folder=tmp_path, failures=failures), config, tmp_path,
        {"numbered": numbered},
    )  # fmt: skip
    if failures > config.cluster.max_failures:
        with pytest.raises(WorkersFailed, match="as if a node were lost"):
            run()
    else:
        run()
    for rank in range(2):
        lines = (tmp_path / f"seen_{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"rank": rank, "world": 2, "stream": 2}] * 2


def test_workers_that_are_left_over_end_when_their_run_begins_anew(tmp_path: Path) -> None:
    sigterm = workers.Sigterm()
    try:
        assert workers._asked(sigterm, tmp_path, "one", 0) == ""  # a run of before there was such a file
        storages.publish(tmp_path / ".start", "one")
        assert workers._asked(sigterm, tmp_path, "one", 0) == ""
        storages.publish(tmp_path / ".start", "two")
        assert workers._asked(sigterm, tmp_path, "one", 1) == ""  # the first rank speaks for all
        with pytest.raises(workers.Superseded, match="two after one"):
            workers._asked(sigterm, tmp_path, "one", 0)
    finally:
        sigterm.close()
