"""Folders of labels: pictures, sounds and texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.folder import Folder
from jobs.sources.table import Table


def _rows(table: Table) -> list[GoodRow | BadRow]:
    return list(table.rows(workers=1))


def test_folder_of_labels(tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label / "more").mkdir(parents=True)
        (tmp_path / "pets" / label / "1.PNG").write_bytes(make_png())
        (tmp_path / "pets" / label / "more" / "2.wav").write_bytes(make_wav())
        (tmp_path / "pets" / label / ".DS_Store").write_bytes(b"x")
    (tmp_path / "pets" / "cat" / "notes.docx").write_bytes(b"x")
    rows = _rows(Table(Folder(tmp_path / "pets", seed=0)))
    found = sorted(
        (row.record.id, row.record.target.label, row.record.modalities) for row in rows if isinstance(row, GoodRow)
    )
    assert found == [
        ("cat/1.PNG", "cat", "image"), ("cat/more/2.wav", "cat", "audio"),
        ("dog/1.PNG", "dog", "image"), ("dog/more/2.wav", "dog", "audio"),
    ]  # fmt: skip
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["unknown kind of file"]


def test_folder_with_splits(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    for split in ("train", "test"):
        (tmp_path / "set" / split / "cat").mkdir(parents=True)
        (tmp_path / "set" / split / "cat" / "1.png").write_bytes(make_png())
    table = Table(Folder(tmp_path / "set", seed=0))
    assert table.splits == {"train", "test"}
    assert {row.record.split for row in _rows(table) if isinstance(row, GoodRow)} == {"train", "test"}
    with pytest.raises(SourceError, match="LABEL/FILE"):
        Folder(tmp_path / "set" / "train" / "cat", seed=0)
