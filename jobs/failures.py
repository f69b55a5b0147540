"""How often the workers of a run failed, and why: counted, told, and followed by a pause that grows.

runs/NAME/failures.jsonl: a line for each failure, written by whoever sees it (the controller of the group). The workers
that are started next read the last one, wait, and rank 0 writes ``kind: restart`` into metrics.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "failures.jsonl"
_FIRST_S, _LONGEST_S = 1.0, 60.0
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Failure:
    start: str  # which start of the command it belongs to
    count: int  # of this start, from 1
    step: int  # of the newest checkpoint at that time
    reason: str
    pause_s: float  # before the workers begin again
    time_s: float


def note(folder: Path, start: str, step: int, reason: str) -> Failure:
    """Writes down one more failure of a start of the run's command."""
    before = [each for each in read(folder) if each.start == start]
    made = Failure(start, len(before) + 1, step, reason, _pause_s(before, step), round(time.time(), 3))
    with open(folder / FILE, "a") as file:
        file.write(json.dumps(asdict(made)) + "\n")
    return made


def read(folder: Path) -> list[Failure]:
    file = folder / FILE
    return [Failure(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def last(folder: Path, start: str) -> Failure | None:
    """Of this start of the command; None where its workers begin for the first time."""
    mine = [each for each in read(folder) if each.start == start]
    return mine[-1] if mine else None


def wait(failure: Failure, stopped: Callable[[], bool]) -> None:
    """Waits out the pause, or until the run is asked to stop."""
    end = time.monotonic() + failure.pause_s
    while (left := end - time.monotonic()) > 0 and not stopped():
        time.sleep(min(_LOOK_S, left))


def _pause_s(before: list[Failure], step: int) -> float:
    """Twice as long after each failure without a new checkpoint; a run that gets on begins anew."""
    fruitless = 0
    for each in reversed(before):
        if each.step != step:
            break
        fruitless += 1
    return min(_LONGEST_S, _FIRST_S * 2.0**fruitless)
