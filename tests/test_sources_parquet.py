"""Parquet as Hugging Face datasets writes it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.parquet import Parquet
from jobs.sources.table import Table


def _rows(table: Table) -> list[GoodRow | BadRow]:
    return list(table.rows(workers=1))


def test_parquet_of_hugging_face(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    image = pa.array([{"bytes": make_png(), "path": "a.png"}] * 3)
    table = pa.table({"image": image, "label": pa.array([1, 0, -1])})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        pq.write_table(table, tmp_path / "data" / name)
    source = Table(Parquet(tmp_path / "data"))
    assert source.splits == {"train", "test"}
    rows = _rows(source)
    labels = Counter(row.record.target.label for row in rows if isinstance(row, GoodRow))
    assert labels == {"dog": 2, "cat": 2}
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["no label"] * 2
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        Table(Parquet(tmp_path / "broken.parquet"))


def test_lists_of_class_labels_become_their_names(tmp_path: Path) -> None:
    features = {"tags": {"feature": {"names": ["O", "B-X"], "_type": "ClassLabel"}, "_type": "List"}}
    table = pa.table({"tokens": [["a", "b"]], "tags": [[0, 1]]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "d.parquet")
    (row,) = _rows(Table(Parquet(tmp_path / "d.parquet")))
    assert isinstance(row, GoodRow)
    assert row.record.target.spans == ({"start": 2, "end": 3, "label": "X"},)
