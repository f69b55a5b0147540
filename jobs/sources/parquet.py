"""Parquet as Hugging Face ``datasets`` writes it (``struct<bytes, path>`` media, class labels), or this project's own.

A folder's files are read in the order of their names; a file such as ``train-00000-of-00002.parquet``, or one in a
folder named ``test``, belongs to that split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.sources import SourceError
from jobs.sources.readers import RawRow, digests, files_of, split_of

_BATCH_ROWS = 64


class Parquet:
    shuffled = False

    def __init__(self, place: Path, prefix: str = "") -> None:
        self._place, self._prefix = place, prefix
        self._files = files_of(place, (".parquet",))

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        for file in self._files:
            try:
                with pq.ParquetFile(file) as table:
                    yield from self._rows_of(file, table, light)
            except pa.ArrowException as error:
                raise SourceError(f"{file} cannot be read as Parquet: {error}") from error

    def _rows_of(self, file: Path, table: pq.ParquetFile, light: bool) -> Iterator[RawRow]:
        schema, split = table.schema_arrow, split_of(file, self._place)
        names = _class_names(schema.metadata)
        left_out = [field.name for field in schema if light and pa.types.is_nested(field.type)]
        extra: dict[str, Any] = dict.fromkeys(left_out)
        if split is not None and "split" not in schema.names:
            extra["split"] = split
        columns = [name for name in schema.names if name not in left_out]
        inner = file.name if self._place.is_file() else file.relative_to(self._place).as_posix()
        number = 0
        for batch in table.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
            for values in batch.to_pylist():
                number += 1
                for column, labels in names.items():
                    values[column] = named(values.get(column), labels)
                default_id = f"{self._prefix}{inner.removesuffix('.parquet')}-{number}"
                yield RawRow(str(file), number, default_id, values | extra, file.parent)

    def fingerprint(self) -> dict[str, Any]:
        return digests(self._files, self._place)


def named(value: Any, labels: Sequence[str]) -> Any:
    """The words of a class label's number, or of a list of them; -1 is datasets' word for no label."""
    if isinstance(value, list):
        return [named(each, labels) for each in value]
    if not isinstance(value, int):
        return value
    return labels[value] if 0 <= value < len(labels) else None


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The words behind the numbers of ``ClassLabel`` columns, which datasets keeps in the schema's metadata."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: labels for name, about in features.items() if (labels := _labels(about))}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # not written by datasets: the numbers are the labels


def _labels(about: Any) -> list[str]:
    """The names of a class label's feature, or of a list of them."""
    if isinstance(about, list):
        return _labels(about[0]) if about else []
    return (
        about["names"]
        if about.get("_type") == "ClassLabel"
        else _labels(about["feature"])
        if "feature" in about
        else []
    )
