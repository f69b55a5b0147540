"""Rows that are set aside: kept with their reason, counted, and limited in number."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any, Self

from jobs.sources import BadRow, SourceError

FILE = "quarantine/rows.jsonl"
_SHOWN = 5


class Quarantine:
    """Writes FOLDER/quarantine/rows.jsonl, a JSON object a row. Stops when `max_share` of `total` rows are bad."""

    def __init__(self, folder: Path, *, total: int, max_share: float) -> None:
        self._path = folder / FILE
        self._total, self._max_share = total, max_share
        self._reasons: Counter[str] = Counter()
        self._examples: list[str] = []
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: BadRow) -> None:
        """Raises SourceError as soon as there are too many."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115
        entry = {"file": row.file, "row": row.number, "id": row.id, "reason": row.reason, "message": row.message}
        self._file.write(json.dumps(entry | {"raw": row.raw}, ensure_ascii=True, default=_plain) + "\n")
        self._reasons[row.reason] += 1
        if len(self._examples) < _SHOWN:
            self._examples.append(f"  {row.file} row {row.number} (id {row.id}): {row.message}")
        bad = self._reasons.total()
        if bad > self._max_share * self._total:
            were = "row was" if bad == 1 else "rows were"
            raise SourceError(
                f"{bad} {were} set aside so far, more than the share {self._max_share:g} of all {self._total} rows "
                f"that --max-bad-share allows; nothing was published. Reasons so far: {self.summary()}. "
                "The first of them:\n" + "\n".join(self._examples)
            )

    def summary(self) -> str:
        return ", ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common())

    def to_dict(self) -> dict[str, Any]:
        rows = self._reasons.total()
        return {"rows": rows, "reasons": dict(sorted(self._reasons.items())), "file": FILE if rows else None}


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    return str(value)
