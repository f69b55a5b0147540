"""Machines with addresses of their own on one machine: network namespaces, joined by veth pairs and a bridge.

    with network.built(5) as machines:
        machines.start()                      # a Redis, a head whose state lies in it, and four that join
        machines.run(machines.head, ["python", "-m", "jobs.train", ...])

That wants root, and `ip` of iproute2. Where one of them is missing all machines are raylets on the loopback, and
`Machines.apart` says why: then none has a link that could go down. A machine's processes carry its name in their
environment, so that all of them can be killed at once, as when its power fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from jobs import cluster, processes
from serve.switches import LOCAL_ONLY
from tests.machines import JOIN

PLACE = "MMAGENT_TEST_MACHINE"  # environment variable that a machine's processes carry, with its name
GCS_PORT, DASHBOARD_PORT, SERVE_PORT = 6379, 8265, 8000
_AGENTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
# A raylet (Ray 2.60) waits 15 s for its agents to write down their ports, and dies; on a busy machine they take longer.
# These ports are known before.
_START = (
    """
import inspect
from pathlib import Path
from ray._private import services

def start_raylet(*args, **options):
    given = inspect.signature(start).bind(*args, **options).arguments
    for name in ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"):
        (Path(given["session_dir"]) / f"{name}_{given['node_id']}").write_text(str(given[name]))
    return start(*args, **options)

start, services.start_raylet = services.start_raylet, start_raylet
"""
    + JOIN
)
_PORTS = (10001, 52365, 52366, 52367, 52368)  # of a machine of its own
_NET = "198.18.{}.{}"  # set aside for measuring networks: RFC 2544
_START_TIMEOUT_S = 180.0
_TRIES = 4  # of a start
_STORE_BYTES = 100_000_000  # of each machine's object store


@dataclass(frozen=True)
class Machine:
    name: str
    host: str
    apart: bool  # whether it is a network namespace
    ports: tuple[int, ...]  # of Ray's client and of its agents: machines on one loopback share the numbers
    folder: Path

    def within(self, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command] if self.apart else [*command]

    def link(self, state: str) -> None:
        """Takes the machine's interface ``down`` or ``up``."""
        assert self.apart, "a machine on the loopback has no link of its own"
        _ip("-n", self.name, "link", "set", "eth0", state)

    def narrow(self) -> None:
        """What it sends waits in a queue that is short: packets come late, and some of a burst not at all."""
        queue = ["tbf", "rate", "2mbit", "burst", "4kb", "latency", "20ms"]
        subprocess.run(["tc", "-n", self.name, "qdisc", "add", "dev", "eth0", "root", *queue], check=True, timeout=30)

    def widen(self) -> None:
        subprocess.run(["tc", "-n", self.name, "qdisc", "del", "dev", "eth0", "root"], check=True, timeout=30)


