"""Shards: row groups, publication by rename, and what a damaged data set says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmagent import shards
from mmagent.record import SCHEMA, Record
from mmagent.shards import Dataset, DatasetError, ShardWriter


def _write(folder: Path, records: list[Record], **settings: int) -> Path:
    writer = ShardWriter(folder, "train", **settings)
    for record in records:
        writer.add(record)
    info = {
        "format_version": 1,
        "schema_version": 1,
        "name": folder.name,
        "task": "classify",
        "tasks": {"classify": {"labels": ["black", "blue", "green", "red"]}},
        "splits": {"train": {"rows": len(records), "shards": writer.close()}},
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def test_what_is_written_is_read(tmp_path: Path, make_records: Callable[..., list[Record]]) -> None:
    records = make_records(25)
    dataset = Dataset.open(_write(tmp_path / "d", records, rows_per_shard=10, row_group_rows=4))
    assert (dataset.name, dataset.task, dataset.rows("train"), dataset.labels[0]) == ("d", "classify", 25, "black")
    tables = list(dataset.read("train"))
    assert [Record.from_row(row) for table in tables for row in table.to_pylist()] == records
    assert [len(table) for table in tables] == [4, 4, 2, 4, 4, 2, 4, 1]
    assert [pq.ParquetFile(file).metadata.num_rows for file in dataset.shard_files("train")] == [10, 10, 5]
    assert next(dataset.read("train", ["id"])).column_names == ["id"]
    assert dataset.tasks["classify"].labels == dataset.labels
    for shard in dataset.info["splits"]["train"]["shards"]:
        data = (tmp_path / "d" / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert tables[0].schema.equals(SCHEMA)


def test_shards_that_take_turns(tmp_path: Path, make_records: Callable[..., list[Record]]) -> None:
    records = make_records(12)
    with ShardWriter(tmp_path, "train", rows_per_shard=3) as writer:
        for turn, part in ((None, records[:4]), (0, records[4:8]), (1, records[8:])):
            for record in part:
                writer.add(record)
            writer.cut(turn)
    always, turns = Dataset(tmp_path, {"splits": {"train": {"shards": writer.close()}}}).turns("train")
    rows = [[pq.read_metadata(file).num_rows for file in files] for files in (always, *turns)]
    assert rows == [[3, 1], [3, 1], [3, 1]]
    names = [row["id"] for file in turns[1] for row in pq.read_table(file).to_pylist()]
    assert names == [record.id for record in records[8:]]


def test_large_media_make_smaller_row_groups_and_shards(
    tmp_path: Path, make_records: Callable[..., list[Record]]
) -> None:
    folder = _write(tmp_path / "d", make_records(8), row_group_bytes=1, shard_bytes=1)
    files = sorted((folder / "train").iterdir())
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [1] * 8


def test_media_of_candidates_count_too(tmp_path: Path) -> None:
    picture = {"bytes": bytes(1000), "path": None}
    records = [Record(str(index), (), candidates=({"content": "", "image": picture},)) for index in range(4)]
    folder = _write(tmp_path / "d", records, row_group_bytes=1500)
    assert pq.ParquetFile(folder / "train" / "part-00000.parquet").num_row_groups == 2


def test_media_are_not_compressed_again(tmp_path: Path, make_records: Callable[..., list[Record]]) -> None:
    folder = _write(tmp_path / "d", make_records(8))
    group = pq.ParquetFile(folder / "train" / "part-00000.parquet").metadata.row_group(0)
    columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    assert set(shards._MEDIA_COLUMNS) <= set(columns)
    for path, column in columns.items():
        media = path in shards._MEDIA_COLUMNS
        assert column.compression == ("UNCOMPRESSED" if media else "ZSTD")
        assert not (media and column.is_stats_set)


def test_an_error_leaves_no_unfinished_file(tmp_path: Path, make_records: Callable[..., list[Record]]) -> None:
    def write() -> None:
        with ShardWriter(tmp_path, "train", row_group_rows=2) as writer:
            for record in make_records(5):
                writer.add(record)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert list((tmp_path / "train").iterdir()) == []


def test_what_is_no_whole_data_set(tmp_path: Path, make_records: Callable[..., list[Record]]) -> None:
    whole = _write(tmp_path / "whole", make_records(5))
    with pytest.raises(DatasetError, match=r"nope is not there.*jobs.prepare.*beside it: whole"):
        Dataset.open(tmp_path / "nope")
    (tmp_path / "half").mkdir()
    with pytest.raises(DatasetError, match="an unfinished one"):
        Dataset.open(tmp_path / "half")
    with pytest.raises(DatasetError, match="no split 'test'; it has train"):
        Dataset.open(whole).rows("test")
    shard = whole / "train" / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"part-00000.parquet has \d+ bytes, but dataset.json says"):
        Dataset.open(whole)
    shard.unlink()
    with pytest.raises(DatasetError, match=r"part-00000\.parquet is missing"):
        Dataset.open(whole)
    info = json.loads((whole / "dataset.json").read_text())
    (whole / "dataset.json").write_text(json.dumps(info | {"format_version": 99}))
    with pytest.raises(DatasetError, match="install a newer mmagent"):
        Dataset.open(whole)
    (whole / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be read"):
        Dataset.open(whole)
