"""JSON Lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.jsonl import JsonLines
from jobs.sources.table import Table


def _rows(table: Table) -> list[GoodRow | BadRow]:
    return list(table.rows(workers=1))


def test_jsonl_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = '{"text": "a\\u2028b", "label": "x"}'
    file.write_bytes(
        b"\xef\xbb\xbf" + f"{good}\n\n[1]\n{{\n{'[' * 100_000}\n".encode() + b'{"text": "\xff"}\n' + good.encode()
    )
    rows = list(JsonLines(file).rows())
    assert [row.number for row in rows] == [1, 3, 4, 5, 6, 7]
    assert [row.reason for row in rows] == ["", "not an object", "not JSON", "not JSON", "not UTF-8", ""]
    assert rows[0].default_id == "rows-1"


def test_a_json_array_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('\n[{"text": "a"}]'.lstrip())
    with pytest.raises(SourceError, match="one JSON array"):
        list(JsonLines(file).rows())
