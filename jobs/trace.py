"""What each rank learned from, step by step: runs/NAME/trace/rank_N.jsonl (`train.trace`).

A line: {"step": 7, "ids": ["train-3", ...], "loss": "0x1.62e42fefa39efp+0"}. Rows that only fill a step up are
left out. The loss, a rank's mean over its forward passes, is written in hexadecimal, so that two runs can be compared
bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.meter import drop_after

FOLDER = "trace"


class Trace:
    """Writes one rank's lines."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder / FOLDER, rank
        self._folder.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Drops the lines of later steps, of every rank that ever wrote; rank 0 does it before the first step."""
        if self._rank == 0:
            for file in self._folder.glob("rank_*.jsonl"):
                drop_after(file, step)

    def write(self, step: int, table: pa.Table, losses: Sequence[float]) -> None:
        taught = table.filter(pc.greater(table["weight"], 0.0))
        line = {"step": step, "ids": taught["id"].to_pylist(), "loss": (sum(losses) / max(1, len(losses))).hex()}
        with open(self._folder / f"rank_{self._rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each rank that has written any, by the name of its file."""
    files = sorted((folder / FOLDER).glob("rank_*.jsonl"))
    found = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return {rank: lines for rank, lines in found.items() if lines}
