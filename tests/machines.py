"""More machines for a Ray of tests, all on the loopback of one: a machine is a raylet with CPUs of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from jobs import cluster

# Ray 2.60 listens on the loopback alone where it takes itself for a Ray of one machine (see `cluster.LOOPBACK`), and
# its command refuses to add one then. The command alone is told otherwise.
_JOIN = """
import sys
from ray.scripts import scripts

class Constants:
    ENABLE_RAY_CLUSTER = True

    def __getattr__(self, name):
        return getattr(known, name)

known, scripts.ray_constants = scripts.ray_constants, Constants()
sys.exit(scripts.main())
"""


def join(head: cluster.Cluster, cpus: int = 4) -> None:
    """Adds a machine; `cluster.stop` ends it with the others."""
    command = [sys.executable, "-c", _JOIN, "start", f"--address={head.address}", f"--num-cpus={cpus}"]
    command += [f"--node-ip-address={cluster.HOST}", "--object-store-memory=100000000", "--disable-usage-stats"]
    environment = {**os.environ, **head.environment, cluster.MARK: head.id}
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
