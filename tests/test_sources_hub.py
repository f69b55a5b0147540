"""Data sets of Hugging Face datasets, made and read by the library itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.sources import GoodRow, SourceError
from jobs.sources.choose import choose
from mmagent.record import Record

datasets: Any = pytest.importorskip("datasets", reason="an optional extra: mmagent[hub]")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def _records(source: str, **options: Any) -> list[Record]:
    return [row.record for row in choose(source, **options).rows(1) if isinstance(row, GoodRow)]


def test_what_save_to_disk_made(tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]) -> None:
    columns = {
        "image": [{"bytes": make_png(), "path": None}] * 4,
        "audio": [{"bytes": make_wav(rate_hz=8000), "path": None}] * 4,
        "label": [0, 1, 1, 0],
    }
    made = datasets.Dataset.from_dict(columns)
    for column, feature in (
        ("image", datasets.Image()), ("audio", datasets.Audio()), ("label", datasets.ClassLabel(names=["cat", "dog"])),
    ):  # fmt: skip
        made = made.cast_column(column, feature)
    made.save_to_disk(tmp_path / "one")
    records = _records(f"hf:{tmp_path / 'one'}")
    assert [record.target.label for record in records] == ["cat", "dog", "dog", "cat"]
    assert {record.images[0].bytes for record in records} == {make_png()}
    assert {record.audios[0].bytes for record in records} == {make_wav(rate_hz=8000)}
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    source = choose(f"hf:{tmp_path / 'two'}")
    assert source.total == 8
    assert source.splits == {"train", "test"}


def test_tags_as_numbers_become_spans(tmp_path: Path) -> None:
    names = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": names})
    columns = {"tokens": [["Ann", "Lee", "left"]], "ner_tags": [[1, 2, 0]]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "d")
    (record,) = _records(f"hf:{tmp_path / 'd'}", columns={"tags": "ner_tags"})
    assert (record.task, record.messages[0].content) == ("tag", "Ann Lee left")
    assert record.target.spans == ({"start": 0, "end": 7, "label": "PER"},)


def test_a_folder_that_load_dataset_knows(
    tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            (tmp_path / "pets" / split / label / "1.png").write_bytes(make_png())
            (tmp_path / "calls" / split / label).mkdir(parents=True)
            (tmp_path / "calls" / split / label / "1.wav").write_bytes(make_wav(rate_hz=8000))
    (record, *_) = _records(f"hf:{tmp_path / 'calls'}")
    assert (record.target.label, record.audios[0].bytes) == ("cat", make_wav(rate_hz=8000))
    records = _records(f"hf:{tmp_path / 'pets'}")
    assert sorted((record.split, record.target.label) for record in records) == [
        ("test", "cat"), ("test", "dog"), ("train", "cat"), ("train", "dog"),
    ]  # fmt: skip
    assert {(media.bytes, media.path) for record in records for media in record.images} == {(make_png(), "1.png")}
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "rows.csv").write_text("text,label\na,b\n")
    (record,) = _records(f"hf:{tmp_path / 'table'}")
    assert (record.split, record.messages[0].content, record.target.label) == (None, "a", "b")


def test_what_cannot_be_read(storage: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": "a"}\n{bad\n')
    with pytest.raises(SourceError, match=r"broken.*datasets cannot go on"):
        choose(f"hf:{tmp_path / 'broken'}")
    with pytest.raises(SourceError, match=r"nobody/nothing \(no folder .*, so a data set of the hub\)"):
        choose("hf:nobody/nothing")
