"""CSV and its kin: a header, any delimiter, a byte order mark, line breaks in quotes."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.sources import SourceError
from jobs.sources.readers import RawRow, digest

_DELIMITERS = ",;\t|^~:#\x1f\x01"
_SNIFFED_BYTES = 1 << 18
_SNIFFED_ROWS = 50
# A cell of these that looks like JSON is JSON: one cell can hold several pictures.
_NESTED = frozenset({"messages", "images", "audios", "labels", "target", "texts", "spans", "candidates", "meta"})


class Delimited:
    shuffled = False

    def __init__(self, file: Path, prefix: str = "") -> None:
        self._file, self._prefix = file, prefix
        self._encoding = _encoding(file)
        self._delimiter = _delimiter(file, self._encoding)
        self._spaced = _spaced(file, self._encoding, self._delimiter)

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        name, root = str(self._file), self._file.parent
        csv.field_size_limit(2**31 - 1)  # base64 in a cell
        with open(self._file, encoding=self._encoding, errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream, delimiter=self._delimiter, strict=True, skipinitialspace=self._spaced)
            header = self._header(reader)
            number = 1
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    if "unexpected end of data" in str(error):
                        raise SourceError(
                            f"{name}: a quote that opens in the row of line {line} is never closed, so every row after "
                            "it is lost; close it, or double the quotes within a cell"
                        ) from error
                    number += 1
                    yield self._bad(number, root, "", "not CSV", f"line {line}: {error}")
                    continue
                if not cells:
                    continue
                number += 1
                raw = self._delimiter.join(cells)
                if not raw.isascii() and any("\udc80" <= letter <= "\udcff" for letter in raw):
                    shown = raw.encode(errors="surrogateescape").decode(errors="backslashreplace")
                    what = f"line {line} holds bytes that are not UTF-8; save the file as UTF-8 (Excel: CSV UTF-8)"
                    yield self._bad(number, root, shown, "not UTF-8", what)
                elif len(cells) != len(header):
                    what = f"line {line} has {len(cells)} cells, but the header has {len(header)}"
                    yield self._bad(number, root, raw, "wrong number of cells", what)
                else:
                    yield self._row(number, root, dict(zip(header, cells, strict=True)))

    def fingerprint(self) -> dict[str, Any]:
        return {self._file.name: digest(self._file)}

    def _header(self, reader: Any) -> list[str]:
        try:
            header = [cell.strip() for cell in next(reader)]
        except StopIteration as error:
            raise SourceError(f"{self._file} is empty, but a header row is wanted") from error
        except csv.Error as error:
            raise SourceError(f"{self._file}: the header row is not CSV: {error}") from error
        twice = [name for name, count in Counter(filter(None, header)).items() if count > 1]
        if twice:
            raise SourceError(f"{self._file}: the header has the column {twice[0]!r} twice: {', '.join(header)}")
        return header

    def _row(self, number: int, root: Path, values: dict[str, Any]) -> RawRow:
        for column in _NESTED & values.keys():
            cell = values[column].strip()
            if cell.startswith(("[", "{")):
                try:
                    values[column] = json.loads(cell)
                except (ValueError, RecursionError) as error:
                    return self._bad(number, root, values, "not JSON", f"the cell of {column} is not JSON: {error}")
        return RawRow(str(self._file), number, self._default_id(number), values, root)

    def _bad(self, number: int, root: Path, raw: Any, reason: str, message: str) -> RawRow:
        return RawRow(str(self._file), number, self._default_id(number), None, root, raw, reason, message)

    def _default_id(self, number: int) -> str:
        return f"{self._prefix}{self._file.stem}-{number}"


def _encoding(file: Path) -> str:
    with open(file, "rb") as stream:
        start = stream.read(2)
    return "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _spaced(file: Path, encoding: str, delimiter: str) -> bool:
    """Whether a space stands behind every delimiter of the header, as in ``text, label``: it is no part of a cell then.
    Elsewhere a cell may begin with one, and spans count it."""
    with open(file, encoding=encoding, errors="surrogateescape", newline="") as stream:
        cells = stream.readline().rstrip("\r\n").split(delimiter)
    return len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])


def _delimiter(file: Path, encoding: str) -> str:
    """The delimiter with which most of the first rows have as many cells as the header, and the most cells."""
    with open(file, encoding=encoding, errors="surrogateescape", newline="") as stream:
        sample = stream.read(_SNIFFED_BYTES)
    best, best_score = ",", (0.0, 0)
    for delimiter in _DELIMITERS:
        rows: list[list[str]] = []
        try:
            for row in csv.reader(io.StringIO(sample), delimiter=delimiter):
                rows.append(row)
                if len(rows) >= _SNIFFED_ROWS:
                    break
        except csv.Error:
            pass  # a row that is longer than the sample: judged by those before it
        rows = [row for row in rows if row]
        if not rows or len(rows[0]) < 2:
            continue
        alike = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        if (round(alike, 1), len(rows[0])) > best_score:
            best, best_score = delimiter, (round(alike, 1), len(rows[0]))
    return best
