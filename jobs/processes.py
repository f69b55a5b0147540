"""Processes that we started: named so that they can be found again, and ended without touching anybody else's."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Process:
    pid: int
    created_s: float  # pids are used again; a pid with its creation time is not
    name: str

    @classmethod
    def of(cls, process: psutil.Process) -> Process:
        return cls(process.pid, process.create_time(), process.name())

    def find(self) -> psutil.Process | None:
        """The process if it still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created_s) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def marked(variable: str, value: str) -> list[psutil.Process]:
    """The processes that carry an environment variable of this value: a mark that their children inherit."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended meanwhile, or another user's: not ours
    return found


def family(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes with all their descendants, each once."""
    found = {process.pid: process for process in processes}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


def end(processes: Sequence[psutil.Process], grace_s: float = 10.0) -> None:
    """Asks the processes to end, waits, and kills what is left."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile: that is what is wanted
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=grace_s)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5.0)
