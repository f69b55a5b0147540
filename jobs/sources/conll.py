"""CoNLL columns: a word and its tag a line, a blank line between sentences; the first column is the word, the last one
its tag (B-I-O, BIOES, BILOU or IO). A sentence is a row: its words joined by a space, its entities as spans.

A folder's files are read in the order of their names; ``train.txt``, ``dev.conll`` or ``test.tsv`` name their split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.sources import SourceError
from jobs.sources.readers import RawRow, digests, files_of, split_of
from mmagent import spans

_KINDS = (".conll", ".txt", ".tsv", ".bio", ".iob", ".iob2", ".bioes", ".train", ".dev", ".test", ".testa", ".testb")
_DOCUMENT = "-DOCSTART-"
_NO_WORDS = re.compile(r"[\t ]*")


class Conll:
    shuffled = False

    def __init__(self, place: Path, prefix: str = "") -> None:
        self._place, self._prefix = place, prefix
        self._files = files_of(place, _KINDS)

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        for file in self._files:
            yield from self._rows_of(file)

    def fingerprint(self) -> dict[str, Any]:
        return digests(self._files, self._place)

    def _rows_of(self, file: Path) -> Iterator[RawRow]:
        split = split_of(file, self._place)
        inner = file.stem if self._place.is_file() else file.relative_to(self._place).as_posix()
        for first, lines in _sentences(file):
            default_id = f"{self._prefix}{inner}-{first}"
            raw = "\n".join(lines)
            if not raw.isascii() and any("\udc80" <= letter <= "\udcff" for letter in raw):
                raw = raw.encode(errors="surrogateescape").decode(errors="backslashreplace")
                told = ("not UTF-8", f"the sentence from line {first} on holds bytes that are not UTF-8")
                yield RawRow(str(file), first, default_id, None, None, raw, *told)
                continue
            cells = [_cells(line) for line in lines]
            short = next((number for number, each in enumerate(cells, first) if len(each) < 2 or not each[0]), None)
            if short is not None:
                wanted = "a word and its tag are wanted, with white space between them"
                told = ("no word and tag", f"line {short} is {lines[short - first]!r:.80}, but {wanted}")
                yield RawRow(str(file), first, default_id, None, None, raw, *told)
                continue
            text, found = spans.of_tags([each[0] for each in cells], [each[-1] for each in cells])
            values: dict[str, Any] = {"text": text, "spans": found}
            yield RawRow(str(file), first, default_id, values if split is None else values | {"split": split})


def _sentences(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Each sentence's first line number and its lines, without comments and document marks."""
    lines: list[str] = []
    first = 0
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
        try:
            for number, line in enumerate(stream, 1):
                line = line.rstrip("\r\n")
                if _NO_WORDS.fullmatch(line) or line.startswith(_DOCUMENT):
                    if lines:
                        yield first, lines
                    lines = []
                elif not lines and _is_comment(line):
                    continue
                else:
                    first = first if lines else number
                    lines.append(line)
        except OSError as error:
            raise SourceError(f"cannot read {file}: {error.strerror or error}") from error
    if lines:
        yield first, lines


def _cells(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]


def _is_comment(line: str) -> bool:
    """``# id 17`` above a sentence, but not a sentence that begins with the word #."""
    cells = _cells(line)
    return line.startswith("# ") and not (len(cells) > 1 and spans.is_tag(cells[-1]) and len(cells) <= 4)
