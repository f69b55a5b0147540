"""The Ray that a command starts for itself: its record, how it is found again, and that nothing else is ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from jobs import cluster, local, token
from jobs.cluster import Cluster, ClusterError
from jobs.processes import Process

CHECKOUT = Path(__file__).parents[1]
# A child of its own that ignores being asked to end, or not; prints a line when it is ready.
SLEEPER = "import signal, sys, time; {}; print('ready', flush=True); time.sleep(600)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
PARENT = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print('ready', flush=True); time.sleep(600)"
)

Spawn = Callable[..., psutil.Process]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    children: list[subprocess.Popen[str]] = []

    def start(code: str, **env: str) -> psutil.Process:
        child = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
        )
        children.append(child)
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        # Reaped as soon as it ends: Ray's daemons are children of init, not of the demo.
        threading.Thread(target=child.wait, daemon=True).start()
        return psutil.Process(child.pid)

    yield start
    for child in children:
        child.kill()
        child.wait()
        assert child.stdout
        child.stdout.close()


def recorded(*processes: psutil.Process, id: str = "test-none", temp_dir: str = "/nowhere") -> Cluster:
    found = tuple(Process.of(process) for process in processes)
    return Cluster(id, "127.0.0.1:1", "http://127.0.0.1:1", 1, temp_dir, ray.__version__, 0, found)


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# ---- what was started, and stopping it


def test_a_record_comes_back_as_it_was_written(storage: Path, spawn: Spawn) -> None:
    written = recorded(spawn(SLEEPER.format("pass")))
    written.save(cluster.record())
    assert cluster.record() == storage / "cluster.json"
    assert Cluster.load(cluster.record()) == written


def test_no_record_and_a_broken_one_are_told_apart(storage: Path) -> None:
    assert Cluster.load(cluster.record()) is None
    for content in ("{", "[]", '{"id": "x"}'):
        cluster.record().write_text(content)
        with pytest.raises(ClusterError, match=r"cluster\.json is no record"):
            Cluster.load(cluster.record())


def test_stop_ends_what_is_recorded_with_its_children_and_nothing_else(storage: Path, spawn: Spawn) -> None:
    parent, deaf, stranger = spawn(PARENT), spawn(SLEEPER.format(DEAF)), spawn(SLEEPER.format("pass"))
    grandchild = parent.children()[0]
    recorded(parent, deaf).save(cluster.record())
    assert local.main(["down"]) == 0
    assert not runs(parent)
    assert not runs(grandchild)
    assert not runs(deaf)  # asked in vain, then killed
    assert runs(stranger)
    assert not cluster.record().exists()


def test_stop_ends_what_carries_the_mark_though_it_was_started_later(spawn: Spawn) -> None:
    later = spawn(SLEEPER.format("pass"), **{cluster.MARK: "test-marked"})
    other = spawn(SLEEPER.format("pass"), **{cluster.MARK: "test-other"})
    assert cluster.stop(recorded(id="test-marked")) == 1
    assert not runs(later)
    assert runs(other)


def test_a_pid_that_was_used_again_is_left_alone(spawn: Spawn) -> None:
    stranger = spawn(SLEEPER.format("pass"))
    stale = Cluster(
        "test-stale", "127.0.0.1:1", "http://127.0.0.1:1", 1, "/nowhere", "2.60.0", 0,
        (Process(stranger.pid, stranger.create_time() - 3600, "raylet"),),
    )  # fmt: skip
    assert not stale.alive
    assert cluster.stop(stale) == 0
    assert runs(stranger)


def test_stop_removes_its_temporary_folder_only_where_the_name_is_ours(tmp_path: Path) -> None:
    ours, other = tmp_path / f"{cluster.TEMP_PREFIX}x", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir()
        cluster.stop(recorded(temp_dir=str(folder)))
    assert (ours.exists(), other.exists()) == (False, True)


def test_stop_twice_is_no_error(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["down"]) == 0
    assert "nothing to stop" in capsys.readouterr().out


def test_a_token_is_made_once_and_for_this_user_only(tmp_path: Path) -> None:
    env = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "deep" / "token")}
    assert token.read(env) is None
    token.ensure(env)
    first = token.read(env)
    token.ensure(env)
    assert first
    assert token.read(env) == first
    assert Path(env["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["token"]
    assert token.read({"RAY_AUTH_TOKEN": "given"}) == "given"


def test_connect_says_what_starts_a_ray(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"cluster/local\.sh up.*RAY_ADDRESS"):
        cluster.connect()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(storage / "token"))
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH"):
        cluster.connect()
    token.ensure(os.environ)
    with pytest.raises(ClusterError, match=r"cannot connect to Ray at 127\.0\.0\.1:1"):
        cluster.connect()


@pytest.mark.slow
def test_a_driver_that_stops_its_ray_lives_on(storage: Path) -> None:
    program = (
        "from jobs import cluster; import os, ray; found = cluster.start(num_cpus=1, object_store_bytes=100_000_000); "
        "os.environ |= found.environment; ray.init(log_to_driver=False); assert cluster.stop(found) > 2; "
        "print(cluster.marked(found.id), ray.is_initialized())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[] False"


@pytest.mark.slow
def test_a_port_that_was_taken_meanwhile_is_left_to_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cluster._free_ports
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        tries: list[int] = []

        def late(*wanted: int) -> list[int]:
            tries.append(1)
            ports = list(found(*wanted))
            return [taken, *ports[1:]] if len(tries) == 1 else ports

        monkeypatch.setattr(cluster, "_free_ports", late)
        started = cluster.start(num_cpus=1, object_store_bytes=100_000_000)
        try:
            assert started.alive
            assert not started.address.endswith(f":{taken}")
            assert len(tries) == 2
        finally:
            cluster.stop(started)
