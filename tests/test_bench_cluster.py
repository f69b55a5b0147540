"""Machines on a network of their own, bad weather between them, and one cheap fault of the bench."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import network
from tests.bench import weather, works
from tests.bench.weather import Weather


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that says everything back."""

    def answer(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(4096):
                connection.sendall(data)

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)


def _said(port: int, words: bytes, times: int) -> bytes:
    """What comes back of so many words; less where the connection breaks."""
    out = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            for _ in range(times):
                connection.sendall(words)
                out += connection.recv(4096)
    except OSError:
        pass
    return out


def test_fair_weather_changes_nothing_and_takes_its_time(echo: tuple[str, int]) -> None:
    fair = Weather(delay_s=(0.02, 0.02), stall=0.0, broken=0.0)
    with weather.between("127.0.0.1", echo, fair) as seen:
        began = time.monotonic()
        assert _said(seen.port, b"hello", 3) == b"hello" * 3
        assert time.monotonic() - began > 6 * 0.02 * 0.9
        assert (seen.connections, seen.broken) == (1, 0)


def test_connections_break_as_the_seed_says(echo: tuple[str, int]) -> None:
    bad = Weather(seed=3, delay_s=(0.0, 0.0), stall=0.0, broken=0.5, broken_after=(1, 6))
    found = []
    for _ in range(2):
        with weather.between("127.0.0.1", echo, bad) as seen:
            found.append([len(_said(seen.port, b"hello", 4)) for _ in range(8)])
            assert seen.connections == 8
    assert found[0] == found[1]
    assert {20} < set(found[0])  # some came through, some broke


def test_progress_tells_its_longest_pause() -> None:
    progress = object.__new__(works._Progress)
    progress.at = [(0.0, 1), (1.0, 2), (9.0, 3), (10.0, 4)]
    assert progress.pause_s(0.5) == 8.0
    assert progress.pause_s(4.0) == 5.0
    assert progress.pause_s(10.0) == 0.0


@pytest.mark.skipif(bool(network._why_together()), reason=network._why_together() or "machines are apart")
def test_machines_reach_each_other_until_a_link_is_down() -> None:
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=0.5).close()"
    with network.built(2) as machines:
        if not machines.apart:
            pytest.skip(machines.why)
        with socket.create_server((machines.outside, 0)) as server:
            command = [sys.executable, "-c", reach, machines.outside, str(server.getsockname()[1])]
            other = machines.others[0]
            assert subprocess.run(other.within(command), capture_output=True, check=False).returncode == 0
            other.link("down")
            assert subprocess.run(other.within(command), capture_output=True, check=False).returncode
            other.link("up")
            assert subprocess.run(other.within(command), capture_output=True, check=False).returncode == 0
        names = [each.name for each in machines.all]
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not [name for name in names if name in left]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_training_goes_on_when_a_machine_dies(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"MMAGENT_STORAGE": str(tmp_path / "storage"), "SCALE": "small"}
    measure = f"cluster.main(['--only', 'node_dies', '--works', 'train'], pathlib.Path({str(tmp_path)!r}))"
    code = f"import pathlib, sys; from tests.bench import cluster; sys.exit({measure})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["id"]: row for row in json.loads((tmp_path / "runs/bench/cluster.json").read_text())["rows"]}
    assert rows["cluster.node_dies.lost"]["value"] == 0
    assert rows["cluster.node_dies.recover_s"]["value"] > 0
