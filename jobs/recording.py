"""What one rank has read of a stream, kept in a file of its own, so that the runs of a lane which read the same steps
share one reading: each finds what those before it read, and reads on where they stopped.

Ray Data's streams begin anew for whoever opens one, with processes and tasks of their own; and one that is left in the
middle may end late, under the hands of the next.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from collections.abc import Iterator

import pyarrow as pa

_MAX_BYTES = 1 << 30  # on the worker's disk; a longer stream is read anew by each run


class Recording:
    """Args:
    steps: the rows of one rank, a table for each optimizer step.
    first: the number of the first of these steps.
    max_bytes: of the file.
    """

    def __init__(self, steps: Iterator[pa.Table], first: int, max_bytes: int = _MAX_BYTES) -> None:
        self._steps, self._first, self._max_bytes = steps, first, max_bytes
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the recording
        self._ends = [0]  # of each step kept, in bytes
        self._count = 0  # of the steps that have been read
        self._full = False  # nothing is kept any more
        self._lock = threading.Lock()  # a run that was stopped may still be reading when the next begins

    def holds(self, step: int) -> bool:
        """Whether a reading can begin at a step, from what was kept."""
        return not self._full and self._first <= step < self._first + len(self._ends)

    def read(self, step: int) -> Iterator[pa.Table]:
        """The steps from one on, to the end of the stream.

        Raises:
            RuntimeError: another reading took a step that could not be kept.
        """
        for number in itertools.count(step - self._first):
            if (table := self._step(number)) is None:
                return
            yield table

    def close(self) -> None:
        """Gives back the file and the stream."""
        with self._lock:
            self._full, self._steps = True, iter(())
            self._file.close()

    def _step(self, number: int) -> pa.Table | None:
        with self._lock:
            if number < self._count:
                if self._full:
                    raise RuntimeError(f"step {self._first + number} of the stream is gone: two runs read it at once")
                return self._kept(number)
            if (table := next(self._steps, None)) is not None:
                self._count += 1
                self._keep(table)
            return table

    def _kept(self, number: int) -> pa.Table:
        start, end = self._ends[number : number + 2]
        return pa.ipc.open_stream(os.pread(self._file.fileno(), end - start, start)).read_all()

    def _keep(self, table: pa.Table) -> None:
        if self._full:
            return
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        if self._ends[-1] + data.size > self._max_bytes:
            self._full = True
            self._file.truncate(0)
            return
        self._file.write(data)
        self._file.flush()
        self._ends.append(self._ends[-1] + data.size)
