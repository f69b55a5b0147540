"""Parallel text."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.choose import choose


def test_lines_belong_together(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_bytes(
        "\ufeffGuten Tag\r\n你好\n\n\xff\n".encode("utf-8", "surrogateescape")[:-3] + b"\xff\n"
    )
    (tmp_path / "a.en").write_text("Good day\nhello\nnothing\nno\n")
    source = choose(f"parallel:{tmp_path / 'a.de'},{tmp_path / 'a.en'}")
    rows = list(source.rows(1))
    good = [row.record for row in rows if isinstance(row, GoodRow)]
    assert [(record.messages[0].content, record.target.text, record.task) for record in good] == [
        ("Guten Tag", "Good day", "generate"), ("你好", "hello", "generate"),
    ]  # fmt: skip
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [(row.number, row.reason) for row in bad] == [(3, "empty line"), (4, "not UTF-8")]
    assert f"{tmp_path / 'a.de'} line 3 is empty" in bad[0].message


def test_files_of_unequal_length_stop(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n")
    (tmp_path / "b").write_text("1\n")
    with pytest.raises(SourceError, match=r"b ends after line 1, but the other file goes on"):
        choose(f"parallel:{tmp_path / 'a'},{tmp_path / 'b'}")
    with pytest.raises(SourceError, match="names one file, but two are wanted"):
        choose(f"parallel:{tmp_path / 'a'}")


def test_a_test_split_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "b", "ta", "tb"):
        (tmp_path / name).write_text(f"{name}\n")
    source = choose(f"parallel:{tmp_path / 'a'},{tmp_path / 'b'}", test=f"{tmp_path / 'ta'},{tmp_path / 'tb'}")
    found = [(row.record.split, row.record.target.text) for row in source.rows(1) if isinstance(row, GoodRow)]
    assert found == [(None, "b"), ("test", "tb")]
