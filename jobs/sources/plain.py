"""Plain text without labels: a paragraph of a ``.txt`` file a row, with a blank line between two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.sources.readers import RawRow, digests, files_of, split_of

_MOST_CHARACTERS = 1 << 20  # of one row: a file without blank lines is cut at the end of a line


class Plain:
    shuffled = False

    def __init__(self, place: Path, prefix: str = "") -> None:
        self._place, self._prefix = place, prefix
        self._files = files_of(place, (".txt", ".text", ".md"))

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        for file in self._files:
            split = split_of(file, self._place)
            named = {"split": split} if split else {}
            for number, words in _paragraphs(file):
                default_id = f"{self._prefix}{file.stem}-{number}"
                bad = "�" in words
                yield RawRow(
                    str(file), number, default_id, None if bad else {"text": words, **named}, file.parent,
                    words if bad else None, "not UTF-8" if bad else "", "its bytes are not UTF-8" if bad else "",
                )  # fmt: skip

    def fingerprint(self) -> dict[str, Any]:
        return digests(self._files, self._place)


def _paragraphs(file: Path) -> Iterator[tuple[int, str]]:
    """The number of its first line, and its words, of each paragraph."""
    first, size, lines = 0, 0, []
    with open(file, encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            words = line.strip()
            if words:
                first = first or number
                lines.append(words)
                size += len(words)
            if lines and (not words or size > _MOST_CHARACTERS):
                yield first, " ".join(lines)
                first, size, lines = 0, 0, []
    if lines:
        yield first, " ".join(lines)
