"""What the loop measures of itself, and where it writes it: ``metrics.jsonl`` and TensorBoard's files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mmagent import storage

METRICS_FILE = "metrics.jsonl"
USAGE_FILE = "usage.jsonl"  # what the workers of each start took: never dropped, unlike the figures of repeated steps
_SETTLE_STEPS = 10  # steps of a start after which waiting for data counts


class _Group(Protocol):
    def sum(self, values: list[float]) -> list[float]: ...


class Meter:
    """Sums since the last log, kept as tensors where reading them would stop a GPU."""

    def __init__(self) -> None:
        self._steps = 0
        self._busy_s = self._wait_s = 0.0  # since the start, after `_SETTLE_STEPS`
        self.restart()

    def restart(self) -> None:
        """Begins a new interval: what lies between (validation, a checkpoint) is no training."""
        self._started = self._step_started = time.perf_counter()
        self._loss: Tensor | float = 0.0
        self._right: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0
        self._samples = 0.0
        self._waited = 0.0
        self._interval_steps = 0

    def waited(self, seconds: float) -> None:
        self._waited += seconds
        if self._steps >= _SETTLE_STEPS:
            self._wait_s += seconds

    def add(self, right: Tensor, known: Tensor, loss: Tensor) -> None:
        """Of one micro-batch: how many answers are right, of how many; its loss, summed over its samples."""
        self._loss = self._loss + loss.detach()
        self._right = self._right + right
        self._weight = self._weight + known

    def end_step(self, samples: float) -> None:
        """
        Args:
            samples: of this rank in one optimizer step.
        """
        self._samples += samples
        now = time.perf_counter()
        if self._steps >= _SETTLE_STEPS:
            self._busy_s += now - self._step_started
        self._steps += 1
        self._interval_steps += 1
        self._step_started = now

    def since_log_s(self) -> float:
        return time.perf_counter() - self._started

    def wait_share(self) -> float:
        """Seconds spent waiting for data, as a share of the time of all steps after the first ten of this start."""
        return self._wait_s / self._busy_s if self._busy_s else 0.0

    def read(self, group: _Group) -> dict[str, float]:
        """The interval's figures over all ranks; begins a new one. Every rank calls it."""
        seconds, steps = self.since_log_s(), self._interval_steps
        mine = [float(self._loss), float(self._right), float(self._weight), self._samples]
        loss, right, weight, samples, waited, took = group.sum([*mine, self._waited, seconds])
        self.restart()
        return {
            "loss": loss / max(1.0, samples),
            "accuracy": right / max(1.0, weight),
            "samples": samples,
            "steps": float(steps),
            "samples_per_s": samples / seconds,
            "wait_share": waited / took,
        }


class Log:
    """Writes a run's figures, on rank 0; other ranks' calls do nothing.

    Args:
        workers, kind: how many there are, and what one computes on: "cpu", or a GPU's name.
    """

    def __init__(self, folder: Path, rank: int, workers: int = 1, kind: str = "cpu") -> None:
        self._file = folder / METRICS_FILE if rank == 0 else None
        self._usage = folder / USAGE_FILE
        self._started_s, self._workers, self._kind = time.time(), workers, kind
        self._board: Any = None
        if rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tb"))

    def rewind(self, step: int) -> None:
        """Drops lines of later steps: a resumed run writes them again."""
        if self._file is not None and self._file.exists():
            drop_after(self._file, step)

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        row = {**row, "time_s": round(time.time(), 6)}
        with open(self._file, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.used()
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "time_s"):
                self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])
        self._board.flush()

    def used(self) -> None:
        """Notes that the workers are here still; of a start the last line counts."""
        if self._file is None:
            return
        told = {"start_s": self._started_s, "now_s": time.time(), "workers": self._workers, "type": self._kind}
        with open(self._usage, "a") as file:
            file.write(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in told.items()}) + "\n")


def drop_after(file: Path, step: int) -> None:
    """Drops the lines of later steps from a file of JSON lines, and one that a kill cut off."""
    lines = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
    storage.publish(file, "".join(line + "\n" for line in lines))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut off by a kill
