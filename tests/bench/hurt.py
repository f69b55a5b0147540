"""Two gloo ranks that are hurt on purpose, without Ray: forked from one process that has imported what they need.

    python -m tests.bench.hurt        (a line of JSON for each group on standard input, one back on standard output)

Every rank runs `jobs.loop.train` as it is, on the stream's own tables, from the newest checkpoint. What hurts it is
told beforehand: a rank, a step, a phase of `jobs.vigil`, and what happens there.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs import cluster
from tests import ranks

_LONGEST_SAVE_S = 0.06
_LOOK_S = 0.005  # between two looks at which ranks have ended: the kernel tells of any child, not of these


@dataclass(frozen=True, slots=True)
class Hurt:
    """What happens to a group."""

    kind: str  # kill: SIGKILL; save: the same, while a checkpoint is written; term: SIGTERM
    rank: int
    step: int  # that is done when it happens
    phase: str
    seed: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How a group ended: the exit status of each rank, negative for a signal; none where it was not done in time."""

    statuses: list[int | None]

    @property
    def hung(self) -> bool:
        return None in self.statuses


class Groups:
    """Starts groups, one after the other."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.bench.hurt"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=cluster.CHECKOUT, stdin=pipe, stdout=pipe, text=True)

    def run(self, plan: Path, world: int, hurt: Hurt | None, log: Path, timeout_s: float) -> Ended:
        """Runs a group to its end, or kills it after so many seconds.

        Args:
            plan: a pickled `jobs.loop.Plan`.
            log: gets what the ranks say.
        """
        asked = {
            "plan": str(plan),
            "world": world,
            "hurt": hurt and asdict(hurt),
            "log": str(log),
            "timeout_s": timeout_s,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> int:
    ranks.load("jobs.supervised", "jobs.loop")
    for line in sys.stdin:
        print(json.dumps(asdict(_group(json.loads(line)))), flush=True)
    return 0


def _group(asked: dict[str, Any]) -> Ended:
    """Forks the ranks of a group, and waits; where one fails, the others are killed, as Ray Train does."""
    world, port, deadline = asked["world"], ranks.port(), time.monotonic() + asked["timeout_s"]
    work, plan = functools.partial(_train, asked), Path(asked["plan"])
    children = [ranks.fork(work, plan, rank, world, port) for rank in range(world)]
    ended: dict[int, int] = {}
    late = False
    while left := [child for child in children if child not in ended]:
        late = late or time.monotonic() > deadline
        for child in left:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
            elif late or any(ended.values()):
                os.kill(child, signal.SIGKILL)
        time.sleep(_LOOK_S)
    return Ended([None if late else ended[child] for child in children])


def _train(asked: dict[str, Any], rank: int, world: int, plan_file: Path) -> None:
    """A rank's whole life, on the streams that `jobs.run` makes, without Ray."""
    import torch

    from jobs import loop, run, stream, workers
    from mmagent import storage
    from mmagent.shards import Dataset

    said = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    plan = torch.load(plan_file, weights_only=False)
    storage.use(plan.root)
    dataset = Dataset.open(storage.folder("data", plan.data))
    if asked["hurt"]:
        _arm(rank, Hurt(**asked["hurt"]))
    sigterm = workers.Sigterm()
    group = workers.Group(
        rank=rank, world=world, report=lambda _: True, asked=lambda: "SIGTERM" if sigterm else "",
        blocks=lambda name: stream.tables(*run.reads(plan, dataset, name, world), rank),
    )  # fmt: skip
    loop.train(group, plan)


def _arm(rank: int, hurt: Hurt) -> None:
    """Lets this rank be hurt when it comes to the place. Where it stands it tells its post alone, so the post of this
    forked process is replaced: nothing in `jobs` needs to know of rounds."""
    from jobs import vigil

    if rank != hurt.rank:
        return
    at, done = vigil.Post.at, False

    def hurting(self: Any, phase: str, **told: Any) -> None:
        nonlocal done
        at(self, phase, **told)
        if done or self._standing.step < hurt.step or phase != hurt.phase:
            return
        done = True
        if hurt.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif hurt.kind == "save":  # the checkpoint is written while the loop goes on
            delay_s = random.Random(hurt.seed).uniform(0.0, _LONGEST_SAVE_S)
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    vigil.Post.at = hurting  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
