"""More machines for a Ray of tests, all on the loopback of one: a machine is a raylet with CPUs of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from jobs import cluster, vigil
from jobs.vigil import Standing

_LOOK_S = 0.002  # a tiny model's steps take some hundredths of a second, and one of them is waited for

# Ray 2.60 listens on the loopback alone where it takes itself for a Ray of one machine (see `cluster.LOOPBACK`), and
# its command refuses to add one then. The command alone is told otherwise.
JOIN = """
import sys
from ray.scripts import scripts

class Constants:
    ENABLE_RAY_CLUSTER = True

    def __getattr__(self, name):
        return getattr(known, name)

known, scripts.ray_constants = scripts.ray_constants, Constants()
sys.exit(scripts.main())
"""


def join(
    head: cluster.Cluster, cpus: int = 4, *, labels: Mapping[str, str] | None = None, hides: Path | None = None
) -> None:
    """Adds a machine; `cluster.stop` ends it with the others.

    Args:
        labels: of the machine.
        hides: a folder in whose place it sees an empty one; wants root.
    """
    command = [sys.executable, "-c", JOIN, "start", f"--address={head.address}", f"--num-cpus={cpus}"]
    command += [f"--node-ip-address={cluster.HOST}", "--object-store-memory=100000000", "--disable-usage-stats"]
    if labels:
        command.append("--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()))
    if hides is not None:  # a file system of its own there, for its processes alone
        shell = f'mount -t tmpfs none {shlex.quote(str(hides))} && exec "$@"'
        command = ["unshare", "--mount", "--propagation=private", "sh", "-c", shell, "sh", *command]
    environment = {**os.environ, **head.environment, cluster.MARK: head.id}
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


def workers_of(folder: Path, step: int, timeout_s: float = 300.0) -> list[Standing]:
    """Where both ranks of a run stand, once they have come to a step.

    Raises:
        TimeoutError: they have not.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = [each for each in vigil.read(folder) if each.step >= step and psutil.pid_exists(each.pid)]
        if len(found) == 2:
            return found
        time.sleep(_LOOK_S)
    raise TimeoutError(f"no two ranks came to step {step}: {vigil.read(folder)}")


def machine_of(standing: Standing) -> psutil.Process:
    """The raylet that a rank's process belongs to."""
    return next(each for each in psutil.Process(standing.pid).parents() if each.name() == "raylet")
