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


def test_a_folder_beside_those_of_splits_is_no_label(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    for inner in ("train/cat", "test/cat", "__MACOSX/cat"):
        (tmp_path / inner).mkdir(parents=True)
        (tmp_path / inner / "1.jfif").write_bytes(make_png(format="JPEG"))
    rows = _rows(Table(Folder(tmp_path, seed=0)))
    assert sorted(row.record.split or "" for row in rows if isinstance(row, GoodRow)) == ["test", "train"]
    (tmp_path / "unlabeled").mkdir()
    with pytest.raises(SourceError, match="test, train, which name splits, beside unlabeled"):
        Folder(tmp_path, seed=0)
    (tmp_path / "train").rename(tmp_path / "tram")  # labels, of which one is called as a split is
    Folder(tmp_path, seed=0)


def test_folder_of_sounds_at_8_khz_and_of_texts(tmp_path: Path, make_wav: Callable[..., bytes]) -> None:
    sound = make_wav(rate_hz=8000)
    for split in ("train", "dev", "test"):
        (tmp_path / "digits" / split / "seven").mkdir(parents=True)
        (tmp_path / "digits" / split / "seven" / "7_jackson_0.wav").write_bytes(sound)
        (tmp_path / "films" / split / "pos").mkdir(parents=True)
        (tmp_path / "films" / split / "pos" / "0_9.txt").write_text("\ufeffschön, <image>!")
    digits = [row.record for row in _rows(Table(Folder(tmp_path / "digits", seed=0))) if isinstance(row, GoodRow)]
    assert {record.split for record in digits} == {"train", "validation", "test"}
    assert {(record.target.label, record.modalities, record.audios[0].bytes) for record in digits} == {
        ("seven", "audio", sound)
    }
    (tmp_path / "films" / "train" / "pos" / "1.txt").write_bytes(b"\xff")
    (tmp_path / "films" / "train" / "pos" / "2.txt").write_bytes(b"")
    films = _rows(Table(Folder(tmp_path / "films", seed=0)))
    assert {next(row.record.segments()) for row in films if isinstance(row, GoodRow)} == {("text", "schön, <image>!")}
    assert sorted(row.reason for row in films if isinstance(row, BadRow)) == ["empty text", "not UTF-8"]