class Machines:
    """A Ray of several machines; the first one is its head."""

    def __init__(self, machines: Sequence[Machine], folder: Path, outside: str, why: str) -> None:
        self.all, self.head, self.others = tuple(machines), machines[0], tuple(machines[1:])
        self.apart = not why
        self.why = why  # machines are not apart
        self._folder, self._outside = folder, outside
        self.gcs, self.dashboard, self.redis = (
            (GCS_PORT, DASHBOARD_PORT, GCS_PORT) if self.apart else tuple(cluster._free_ports(0, 0, 0))
        )
        self.id, self._password = secrets.token_hex(8), secrets.token_hex(8)
        self._redis: subprocess.Popen[bytes] | None = None
        self._cpus: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"{self.head.host}:{self.gcs}"

    def store(self, port: int | None = None) -> str:
        """Of the service, in the Redis that Ray's head has too."""
        return f"redis://:{self._password}@{self._outside}:{port or self.redis}/1"

    @property
    def outside(self) -> str:
        """The address of what is no machine of the cluster: Redis, clients, a proxy."""
        return self._outside

    def environment(self, machine: Machine) -> dict[str, str]:
        """Of a process on a machine."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {
            cluster.MARK: self.id, PLACE: machine.name, "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._folder / "token"), "RAY_ADDRESS": self.address,
            LOCAL_ONLY: "1" if self.apart else "0", "PYTHONPATH": str(cluster.CHECKOUT), "OMP_NUM_THREADS": "1",
            "RAY_worker_maximum_startup_concurrency": "4", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",
        }  # fmt: skip
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
        return env

    def run(self, machine: Machine, command: Sequence[str], said: IO[Any], **more: str) -> subprocess.Popen[bytes]:
        """Starts a command on a machine."""
        return subprocess.Popen(
            machine.within(command), env={**self.environment(machine), **more}, cwd=cluster.CHECKOUT, stdout=said,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, cpus: int = 2) -> None:
        """Starts Redis, the head, which hands out no CPUs, and the other machines."""
        self._start_redis()
        self.begin(self.head, 0)
        for machine in self.others:
            self.begin(machine, cpus)
        self.wait(len(self.all))

    def begin(self, machine: Machine, cpus: int | None = None) -> None:
        """Starts a machine's Ray, also once more."""
        self._cpus[machine.name] = cpus = self._cpus[machine.name] if cpus is None else cpus
        head = machine is self.head
        if head:  # else a head that starts again takes raylets of other machines, which it sees, for its own
            (self._folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        command = [
            sys.executable, "-c", _START, "start", f"--node-ip-address={machine.host}", f"--num-cpus={cpus}",
            f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats",
            *(f"--{of}-port={port}" for of, port in zip(_AGENTS, machine.ports[1:], strict=True)),
        ]  # fmt: skip
        if head:
            command += [
                "--head", f"--port={self.gcs}", "--include-dashboard=true", f"--dashboard-host={machine.host}",
                f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={machine.ports[0]}",
                f"--temp-dir={self._folder}/ray", f"--redis-password={self._password}",
            ]  # fmt: skip
        else:
            command.append(f"--address={self.address}")
        env = self.environment(machine)
        del env["RAY_ADDRESS"]
        if head:
            env["RAY_REDIS_ADDRESS"] = f"{self._outside}:{self.redis}"
        env = {**_switches(machine.folder), **env}
        for _ in range(_TRIES):  # Ray (2.60) gives a node half a minute to start, which a busy machine may not
            done = subprocess.run(
                machine.within(command), env=env, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=_START_TIMEOUT_S, check=False,
            )  # fmt: skip
            if not done.returncode:
                return
            processes.end(self.processes(machine), grace_s=3.0)
        raise RuntimeError(f"Ray did not start on {machine.name}: {done.stdout[:4000]}")

    def kill(self, machine: Machine) -> None:
        """The machine is gone: its link goes silent, then its processes end, and nobody is told goodbye."""
        if machine.apart:
            machine.link("down")
        for process in self.processes(machine):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def mend(self, machine: Machine) -> None:
        """What is left of a machine's Ray ends, its link is up, and it starts again under its name."""
        processes.end(self.processes(machine), grace_s=3.0)
        if machine.apart:
            machine.link("up")
        self.begin(machine)

    def drain(self, machine: Machine, seconds: int) -> None:
        """Ray is told that the machine goes in so many seconds, as a cloud tells of a spot machine."""
        command = [str(cluster.ray_command()), "drain-node", f"--address={self.address}"]
        command += [f"--node-id={self.node_id(machine)}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message=spot", f"--deadline-remaining-seconds={seconds}"]
        subprocess.run(
            self.head.within(command), env=self.environment(self.head), check=True, capture_output=True, timeout=120
        )

    def node_id(self, machine: Machine) -> str:
        raylet = next(each for each in self.processes(machine) if each.is_running() and each.name() == "raylet")
        return next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id="))

    def processes(self, machine: Machine) -> list[psutil.Process]:
        return [each for each in processes.marked(PLACE, machine.name) if each.pid != os.getpid()]

    def of(self, pid: int) -> Machine:
        """The machine that a process is on."""
        name = psutil.Process(pid).environ()[PLACE]
        return next(each for each in self.all if each.name == name)

    def alive(self) -> int:
        """How many machines Ray's head takes for living; 0 where it does not say so."""
        code = (
            "import ray, logging; ray.init(log_to_driver=False, logging_level=logging.ERROR); "
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        found = subprocess.run(
            self.head.within([sys.executable, "-c", code]), env=self.environment(self.head), capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        words = found.stdout.split()
        return int(words[-1]) if words and words[-1].isdigit() else 0

    def wait(self, count: int, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while (found := self.alive()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{found} of {count} machines are there after {timeout_s:.0f} s")
            time.sleep(1.0)

    def close(self) -> None:
        try:
            raylets: list[psutil.Process] = []
            others: list[psutil.Process] = []
            for process in processes.family(processes.marked(cluster.MARK, self.id)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    (raylets if process.name() == "raylet" else others).append(process)
            processes.end(raylets, grace_s=5.0)  # while the head can be told goodbye
            processes.end(others, grace_s=5.0)
        finally:
            if self._redis is not None:
                self._redis.kill()
                self._redis.wait()

    def _start_redis(self) -> None:
        command = [_redis(), "--port", str(self.redis), "--bind", self._outside, "--requirepass", self._password]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self._folder)]
        self._redis = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((self._outside, self.redis), timeout=1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"redis-server does not listen on {self._outside}:{self.redis}")


@contextlib.contextmanager
def built(count: int) -> Iterator[Machines]:
    """So many machines, not started yet; everything of theirs is gone afterwards.

    Raises:
        RuntimeError: there is no redis-server.
    """
    _redis()
    folder = Path(tempfile.mkdtemp(prefix=cluster.TEMP_PREFIX, dir=cluster.TEMP_PARENT))
    (folder / "token").touch(0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        tag = secrets.token_hex(2)
        why = _why_together()
        if not why:
            try:
                net = stack.enter_context(_bridged(tag, count))
            except subprocess.CalledProcessError as error:
                why = f"the kernel makes no network namespaces: {error.stderr.strip()}"
        made = []
        for index in range(count):
            place = folder / f"m{index}"
            place.mkdir()
            host = cluster.HOST if why else _NET.format(net, index + 1)
            ports = tuple(cluster._free_ports(*[0] * len(_PORTS))) if why else _PORTS
            made.append(Machine(f"mm{tag}{index}", host, not why, ports, place))
        machines = Machines(made, folder, cluster.HOST if why else _NET.format(net, 254), why)
        stack.callback(machines.close)
        yield machines


@contextlib.contextmanager
def _bridged(tag: str, count: int) -> Iterator[int]:
    """Namespaces on a bridge, on which this machine has the address 254; the number of their network."""
    taken = {address.address for found in psutil.net_if_addrs().values() for address in found}
    net = next(each for each in range(1, 255) if _NET.format(each, 254) not in taken)
    with contextlib.ExitStack() as stack:
        _ip("link", "add", f"br{tag}", "type", "bridge")
        stack.callback(_ip, "link", "del", f"br{tag}")
        _ip("link", "set", f"br{tag}", "up")
        _ip("addr", "add", f"{_NET.format(net, 254)}/24", "dev", f"br{tag}")
        for index in range(count):
            name, end = f"mm{tag}{index}", f"ve{tag}{index}"
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", end, "master", f"br{tag}", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{_NET.format(net, index + 1)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield net


def _why_together() -> str:
    """Why machines share the loopback; nothing where they need not."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid():
        return "network namespaces want root"
    return "" if shutil.which("ip") else "the command `ip` is missing: apt-get install iproute2"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def _redis() -> str:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if not found:
        raise RuntimeError("redis-server is missing, in which Ray's head keeps its state: apt-get install redis-server")
    return found


def _switches(folder: Path) -> Mapping[str, str]:
    run = subprocess.run(
        [sys.executable, "-m", "serve.switches", str(folder)], cwd=cluster.CHECKOUT, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    switches: dict[str, str] = json.loads(run.stdout)
    return switches
