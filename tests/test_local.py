"""`cluster/local.sh` on this machine: a Ray that is started once, told about, and ended; and what is in its way."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from jobs import cluster, local
from jobs.cluster import Cluster

CHECKOUT = Path(__file__).parents[1]
SCRIPT = CHECKOUT / "cluster" / "local.sh"


def called(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    environment["MMAGENT_STORAGE"] = str(storage)
    return subprocess.run(
        [str(SCRIPT), *arguments], cwd="/", env=environment, check=False, capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])


def test_a_port_that_was_asked_for_and_is_taken(storage: Path, taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["up", "--port", str(taken)]) == 2
    said = capsys.readouterr().err
    assert f"--port {taken} is taken by" in said
    assert f"(process {os.getpid()})" in said
    assert not cluster.record().exists()


def test_a_port_that_is_usual_and_taken_is_told(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "DASHBOARD_PORT", taken)
    args = local._parser().parse_args(["up"])
    lines = list(local._in_the_way(args))
    assert any(line.startswith(f"port {taken} is taken by") and "the dashboard gets another" in line for line in lines)


def test_a_ray_of_another_version(
    ray_cluster: Cluster, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    replace(ray_cluster, ray="2.9.3").save(cluster.record())
    assert local.main(["up"]) == 2
    said = capsys.readouterr().err
    assert "2.9.3" in said
    assert ray.__version__ in said
    assert "cluster/local.sh down" in said


def test_one_that_runs_is_found_again(
    ray_cluster: Cluster, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    ray_cluster.save(cluster.record())
    assert local.main(["up"]) == 0
    said = capsys.readouterr().out
    assert f"runs already: {ray_cluster.address}" in said
    assert "ray job submit" in said
    assert "prometheus --config.file=" in said
    assert local.main(["status"]) == 0
    said = capsys.readouterr().out
    assert "CPU" in said
    assert " of 4 in use" in said
    assert local.main(["up", "--dashboard-port", "1"]) == 2
    assert "a Ray runs already" in capsys.readouterr().err


def test_none_and_a_dead_one(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["status"]) == 1
    assert "no Ray was started from here: cluster/local.sh up" in capsys.readouterr().out
    assert local.main(["down"]) == 0


def test_memory_for_objects_fits_the_machine() -> None:
    args = local._parser().parse_args(["up"])
    assert local._LEAST_STORE <= local._store_bytes(args) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert local._store_bytes(local._parser().parse_args(["up", "--object-store-gb", "0.5"])) == 1 << 29


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_starts_tells_and_ends(storage: Path) -> None:
    up = called(storage, "up", "--cpus", "3")
    assert up.returncode == 0, up.stderr
    assert "started" in up.stdout
    found = Cluster.load(storage / "cluster.json")
    assert found is not None
    try:
        again = called(storage, "up")
        assert f"runs already: {found.address}" in again.stdout
        told = called(storage, "status")
        assert told.returncode == 0, told.stderr
        assert "of 3 in use" in told.stdout
        for line in up.stdout.splitlines():  # what is hinted at is there
            if line.startswith("Prometheus"):
                assert Path(line.partition("=")[2]).is_file()
    finally:
        down = called(storage, "down")
    assert down.returncode == 0
    assert not cluster.marked(found.id)
    assert called(storage, "status").returncode == 1
    assert "nothing to stop" in called(storage, "down").stdout
