"""A measurement: rows of named figures with their goals, in the one format that all benchmarks write.

``{"bench", "machine", "rows": [{"id": "train.vs_plain", "value", "unit", "what", "goal": ">= 1.0", "met": true}]}``.
Shares and ratios are fractions of one, times seconds or ms as the id says, accuracies percent.
"""

from __future__ import annotations

import importlib.metadata
import json
import operator
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent import storage

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GOAL = re.compile(r"(>=|<=|>|<) (-?\d+(?:\.\d+)?)")
_PACKAGES = ("torch", "ray", "transformers", "deepspeed", "pyarrow")


@dataclass(frozen=True)
class Row:
    id: str
    value: float
    unit: str
    what: str
    goal: str | None = None  # ">= 99.0"; none: measured to be known

    def __post_init__(self) -> None:
        if self.goal is not None and not _GOAL.fullmatch(self.goal):
            raise ValueError(f"{self.id}: the goal is {self.goal!r}, but such as '>= 99.0' is wanted")

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        compare, _, wanted = self.goal.partition(" ")
        return _COMPARE[compare](self.value, float(wanted))

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "value": round(self.value, 6),
            "unit": self.unit,
            "what": self.what,
            "goal": self.goal,
            "met": self.met,
        }


def publish(bench: str, rows: Sequence[Row], checkout: Path, *, keep: bool = False) -> None:
    """Writes ``bench/BENCH.json`` in the storage root and a copy in ``runs/bench`` of the checkout.

    Args:
        keep: whether rows of an earlier file stay that are not measured anew, where it was made on the same machine
            with the same packages: a long measurement can be made in parts.
    """
    made, new = machine(), {row.id: row.to_dict() for row in rows}
    file = checkout / "runs" / "bench" / f"{bench}.json"
    known = json.loads(file.read_text()) if keep and file.exists() else {"machine": {}, "rows": []}
    same = {**known["machine"], "measured": made["measured"]} == made  # at whatever time
    before = {row["id"]: row for row in known["rows"]} if same else {}
    value = {"bench": bench, "machine": made, "rows": [*(before | new).values()]}
    for folder in (storage.root() / "bench", checkout / "runs" / "bench"):
        storage.publish_json(folder / f"{bench}.json", value)


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    lines = []
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        goal = f"goal {row.goal}" if row.goal else ""
        lines.append(f"  {row.id:<30} {_short(row.value):>10} {row.unit:<8} {goal:<14} {verdict}".rstrip())
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def resident_peak() -> int:
    """The most bytes that this process has had in memory. Not `ru_maxrss` where the kernel says better: that begins
    with what the process was started from."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
