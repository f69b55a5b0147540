"""Groups of gloo processes without Ray, for tests: forked from one process that has imported what all of them need.

    python -m tests.ranks MODULE:FUNCTION GIVEN WORLD:PORT ...

Every rank of every group calls ``FUNCTION(rank, world, Path(GIVEN))``. Where one fails, all end, and the exit status
says so; what it said stands on stderr.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def run(work: str, given: Path, worlds: Iterable[int], timeout_s: float) -> None:
    """Runs ``MODULE:FUNCTION`` in groups of these sizes, all at once, and fails where a rank fails or is not done in
    time."""
    groups = [f"{world}:{port()}" for world in worlds]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.ranks", work, str(given), *groups], cwd=CHECKOUT, capture_output=True, text=True,
        timeout=timeout_s + 60, check=False, env={**os.environ, "RANKS_TIMEOUT_S": str(timeout_s)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]


def until(done: Callable[[], bool], timeout_s: float = 400.0) -> None:
    """Waits for what another group does."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "another group did not come so far"
        time.sleep(0.05)


def port() -> int:
    """A free one, where a group meets."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def load(*modules: str) -> None:
    """Imports what ranks need, once, and not in each of the children that this process forks."""
    import torch

    from jobs import zero

    torch.set_num_threads(1)
    zero._import_deepspeed()
    for slow in ("torch._inductor.standalone_compile", "torch.distributed.fsdp", "peft", "tensorboard", *modules):
        importlib.import_module(slow)


def fork(function: Callable[[int, int, Path], None], given: Path, rank: int, world: int, port: int) -> int:
    """A child that is one rank of a group, and ends with status 1 where the function raises; its id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    try:
        function(rank, world, given)
    except BaseException:  # noqa: BLE001  said, and told to the parent by the status
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _main() -> int:
    work, given, *groups = sys.argv[1:]
    load()
    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    children = set()
    for world, place in (group.split(":") for group in groups):
        children |= {fork(function, Path(given), rank, int(world), int(place)) for rank in range(int(world))}
    deadline, status = time.monotonic() + float(os.environ["RANKS_TIMEOUT_S"]), 0
    while children and not status:
        child, code = os.waitpid(-1, os.WNOHANG)
        children.discard(child)
        status = code or (time.monotonic() > deadline and 1) or 0
        time.sleep(0.0 if child else 0.02)
    if children:
        print(f"{len(children)} ranks were not done", file=sys.stderr)
    for child in children:
        os.kill(child, signal.SIGKILL)
    return int(bool(status))


if __name__ == "__main__":
    sys.exit(_main())
