"""Answers kept as Parquet: their columns, what gives them in the actors of a cluster, and what they come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmagent import storage
from mmagent.answer import Answer
from mmagent.batch import PartError
from mmagent.predictor import Predictor
from mmagent.record import Record

_span = pa.struct(
    [
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("label", pa.string()),
        ("text", pa.string()),
        ("confidence", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("label", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("value", pa.float64()),
        ("text", pa.string()),
        ("spans", pa.list_(_span)),
        ("confidence", pa.float64()),
        ("abstained", pa.bool_()),
        ("error", pa.string()),  # why there is no answer; null where there is one
        ("bundle", pa.string()),
    ]
)
_REASONS = 20  # that a summary names


class Answering:
    """Called with a table of record rows, gives a table of `SCHEMA` with a row for each of them.

    Args:
        bundle: a folder.
        task: what every row is asked; none: each row's own task.
        threads: CPU threads of this process.
    """

    def __init__(self, bundle: str, task: str | None, threads: int) -> None:
        self._predictor = Predictor.load(bundle, threads=threads)
        self._task = task

    def __call__(self, table: pa.Table) -> pa.Table:
        records = [Record.from_row(row) for row in table.to_pylist()]
        records = [replace(record, task=self._task or record.task) for record in records]
        given = iter(self._predictor.attempt([record for record in records if record.modalities != "empty"]))
        rows = [
            _row(record, "there is no text, picture or sound" if record.modalities == "empty" else next(given))
            for record in records
        ]
        return pa.Table.from_pylist([row | {"bundle": self._predictor.name} for row in rows], SCHEMA)


def unreadable(rows: Iterable[tuple[str, str]], task: str, bundle: str) -> pa.Table:
    """Rows that never became records: (id, why)."""
    made = [{"id": id, "task": task, "error": error, "bundle": bundle} for id, error in rows]
    return pa.Table.from_pylist(made, SCHEMA)


def summary(files: Iterable[Path]) -> dict[str, Any]:
    """Counts over the parts of a whole prediction."""
    rows = parts = abstained = 0
    tasks: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for file in files:
        table = pq.read_table(storage.source(file), columns=["task", "abstained", "error"])
        rows, parts = rows + len(table), parts + 1
        abstained += sum(map(bool, table["abstained"].to_pylist()))
        tasks.update(table["task"].to_pylist())
        errors.update(error for error in table["error"].to_pylist() if error is not None)
    return {
        "rows": rows,
        "parts": parts,
        "answered": rows - errors.total(),
        "abstained": abstained,
        "tasks": dict(sorted(tasks.items())),
        "errors": {"rows": errors.total(), "reasons": dict(errors.most_common(_REASONS))},
    }


def _row(record: Record, answer: Answer | PartError | str) -> dict[str, Any]:
    row = {"id": record.id, "task": record.task}
    if not isinstance(answer, Answer):
        return row | {"error": str(answer)}
    given = answer.to_dict()
    return row | {name: given.get(name) for name in SCHEMA.names if name not in ("id", "task", "error", "bundle")}
