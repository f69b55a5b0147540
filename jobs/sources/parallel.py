"""Parallel text: two files whose lines belong together, a text and its translation (or its summary, its answer)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jobs.sources import SourceError
from jobs.sources.readers import RawRow, digest


class Parallel:
    shuffled = False

    def __init__(self, source: Path, target: Path, prefix: str = "") -> None:
        self._files, self._prefix = (source, target), prefix

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        source, target = self._files
        number = 0
        with open(source, "rb") as asked, open(target, "rb") as answered:
            for number, (text, answer) in enumerate(zip_longest(asked, answered), 1):
                if text is None or answer is None:
                    shorter = source if text is None else target
                    raise SourceError(
                        f"{shorter} ends after line {number - 1}, but the other file goes on: "
                        f"line by line, {source} and {target} belong together"
                    )
                default_id = f"{self._prefix}{source.stem}-{number}"
                yield self._row(number, default_id, text, answer)

    def fingerprint(self) -> dict[str, Any]:
        return {str(file): digest(file) for file in self._files}

    def _row(self, number: int, default_id: str, text: bytes, answer: bytes) -> RawRow:
        source, target = self._files
        words = []
        for file, line in ((source, text), (target, answer)):
            try:
                words.append(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                told = ("not UTF-8", f"{file} line {number}: the bytes at {error.start} are not UTF-8")
                return RawRow(
                    str(source), number, default_id, None, None, line.decode(errors="backslashreplace"), *told
                )
        if not all(line.strip() for line in words):
            empty = target if words[0].strip() else source
            told = ("empty line", f"{empty} line {number} is empty")
            return RawRow(str(source), number, default_id, None, None, words, *told)
        values = {"text": words[0].strip(), "answer": words[1].strip(), "task": "generate"}
        return RawRow(str(source), number, default_id, values)
