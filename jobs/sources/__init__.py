"""Where records come from. A source yields its rows one after the other, good ones and bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from mmagent.record import Record


class SourceError(ValueError):
    """A source that cannot be prepared; the message names the file, the row and the column."""


@dataclass(frozen=True, slots=True)
class GoodRow:
    file: str
    number: int  # the row in its file, as an editor counts it
    record: Record


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is set aside."""

    file: str
    number: int
    id: str
    reason: str  # a few words, counted in dataset.json
    message: str  # what exactly was wrong
    raw: Any


class Source(Protocol):
    """A place that records come from."""

    @property
    def total(self) -> int:
        """How many rows there are, good and bad."""
        ...

    @property
    def splits(self) -> frozenset[str]:
        """The splits that the source itself names; the others are cut out of training."""
        ...

    @property
    def shuffled(self) -> bool:
        """Whether the rows come in a seeded order already."""
        ...

    def recipe(self) -> dict[str, Any]:
        """All that the rows depend on: a data set of the same recipe is the same data set."""
        ...

    def rows(self, workers: int) -> Iterator[GoodRow | BadRow]:
        """The rows, by `workers` processes."""
        ...
