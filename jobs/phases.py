"""Where the time of a training loop goes: every moment belongs to one phase, so that the phases add up to the whole.

On a CPU a clock is read where one phase ends and the next begins. On a GPU, which computes behind the loop's back, a
mark is put into its queue there, and read when figures are: a phase is then the time until the GPU has done its work,
and waiting is what the GPU stood still for, not what the loop did.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from mmagent.stalls import PHASES

VALIDATION = "validation"  # is no part of a step
_WHOLE = (VALIDATION, "checkpoint")


class _Group(Protocol):
    def sum(self, values: list[float]) -> list[float]: ...


class Phases:
    """
    Args:
        device: what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._thread = threading.get_ident()
        self._seconds = dict.fromkeys((*PHASES, VALIDATION), 0.0)
        self._marks: list[tuple[str, Any]] = []  # (phase that begins, event) of a GPU, not read yet
        self._name, self._since = "other", 0.0
        self._mark("other")

    def enter(self, name: str) -> str:
        """Ends one phase and begins another; the one that ended."""
        before, self._name = self._name, self._mark(name)
        return before

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase in the middle of another. Not where a whole is measured that is no computing, nor in another thread
        than the loop's, which runs beside it."""
        if self._name in _WHOLE or threading.get_ident() != self._thread:
            yield
            return
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def read(self, group: _Group, steps: float) -> dict[str, float]:
        """Seconds of a step in each phase, and in all, since the last reading: means over ranks. Every rank calls it.

        A checkpoint or what else came between two steps is shared out over all of them; validations do not count.
        """
        self._mark(self._name)
        self._settle()
        *mine, ranks = group.sum([*(self._seconds[name] for name in PHASES), 1.0])
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        each = [value / ranks / max(1.0, steps) for value in mine]
        return {f"{name}_s": value for name, value in zip(PHASES, each, strict=True)} | {"step_s": sum(each)}

    def _mark(self, name: str) -> str:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            now = time.perf_counter()
            if self._since:
                self._seconds[self._name] += now - self._since
            self._since = now
        return name

    def _settle(self) -> None:
        """Reads the marks of a GPU, once it has come to the last."""
        if not self._on_gpu:
            return
        self._marks[-1][1].synchronize()
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            self._seconds[name] += start.elapsed_time(end) / 1000
        del self._marks[:-1]


class Timed:
    """Collectives of a backend, with the time that the loop stands in them, waiting for other ranks too.

    Args:
        backend: whose methods exchange tensors.
        phases: that hear of them.
    """

    _EXCHANGES = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "barrier")

    def __init__(self, backend: Any, phases: Phases) -> None:
        self._backend, self._phases = backend, phases

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if not callable(found) or not name.startswith(self._EXCHANGES):
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._phases.within("communication"):
                work = found(*args, **kwargs)
            return _Work(work, self._phases) if hasattr(work, "wait") else work

        return timed


class _Work:
    """An exchange that was begun; the time it is waited for counts."""

    def __init__(self, work: Any, phases: Phases) -> None:
        self._work, self._phases = work, phases

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any) -> Any:
        with self._phases.within("communication"):
            return self._work.wait(*args)
