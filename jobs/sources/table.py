"""Rows of files made records: columns renamed, media read, checked by header and decoded once, bad rows set aside.

Two passes: a light one sees columns, ids and splits, so that what would stop the command stops it before the work; the
second one makes the records, in worker processes, with a few chunks in memory.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from jobs import pool
from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.examination import FIELDS, Shape, examine, id_of, renamed
from jobs.sources.readers import SPLITS, RawRow, Reader
from mmagent import media, rows

_CHUNK_ROWS = 16
_GUESS_ROWS = 256  # rows looked at to see which task they are for, where neither they nor the command name it
_ANSWERS = ("label", "labels", "value", "spans", "tags", "answer", "answers", "texts", "target")


class Table:
    """A source of one reader, and perhaps another that is the test split."""

    def __init__(
        self,
        main: Reader,
        test: Reader | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        group_by: str | None = None,
        task: str | None = None,
        asked: str | None = None,
        limits: media.Limits | None = None,
    ) -> None:
        """
        Args:
            columns: field -> the column that holds it.
            task: of every row; none: each row's own, else what the answers of the first rows are of.
            asked: rows need no right answer; those that name no task are of this one.

        Raises:
            SourceError: a column that is not there, two rows with one id, no rows, or two test splits.
        """
        self._columns = dict(columns or {})
        _check_fields(self._columns)
        self._main, self._test, self._group_by = main, test, group_by
        self._answered = asked is None
        self._ids: dict[str, tuple[str, int]] = {}
        self._total = 0
        named = self._survey(main)
        if test is not None:
            if "test" in named:
                raise SourceError("the source has rows with split=test already: leave out --test, or those rows")
            self._survey(test)
        self._ids.clear()
        self.splits = frozenset(named | ({"test"} if test is not None else set()))
        guessed = asked or (self._guess() if task is None else None)
        self._shape = Shape(
            self._columns, group_by, task, guessed, bool(named), limits or media.Limits(), self._answered
        )

    @property
    def total(self) -> int:
        return self._total

    @property
    def shuffled(self) -> bool:
        return self._main.shuffled

    def recipe(self) -> dict[str, Any]:
        return {"files": self._main.fingerprint(), "test_files": self._test.fingerprint() if self._test else {}}

    def rows(self, workers: int) -> Iterator[GoodRow | BadRow]:
        all_rows = self._with_split()
        chunks = iter(lambda: list(islice(all_rows, _CHUNK_ROWS)), [])
        workers = workers if self._total > _CHUNK_ROWS * workers else 1
        try:
            for rows in pool.ordered(partial(examine, self._shape), chunks, workers):
                yield from rows
        except pool.PoolError as error:
            raise SourceError(str(error)) from error

    def _with_split(self) -> Iterator[tuple[RawRow, str | None]]:
        yield from ((row, None) for row in self._main.rows())
        if self._test is not None:
            yield from ((row, "test") for row in self._test.rows())

    def _survey(self, reader: Reader) -> set[str]:
        """The light pass over a reader: counts rows, checks columns and ids; returns the splits it names."""
        columns: dict[str, None] = {}
        splits: set[str] = set()
        file, rows = "", 0
        for row in reader.rows(light=True):
            file, rows = row.file, rows + 1
            if row.values is None:
                continue
            columns |= dict.fromkeys(row.values)
            values = renamed(row.values, self._columns)
            splits.add(SPLITS.get(str(values.get("split") or "").strip().lower(), ""))
            id = id_of(values, row)
            if id in self._ids:
                other_file, other = self._ids[id]
                raise SourceError(
                    f"two rows have the id {id!r}: {other_file} row {other} and {row.file} row {row.number}; "
                    "ids must differ (or leave out the column: rows get ids of their own)"
                )
            self._ids[id] = (row.file, row.number)
        if not rows:
            raise SourceError(f"{file or 'the source'} has no rows: {', '.join(reader.fingerprint())}")
        if columns:
            self._check_columns(file, list(columns))
        self._total += rows
        return splits - {""}

    def _check_columns(self, file: str, present: list[str]) -> None:
        for field, column in self._columns.items():
            if column not in present:
                raise SourceError(_no_column(file, column, present, f"--map {field}={column}"))
        if self._group_by is not None and self._group_by not in present:
            raise SourceError(_no_column(file, self._group_by, present, "--group-by"))
        fields = list(renamed(dict.fromkeys(present), self._columns))
        if self._answered and not set(_ANSWERS) & set(fields):
            what = _no_column(file, "label", present, "the right answer: one of " + ", ".join(_ANSWERS))
            raise SourceError(f"{what}; name it with --map label=COLUMN, or labels, value, spans, answer")
        if not set(rows.INPUTS) & set(fields):
            what = _no_column(file, "text", present, "what is asked: one of " + ", ".join(rows.INPUTS))
            raise SourceError(f"{what}; name it with --map text=COLUMN,image=COLUMN,audio=COLUMN")

    def _guess(self) -> str | None:
        """The task that most of the first rows' answers are of, among rows that name none."""
        readable = (renamed(row.values, self._columns) for row in self._main.rows() if row.values is not None)
        first = (rows.guess(values) for values in islice(readable, _GUESS_ROWS) if not values.get("task"))
        found = Counter(task for task in first if task is not None).most_common(1)
        return found[0][0] if found else None


def _check_fields(columns: Mapping[str, str]) -> None:
    for field in columns:
        if field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.0)[0]
            raise SourceError(
                f"--map: {field!r} is no field of a record: did you mean {near!r}? Fields: {', '.join(FIELDS)}"
            )


def _no_column(file: str, column: str, present: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(column, present, n=1, cutoff=0.0)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    return f"{file} has no column {column!r} ({what}); it has {', '.join(present)}{nearest}"
