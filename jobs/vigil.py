"""Where each rank of a run stands, and the alarm when none gets on.

runs/NAME/ranks/rank_N.json holds what rank N does now: step, phase, since when, the shapes of the batch in hand, the
memory that was free. It is mapped into memory, so that telling costs microseconds, and what was told last survives the
worker however it dies: the kernel's killer raises no exception (see `jobs.forecast`). runs/NAME/ranks/rank_N.stack gets
the stacks of the rank's threads when a step takes longer than `train.alarm_minutes`.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = "ranks"
_BYTES = 4096
_FLUSH_S = 5.0  # a folder that other machines look into over a network gets the pages this often at least
_MINUTE_S = 60.0

# What a rank does, in words; in those of `WAITING` it may be others that it waits for.
PHASES = {
    "start": "starts",
    "data": "waits for data",
    "forward": "is in the forward pass",
    "backward": "is in the backward pass",
    "collective": "waits for the other ranks",
    "step": "is in the optimizer's step",
    "validation": "validates",
    "checkpoint": "writes a checkpoint",
    "export": "exports",
    "end": "has ended",
}
WAITING = ("backward", "collective", "step", "validation", "checkpoint")
_NOT_WATCHED = ("start", "export", "end")  # they take what they take


@dataclass(frozen=True, slots=True)
class Standing:
    """What one rank does."""

    rank: int
    step: int = 0
    phase: str = "start"
    since_s: float = 0.0  # of the epoch: when the phase began
    step_since_s: float = 0.0  # when the step began
    shapes: Mapping[str, list[int]] | None = None  # of the batch in hand
    free_bytes: int = 0  # memory of the machine when the step began
    host: str = ""
    pid: int = 0


class Post:
    """Tells where this rank stands.

    Args:
        folder: the run's own.
        alarm_minutes: a step that takes longer has its stacks written; none: never.
    """

    def __init__(self, folder: Path, rank: int, alarm_minutes: float | None = None) -> None:
        place = folder / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / f"rank_{rank}.json", os.O_RDWR | os.O_CREAT, 0o644)
        os.posix_fallocate(descriptor, 0, _BYTES)  # a page that a full disk has no room for would end the process
        self._map = mmap.mmap(descriptor, _BYTES)
        os.close(descriptor)
        self._stack = open(place / f"rank_{rank}.stack", "w")  # noqa: SIM115  faulthandler keeps its descriptor
        self._alarm_s = alarm_minutes * _MINUTE_S if alarm_minutes else None
        self._standing = Standing(rank, host=socket.gethostname(), pid=os.getpid())
        self._flushed = 0.0
        self.at("start")

    def at(self, phase: str, *, step: int | None = None, shapes: Mapping[str, Iterable[int]] | None = None) -> None:
        """This rank is in another phase now; `step` is given where a step begins, `shapes` with a new batch."""
        assert phase in PHASES
        now = time.time()
        told: dict[str, Any] = {"phase": phase, "since_s": now}
        if step is not None:
            told |= {"step": step, "step_since_s": now, "free_bytes": free_bytes()}
        if shapes is not None:
            told["shapes"] = {name: list(shape) for name, shape in shapes.items()}
        self._standing = replace(self._standing, **told)
        self._write(now)
        if self._alarm_s is None:
            return
        if phase in _NOT_WATCHED:
            faulthandler.cancel_dump_traceback_later()
        elif step is not None:
            faulthandler.dump_traceback_later(self._alarm_s, file=self._stack)

    def close(self) -> None:
        self.at("end")
        self._map.close()
        self._stack.close()

    def _write(self, now: float) -> None:
        text = json.dumps(asdict(self._standing)).encode()
        if len(text) >= _BYTES:
            text = json.dumps(asdict(replace(self._standing, shapes=None))).encode()
        self._map[:] = text.ljust(_BYTES)
        if now - self._flushed > _FLUSH_S:
            self._map.flush()
            self._flushed = now


def read(folder: Path) -> list[Standing]:
    """Where the ranks of a run stand, or stood when they died. One that is just being told is left out."""
    found = []
    for file in sorted((folder / FOLDER).glob("rank_*.json")):
        try:
            found.append(Standing(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda standing: standing.rank)


class Alarm:
    """Looks at the ranks of a run, and says once of each standstill who stands where.

    Args:
        folder: the run's own.
        minutes: how long a step may take; none: no alarm.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self._folder, self._limit_s = folder, minutes * _MINUTE_S if minutes else None
        self._began_s = time.time()
        self._told: dict[int, float] = {}  # rank: when the step that was told of began

    def look(self) -> list[str]:
        """Lines to tell now."""
        if self._limit_s is None:
            return []
        now = time.time()
        ranks = [each for each in read(self._folder) if each.since_s >= self._began_s]
        watched = [each for each in ranks if each.phase not in _NOT_WATCHED]
        still = {each.rank: each.step_since_s for each in watched if now - each.step_since_s > self._limit_s}
        if not still:
            lines = ["the run goes on"] if self._told and watched else []
            self._told = {} if watched else self._told
            return lines
        if self._told.keys() & still.keys():
            return []
        self._told = still
        longest = (now - min(still.values())) / _MINUTE_S
        return [f"no step for {longest:.1f} minutes:", *(f"  {line}" for line in self._who(ranks, now))]

    def _who(self, ranks: list[Standing], now: float) -> list[str]:
        lines = [
            f"rank {each.rank} (process {each.pid} on {each.host}) {PHASES[each.phase]}, in step {each.step + 1}, "
            f"for {now - each.since_s:.0f} s"
            for each in ranks
        ]
        held = [each.rank for each in ranks if each.phase not in (*WAITING, *_NOT_WATCHED)]
        if held and len(held) < len(ranks):
            lines.append(f"the others wait for rank {' and '.join(map(str, held))}")
        return [*lines, f"the stacks: {self._folder / FOLDER}/rank_N.stack"]


def free_bytes() -> int:
    """Memory that this machine could still give, without swapping; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return 0
