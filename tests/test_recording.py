"""A stream that runs share: read once, kept, and read on by whoever needs more."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest

from jobs.recording import Recording


class Source:
    """Steps whose rows say their number, and how many were taken."""

    def __init__(self, count: int) -> None:
        self.taken, self._count = 0, count

    def __iter__(self) -> Iterator[pa.Table]:
        for number in range(self._count):
            self.taken += 1
            yield pa.table({"number": [number], "bytes": [bytes(1000)]})


def numbers(tables: Iterator[pa.Table], count: int | None = None) -> list[int]:
    found = []
    for table in tables:
        found += table["number"].to_pylist()
        if len(found) == count:
            break
    return found


def test_a_second_run_finds_what_the_first_read_and_reads_on() -> None:
    source = Source(10)
    recording = Recording(iter(source), first=0)
    assert numbers(recording.read(0), 4) == [0, 1, 2, 3]
    assert source.taken == 4
    assert numbers(recording.read(0), 2) == [0, 1]
    assert source.taken == 4
    assert recording.holds(4)
    assert not recording.holds(5)
    assert numbers(recording.read(2)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert numbers(recording.read(0)) == list(range(10))
    assert source.taken == 10


def test_steps_are_counted_from_where_the_stream_began() -> None:
    recording = Recording(iter(Source(5)), first=100)
    assert recording.holds(100)
    assert not recording.holds(0)
    assert not recording.holds(101)
    assert numbers(recording.read(100), 2) == [0, 1]
    assert numbers(recording.read(101)) == [1, 2, 3, 4]


def test_what_grows_too_large_is_read_to_its_end_but_not_kept() -> None:
    recording = Recording(iter(Source(10)), first=0, max_bytes=4000)
    reading = recording.read(0)
    assert numbers(reading, 2) == [0, 1]
    assert recording.holds(1)
    assert numbers(reading) == list(range(2, 10))
    assert not recording.holds(0)
    with pytest.raises(RuntimeError, match="step 3 of the stream is gone"):
        next(recording.read(3))


def test_a_reader_that_is_late_takes_nothing_from_the_next() -> None:
    recording = Recording(iter(Source(400)), first=0)
    found: list[list[int]] = []
    readers = [threading.Thread(target=lambda: found.append(numbers(recording.read(0)))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [list(range(400))] * 4


def test_closed_it_ends_its_readers() -> None:
    source = Source(10)
    recording = Recording(iter(source), first=0)
    reading = recording.read(0)
    assert numbers(reading, 1) == [0]
    recording.close()
    assert numbers(reading) == []
    assert not recording.holds(0)
    assert source.taken == 1
