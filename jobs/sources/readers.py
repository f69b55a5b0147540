"""How a source's own files are read: a row at a time, never all in memory. `jobs.sources.table` makes records of them.

A reader yields `RawRow`: the columns as the file has them, or why the row cannot be read. In `light` mode the media
may be left out (None): enough to count rows and to see ids and splits before work begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jobs.sources import SourceError
from mmagent import storage

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True, slots=True)
class RawRow:
    file: str
    number: int  # as an editor counts rows: the first line is 1, also where it is a header
    default_id: str
    values: Mapping[str, Any] | None  # None: cannot be read, and `raw` holds what is there
    root: Path | None = None  # paths of media are relative to it
    raw: Any = None
    reason: str = ""
    message: str = ""


class Reader(Protocol):
    shuffled: bool  # the rows come in a seeded order already

    def rows(self, light: bool = False) -> Iterator[RawRow]: ...

    def fingerprint(self) -> dict[str, Any]:
        """The files by name, with what changes when they change."""
        ...


def find(path: str) -> Path:
    """The place that a command names.

    Raises:
        SourceError: nothing is there.
    """
    place = storage.resolve(path)
    if not place.exists():
        here = Path(path).expanduser().absolute()
        hint = f"; did you mean {here}?" if here.exists() and here != place else ""
        if not Path(path).expanduser().is_absolute():
            hint += " (a relative path is below the storage root)"
        raise SourceError(f"{place} does not exist{hint}")
    return place


def digest(file: Path) -> dict[str, Any]:
    """A file's size and hash, as a fingerprint has them."""
    with open(file, "rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
