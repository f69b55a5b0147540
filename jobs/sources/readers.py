"""How a source's own files are read: a row at a time, never all in memory. `jobs.sources.table` makes records of them.

A reader yields `RawRow`: the columns as the file has them, or why the row cannot be read. In `light` mode the media
may be left out (None): enough to count rows and to see ids and splits before work begins.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
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
    return {"bytes": file.stat().st_size, "sha256": storage.digest(file)}


def split_of(file: Path, place: Path) -> str | None:
    """The split that a file's name, or else its folder's, speaks of: ``train-00000-of-00002.parquet``, ``test/1.tar``.
    None where the source is that one file."""
    if file == place:
        return None
    folder = file.parent.name if file.parent != place else ""
    words = [*re.findall("[a-z]+", file.name.lower()), *re.findall("[a-z]+", folder.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def files_of(place: Path, kinds: tuple[str, ...]) -> list[Path]:
    """The file itself, or a folder's files with names that end so, in the order of their names.

    Raises:
        SourceError: there is none.
    """
    if place.is_file():
        return [place]
    found = sorted(file for file in place.rglob("[!.]*") if file.is_file() and file.name.lower().endswith(kinds))
    if not found:
        raise SourceError(f"{place} has no files that end in {', '.join(kinds)}")
    return found


def digests(files: Iterable[Path], place: Path) -> dict[str, Any]:
    """The fingerprint of a source of several files."""
    return {str(file.relative_to(place.parent)): digest(file) for file in files}


def outlines(files: Iterable[Path], place: Path) -> dict[str, Any]:
    """The fingerprint of very many or very large files: their number, and a hash of their names, sizes and times."""
    total, count = hashlib.sha256(), 0
    for file in sorted(files):
        count += 1
        about = file.stat()
        total.update(f"{file.relative_to(place)}/{about.st_size}/{about.st_mtime_ns}\n".encode())
    return {place.name: {"files": count, "sha256": total.hexdigest()}}
