"""Says what this machine lacks, and the command that mends it: ports, compiler, token, disk, memory, versions.

    python -m jobs.doctor            a line for each check: ok, warn or fail
    python -m jobs.doctor --json     the same for a program

Ends with status 1 where something failed, so that nothing would work; a warning is something that will work less well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jobs import token
from mmagent import storage
from mmagent.arguments import Parser

CHECKOUT = Path(__file__).parents[1]
TESTED_PYTHON = (3, 11)
INSTALL = "pip install -c constraints.txt -e '.[cluster,speech,demo,dev]'"
HOST = "127.0.0.1"
PORTS = {6379: "Ray", 8265: "Ray's dashboard", 8000: "the service"}
GB = 2**30
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""  # a command, or what to do


def checks() -> Iterator[Check]:
    """All checks, in the order in which they are best mended."""
    yield python_version()
    yield from packages()
    yield compiler()
    yield speech()
    yield storage_root()
    yield disk("temporary folder", Path(tempfile.gettempdir()), warn_gb=5, fail_gb=1)
    yield shared_memory()
    yield cores()
    yield gpu()
    yield auth_token()
    if importlib.util.find_spec("psutil"):  # the doctor itself runs on a bare Python
        yield memory()
        yield ray()
        yield from ports()
    else:
        yield Check("processes", "fail", "psutil is not installed: memory, Ray and ports were not looked at", INSTALL)


def python_version() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] == TESTED_PYTHON:
        return Check("python", "ok", version)
    wanted = f"{TESTED_PYTHON[0]}.{TESTED_PYTHON[1]} is tested"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check("python", "warn", f"{version}; {wanted}", "make clean && make setup PYTHON=python3.11")
    return Check("python", "fail", f"{version}; {wanted}", "make clean && make setup PYTHON=python3.11")


def packages() -> Iterator[Check]:
    """What pyproject.toml asks for, in the versions of constraints.txt."""
    project, constraints = CHECKOUT / "pyproject.toml", CHECKOUT / "constraints.txt"
    if not (project.exists() and constraints.exists()):
        yield Check("packages", "warn", f"{constraints} is not there: versions are not compared")
        return
    tested = dict(line.split("==") for line in constraints.read_text().split() if "==" in line)
    asked = tomllib.loads(project.read_text())["project"]
    needed, optional = asked["dependencies"], asked["optional-dependencies"]
    for extra, requirements in {"library": needed, **optional}.items():
        names = [match[0] for item in requirements if (match := _REQUIREMENT.match(item))]
        missing, other = _compare(names, tested)
        if missing:
            status: Literal["warn", "fail"] = "fail" if extra in ("library", "cluster") else "warn"
            yield Check(f"packages: {extra}", status, f"not installed: {', '.join(missing)}", INSTALL)
        elif other:
            yield Check(f"packages: {extra}", "warn", f"other versions than tested: {', '.join(other)}", INSTALL)
        else:
            yield Check(f"packages: {extra}", "ok", f"{len(names)} in the tested versions")


def _compare(names: Sequence[str], tested: dict[str, str]) -> tuple[list[str], list[str]]:
    missing, other = [], []
    for name in names:
        try:
            version = importlib.metadata.version(name).partition("+")[0]  # 2.13.0+cpu is 2.13.0
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        wanted = tested.get(name.lower().replace("_", "-"))
        if wanted and version != wanted:
            other.append(f"{name} {version} (tested: {wanted})")
    return missing, other


def compiler() -> Check:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        return Check("C++ compiler", "ok", found)
    return Check(
        "C++ compiler",
        "warn",
        "none: all that is here runs; DeepSpeed's own operators could not be built",
        "apt-get install -y g++",
    )


def speech() -> Check:
    if importlib.util.find_spec("espeakng_loader"):
        return Check("speech synthesiser", "ok", "espeak-ng (GPL-3.0)")
    return Check("speech synthesiser", "warn", "none: the demo's spoken questions cannot be made", INSTALL)


def storage_root() -> Check:
    try:
        root = storage.root()
        with tempfile.TemporaryFile(dir=root):
            pass
    except (storage.StorageError, OSError) as error:
        return Check("storage root", "fail", str(error), f"export {storage.ROOT_VARIABLE}=/a/folder/you/can/write")
    return disk("storage root", root, warn_gb=5, fail_gb=1)


def disk(name: str, folder: Path, *, warn_gb: float, fail_gb: float) -> Check:
    free_gb = shutil.disk_usage(folder).free / GB
    status: Literal["ok", "warn", "fail"] = "ok" if free_gb >= warn_gb else "warn" if free_gb >= fail_gb else "fail"
    mend = f"make room, {warn_gb:g} GB are wanted: du -xh -d2 {folder} | sort -h" if status != "ok" else ""
    return Check(name, status, f"{free_gb:.1f} GB free in {folder}", mend)


def shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", "ok", "no /dev/shm on this system: Ray uses the temporary folder")
    total_gb = shutil.disk_usage(folder).total / GB
    if total_gb >= 1:
        return Check("shared memory", "ok", f"{total_gb:.1f} GB")
    return Check("shared memory", "warn", f"{total_gb:.2f} GB: Ray becomes slow", "docker run --shm-size=4g ...")


def memory() -> Check:
    import psutil

    found = psutil.virtual_memory()
    words = f"{found.available / GB:.1f} GB of {found.total / GB:.1f} GB available"
    if found.available >= 6 * GB:
        return Check("memory", "ok", words)
    status: Literal["warn", "fail"] = "warn" if found.available >= 3 * GB else "fail"
    return Check("memory", status, words, "end other programs, 6 GB are wanted: ps aux --sort -rss")


def cores() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count >= 2:
        return Check("cores", "ok", str(count))
    return Check("cores", "warn", "1: the two workers take turns, training takes twice as long", "give it 2 or more")


def gpu() -> Check:
    if not importlib.util.find_spec("torch"):
        return Check("GPU", "warn", "PyTorch is not installed", INSTALL)
    import torch

    if torch.cuda.is_available():
        return Check("GPU", "ok", torch.cuda.get_device_name(0))
    if shutil.which("nvidia-smi"):
        build = f"PyTorch {torch.__version__} does not use it"
        return Check("GPU", "warn", f"there is one, but {build}", "make clean && make setup TORCH_INDEX=URL")
    return Check("GPU", "ok", "none: everything runs on the CPU")


def auth_token() -> Check:
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        mode = os.environ["RAY_AUTH_MODE"]
        return Check("Ray's token", "warn", f"RAY_AUTH_MODE is {mode!r}: anybody may run code", "unset RAY_AUTH_MODE")
    if token.read(os.environ) is None:
        return Check("Ray's token", "ok", f"none yet in {token.path(os.environ)}: `make demo` makes it")
    file = token.path(os.environ)
    if not os.environ.get("RAY_AUTH_TOKEN") and file.stat().st_mode & 0o077:
        return Check("Ray's token", "warn", f"others can read {file}", f"chmod 600 {file}")
    return Check("Ray's token", "ok", "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(file))


def ray() -> Check:
    from jobs import cluster

    if address := os.environ.get("RAY_ADDRESS"):
        return Check("Ray", "ok", f"RAY_ADDRESS names {address}")
    try:
        found = cluster.Cluster.load(cluster.record())
    except (cluster.ClusterError, storage.StorageError) as error:
        return Check("Ray", "fail", str(error), f"rm {storage.root() / 'cluster.json'}")
    if found is None:
        return Check("Ray", "ok", "not running: `make demo` or `cluster/local.sh up` starts one")
    if found.alive:
        return Check("Ray", "ok", f"runs at {found.address}, dashboard {found.dashboard}")
    return Check("Ray", "warn", f"{cluster.record()} names a Ray that is dead", "cluster/local.sh down")


def ports() -> Iterator[Check]:
    for port, use in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1.0)
            taken = probe.connect_ex((HOST, port)) == 0
        if not taken:
            yield Check(f"port {port}", "ok", f"free for {use}")
        elif _ours(port):
            yield Check(f"port {port}", "ok", f"{use}, started from here")
        else:
            yield Check(
                f"port {port}", "warn", f"taken: `make demo` takes another one for {use}", f"ss -ltnp 'sport = :{port}'"
            )


def _ours(port: int) -> bool:
    from jobs import cluster

    try:
        found = cluster.Cluster.load(cluster.record())
    except (cluster.ClusterError, storage.StorageError):
        return False  # said by its own check
    if found is None or not found.alive:
        return False
    return port in (found.serve_port, *(int(address.rsplit(":", 1)[1]) for address in (found.address, found.dashboard)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")
    options = parser.parse_args(argv)
    found = list(checks())
    if options.json:
        print(json.dumps([asdict(check) for check in found], indent=1))
    else:
        for check in found:
            print(f"{check.status:<5} {check.name:<22} {check.found}")
            if check.mend:
                print(f"      {'':<22} -> {check.mend}")
    return 1 if any(check.status == "fail" for check in found) else 0


if __name__ == "__main__":
    sys.exit(main())
