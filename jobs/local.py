"""A Ray on this machine, for the commands that follow: started, looked at, ended. `cluster/local.sh` calls it.

    python -m jobs.local up        start it, or find the one that runs
    python -m jobs.local status    what it has, what is in use, what runs on it; status 1 where there is none
    python -m jobs.local down      end it, and nothing else

It listens on 127.0.0.1, asks for a token, and is recorded in ROOT/cluster.json, where later commands find it. A port
that is taken is told with who has it, and another one is used; one that was asked for must be free.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from jobs import cluster
from jobs.cluster import Cluster, ClusterError
from mmagent import storage
from mmagent.arguments import Parser, positive

GB = 1 << 30
_STORE_SHARE = 0.3  # of free memory, as Ray's own choice is of all memory
_SHARED_SHARE = 0.8  # of what /dev/shm has free: where it is full, objects go to the disk
_LEAST_STORE = 200_000_000


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return {"up": up, "status": status, "down": down}[args.command](args)
    except (ClusterError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: cluster/local.sh down ends what was started", file=sys.stderr)
        return 130


def up(args: argparse.Namespace) -> int:
    """
    Raises:
        ClusterError: a port that was asked for is taken, another version of Ray runs, or Ray does not start.
    """
    file = cluster.record()
    known = Cluster.load(file)
    if known is not None and known.alive:
        _check_same(known, args)
    else:
        for line in _in_the_way(args):
            print(line)
    found, new = cluster.ensure(
        file,
        num_cpus=args.cpus,
        object_store_bytes=_store_bytes(args),
        port=args.port,
        dashboard_port=args.dashboard_port,
    )
    print(f"Ray {found.ray} {'started' if new else 'runs already'}: {found.address}, recorded in {file}")
    print("\n".join(_hints(found)))
    return 0


def status(args: argparse.Namespace) -> int:
    found = Cluster.load(cluster.record())
    if found is None or not found.alive:
        what = "no Ray was started from here" if found is None else f"{cluster.record()} names a Ray that is dead"
        print(f"{what}: cluster/local.sh up starts one")
        return 1
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.started_ms / 1000))
    print(f"Ray {found.ray} at {found.address} since {since}, dashboard {found.dashboard}")
    cluster.connect()
    import ray
    from ray.util.state import list_jobs

    has, free = ray.cluster_resources(), ray.available_resources()
    for name in ("CPU", "GPU"):
        if has.get(name):
            print(f"{name:<8} {has[name] - free.get(name, 0.0):g} of {has[name]:g} in use")
    for name in ("memory", "object_store_memory"):
        used = has.get(name, 0.0) - free.get(name, 0.0)
        print(
            f"{name.removesuffix('_memory').replace('_', ' '):<8} {used / GB:.1f} of {has.get(name, 0.0) / GB:.1f} GB"
        )
    running = [job for job in list_jobs(found.address, limit=1000) if job.status == "RUNNING" and job.submission_id]
    for job in running:
        print(f"job      {job.submission_id}  {job.entrypoint}")
    alive = cluster.family(found)
    memory = sum(each.memory_info().rss for each in alive) / GB
    print(f"{len(alive)} processes, {memory:.1f} GB resident")
    return 0


def down(args: argparse.Namespace) -> int:
    """Ends what cluster.json names, and forgets it."""
    file = cluster.record()
    found = Cluster.load(file)
    if found is None:
        print(f"nothing to stop: {file} is not there, so no Ray was started from here")
        return 0
    count = cluster.stop(found)
    file.unlink(missing_ok=True)
    print(f"stopped the Ray of {file}: {count} processes ended")
    return 0


def _check_same(known: Cluster, args: argparse.Namespace) -> None:
    """
    Raises:
        ClusterError: what runs is not what is asked for.
    """
    here = importlib.metadata.version("ray")
    if known.ray != here:
        raise ClusterError(
            f"the Ray at {known.address} is of version {known.ray}, but {here} is installed here: end it with "
            "cluster/local.sh down, and start one of this version"
        )
    ports = {"--port": (args.port, known.address), "--dashboard-port": (args.dashboard_port, known.dashboard)}
    for flag, (asked, has) in ports.items():
        if asked is not None and not has.endswith(f":{asked}"):
            raise ClusterError(f"{flag} {asked}: a Ray runs already, at {has}; cluster/local.sh down ends it")


def _in_the_way(args: argparse.Namespace) -> Iterator[str]:
    """Who has the ports that Ray would take, and which other Rays there are: a line for each.

    Raises:
        ClusterError: a port that was asked for is taken.
    """
    for flag, asked, usual, use in (
        ("--port", args.port, cluster.PORT, "Ray"),
        ("--dashboard-port", args.dashboard_port, cluster.DASHBOARD_PORT, "the dashboard"),
    ):
        port = asked or usual
        if not cluster.listens(port):
            continue
        if asked is not None:
            raise ClusterError(f"{flag} {port} is taken by {_holder(port)}: give another one, or end that")
        yield f"port {port} is taken by {_holder(port)}: {use} gets another one"
    others = {each.pid for each in psutil.process_iter(["name"]) if each.info["name"] == "gcs_server"}
    for pid in sorted(others):
        yield f"another Ray runs here too (process {pid}): it is left alone; RAY_ADDRESS names it to commands"


def _holder(port: int) -> str:
    """The process that listens on a port, as far as this user may know."""
    try:
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid:
                return f"{psutil.Process(found.pid).name()} (process {found.pid})"
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        pass
    return f"another user's process (`ss -ltnp 'sport = :{port}'` tells, as root)"


def _store_bytes(args: argparse.Namespace) -> int:
    """The memory of Ray's object store: what is asked for, or what fits beside what runs on this machine."""
    if args.object_store_gb:
        return int(args.object_store_gb * GB)
    fits = _STORE_SHARE * psutil.virtual_memory().available
    if Path("/dev/shm").is_dir():
        fits = min(fits, _SHARED_SHARE * shutil.disk_usage("/dev/shm").free)
    return max(_LEAST_STORE, int(fits))


def _hints(found: Cluster) -> Iterator[str]:
    metrics = f"{found.temp_dir}/session_latest/metrics"
    root = storage.variables()[storage.ROOT_VARIABLE]
    yield f"dashboard   {found.dashboard} (asks for the token: `ray get-auth-token` prints it)"
    yield (
        f"jobs        RAY_AUTH_MODE=token ray job submit --address {found.dashboard} --working-dir . "
        f'--runtime-env-json \'{{"env_vars": {{"MMAGENT_STORAGE": "{root}"}}}}\' -- python -m jobs.NAME ...'
    )
    yield "            or without submitting: python -m jobs.NAME ... finds it by itself"
    yield f"Prometheus  prometheus --config.file={metrics}/prometheus/prometheus.yml"
    yield f"Grafana     grafana-server --config {metrics}/grafana/grafana.ini --homepath /usr/share/grafana web"
    yield "end it      cluster/local.sh down"


def _parser() -> Parser:
    parser = Parser("jobs.local", __doc__)
    parser.add_argument("command", choices=("up", "status", "down"))
    parser.add_argument("--port", type=positive, help=f"of Ray (default: {cluster.PORT}, or a free one)")
    parser.add_argument(
        "--dashboard-port",
        type=positive,
        help=f"where jobs are taken (default: {cluster.DASHBOARD_PORT}, or a free one)",
    )
    parser.add_argument(
        "--cpus", type=positive, help="that Ray hands out: tickets, not cores (default: the cores, 4 at least)"
    )
    parser.add_argument(
        "--object-store-gb", type=float, help="memory for objects (default: 0.3 of what is free, if /dev/shm has it)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
