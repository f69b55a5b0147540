"""Two gloo ranks that are hurt on purpose, without Ray: forked from one process that has imported what they need.

    python -m tests.bench.hurt        (a line of JSON for each group on standard input, one back on standard output)

Every rank runs `jobs.loop.train` as it is, on the stream's own tables, from the newest checkpoint. What hurts it is
told beforehand: a rank, a step, a phase of `jobs.vigil`, and what happens there.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
_LONGEST_SAVE_S = 0.06


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
    seconds: float

    @property
    def hung(self) -> bool:
        return None in self.statuses


class Groups:
    """Starts groups, one after the other."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.bench.hurt"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=CHECKOUT, stdin=pipe, stdout=pipe, text=True)

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
    import torch

    from jobs import zero

    torch.set_num_threads(1)
    zero._import_deepspeed()
    for slow in ("jobs.supervised", "jobs.loop", "torch._inductor.standalone_compile", "torch.distributed.fsdp", "peft",
                 "tensorboard"):  # fmt: skip
        importlib.import_module(slow)  # once, not in each of the children
    for line in sys.stdin:
        print(json.dumps(asdict(_group(json.loads(line)))), flush=True)
    return 0


def _group(asked: dict[str, Any]) -> Ended:
    """Forks the ranks of a group, and waits; where one fails, the others are killed, as Ray Train does."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    began = time.monotonic()
    children = []
    for rank in range(asked["world"]):
        child = os.fork()
        if not child:
            _rank(rank, port, asked)
        children.append(child)
    ended: dict[int, int] = {}
    late = False
    while len(ended) < len(children):
        for child in (child for child in children if child not in ended):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
        late = late or time.monotonic() - began > asked["timeout_s"]
        if late or any(ended.values()):
            for child in (child for child in children if child not in ended):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return Ended([None if late else ended[child] for child in children], time.monotonic() - began)


def _rank(rank: int, port: int, asked: dict[str, Any]) -> None:
    """A rank's whole life."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(asked["world"]), "LOCAL_SIZE": str(asked["world"])}
    said = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    try:
        _train(rank, asked)
    except BaseException:  # noqa: BLE001  said, and told to the parent by the status
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _train(rank: int, asked: dict[str, Any]) -> None:
    import torch

    from jobs import loop, workers

    plan = torch.load(asked["plan"], weights_only=False)
    if asked["hurt"]:
        _arm(rank, Hurt(**asked["hurt"]))
    sigterm = workers.Sigterm()
    group = workers.Group(
        rank=rank, world=asked["world"], blocks=lambda name: _blocks(plan, name, rank, asked["world"]),
        report=lambda _: None, asked=lambda: "SIGTERM" if sigterm else "",
    )  # fmt: skip
    loop.train(group, plan)


def _blocks(plan: Any, name: str, rank: int, world: int) -> Iterator[Any]:
    """The streams of a rank, as `jobs.run` makes them, without Ray."""
    from jobs import run, stream
    from mmagent import storage
    from mmagent.order import Position
    from mmagent.shards import Dataset

    storage.use(plan.root)
    layout = stream.layout_of(plan.config, world)
    if name == "train":
        found = run._checkpoints(plan.folder).latest()
        position = Position(**found.loop["position"]) if found else Position()
        steps = max(1, plan.total_steps - (found.step if found else 0))
        return stream.tables(plan.order, layout, position, steps, rank)
    dataset = Dataset.open(storage.folder("data", plan.data))
    order = stream.order_of(dataset, name, seed=plan.config.seed, window_rows=plan.config.train.eval_rows)
    return stream.tables(order, layout, Position(), 1, rank)


def _arm(rank: int, hurt: Hurt) -> None:
    """Lets this rank be hurt when it comes to the place."""
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
