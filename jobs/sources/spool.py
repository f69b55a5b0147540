"""Rows put into a seeded order with little memory: they wait in one temporary file and are read back in that order.

A reader of shards shuffles within a window only, and users' files are often sorted by label.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from mmagent.record import Record


class Spool:
    def __init__(self, file: Path) -> None:
        self._path = file
        self._file = open(file, "w+b")  # noqa: SIM115 (closed by __exit__)
        self._places: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, record: Record) -> None:
        self._places.append(self._file.tell())
        pickle.dump(record, self._file, protocol=pickle.HIGHEST_PROTOCOL)

    def shuffled(self, seed: int) -> Iterator[Record]:
        """All the records, once."""
        places = self._places.copy()
        random.Random(seed).shuffle(places)
        for place in places:
            self._file.seek(place)
            record: Record = pickle.load(self._file)
            yield record
