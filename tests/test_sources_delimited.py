"""CSV and its kin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.delimited import Delimited
from jobs.sources.readers import Reader
from jobs.sources.table import Table


def _values(reader: Reader) -> list[dict[str, Any]]:
    return [dict(row.values) for row in reader.rows() if row.values is not None]


def _rows(table: Table) -> list[GoodRow | BadRow]:
    return list(table.rows(workers=1))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^", "\x1f"])
def test_csv_of_any_delimiter(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / "rows.csv"
    rows = [["text", "label"], [f'said "{delimiter}" twice\nand on, and; on', "a"], ["plain", "b"]]
    quoted = "\r\n".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    file.write_bytes(b"\xef\xbb\xbf" + quoted.encode())
    assert _values(Delimited(file)) == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def test_csv_of_one_column_and_of_excel(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\nhello, you\n\nyou\n")
    assert [row.reason for row in Delimited(file).rows()] == ["wrong number of cells", ""]
    file.write_text("text\tlabel\nschön\tja\n", encoding="utf-16")
    assert _values(Delimited(file)) == [{"text": "schön", "label": "ja"}]


def test_a_space_behind_every_delimiter_of_the_header_is_none_of_a_cells(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('label, text\npos, "hello, you"\nneg,  two\n')
    assert _values(Delimited(file)) == [{"label": "pos", "text": "hello, you"}, {"label": "neg", "text": "two"}]
    file.write_text("text,label\n two,neg\n")  # spans count it
    assert _values(Delimited(file)) == [{"text": " two", "label": "neg"}]


def test_bad_csv_rows_cost_themselves(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'text,label\nok,a\ncaf\xe9,a\none,two,three\n"x"y,a\nlast,b\n')
    rows = list(Delimited(file).rows())
    assert [row.reason for row in rows] == ["", "not UTF-8", "wrong number of cells", "not CSV", ""]
    assert [row.number for row in rows] == [2, 3, 4, 5, 6]  # as an editor counts: 1 is the header
    assert rows[1].raw == "caf\\xe9,a"


def test_a_quote_that_is_never_closed_stops(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('text,label\nok,a\n"open,b\nlost,c\n')
    with pytest.raises(SourceError, match="line 3 is never closed"):
        list(Delimited(file).rows())


def test_headers_of_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label,text\n")
    with pytest.raises(SourceError, match="column 'text' twice"):
        list(Delimited(file).rows())
    file.write_text("")
    with pytest.raises(SourceError, match="is empty"):
        list(Delimited(file).rows())


def test_a_csv_cell_may_hold_json(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(make_png())
    file = tmp_path / "rows.csv"
    file.write_text('text;images;label\nwhich?;"[""a.png"", ""a.png""]";x\nwhich?;[a.png;y\n')
    good, bad = _rows(Table(Delimited(file)))
    assert isinstance(good, GoodRow)
    assert len(good.record.images) == 2
    assert isinstance(bad, BadRow)
    assert bad.reason == "not JSON"


def test_answers_of_every_task_in_cells(tmp_path: Path) -> None:
    """JSON in a cell, also under another name; words between marks; an empty cell."""
    file = tmp_path / "rows.csv"
    spans = '[{""start"": 0, ""end"": 3, ""label"": ""PER""}]'
    file.write_text(f'text,entities,topics,options\nAnn,"{spans}",a|b,"[""x"", ""y""]"\nBo,,,\n')
    tagged = _rows(Table(Delimited(file), columns={"spans": "entities"}))
    assert [row.record.target.spans for row in tagged if isinstance(row, GoodRow)] == [
        ({"start": 0, "end": 3, "label": "PER"},), (),
    ]  # fmt: skip
    topics = _rows(Table(Delimited(file), columns={"labels": "topics"}))
    assert [row.record.target.labels for row in topics if isinstance(row, GoodRow)] == [("a", "b"), ()]
    matched = _rows(Table(Delimited(file), columns={"candidates": "options", "label": "topics"}))
    assert [row.reason for row in matched if isinstance(row, BadRow)] == ["label cannot be read", "no candidates"]
