"""How far a long command is, how fast, and the time left: one line, rewritten on a terminal, repeated in a log."""

from __future__ import annotations

import sys
import time
from typing import Self

_TERMINAL_S, _LOG_S = 0.2, 10.0


class Progress:
    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._start_s = self._shown_s = 0.0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._total:
            self._show(last=True)
        elif self._terminal:
            print(file=sys.stderr)

    def begin(self) -> None:
        """Starts the clock; else the first `add` does."""
        self._start_s = self._shown_s = time.monotonic()

    def add(self, count: int = 1) -> None:
        if not self._start_s:
            self.begin()
        self._done += count
        now_s = time.monotonic()
        if now_s - self._shown_s >= (_TERMINAL_S if self._terminal else _LOG_S):
            self._shown_s = now_s
            self._show()

    def _show(self, last: bool = False) -> None:
        passed_s = max(time.monotonic() - (self._start_s or time.monotonic()), 1e-3)
        rate = self._done / passed_s
        left_s = (self._total - self._done) / rate if rate else float("inf")
        end = f"in {passed_s:.1f} s" if last else f"{left_s:.0f} s left" if rate else "starting"
        line = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f} a second, {end}"
        if self._terminal:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
