"""A data set on disk: Parquet shards of the record schema, and ``dataset.json``, which is written last.

    dataset = Dataset.open(storage.folder("data", "easy_vqa"))
    for table in dataset.read("train", columns=["id", "messages"]):
        ...

A shard holds row groups of at most 256 rows with its media inline, so that a reader needs no other file and no more
memory than one row group. A folder without ``dataset.json`` is no data set: its making was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from mmagent import storage
from mmagent.record import SCHEMA, SCHEMA_VERSION, Record
from mmagent.targets import TaskInfo

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
INFO_FILE = "dataset.json"
TURN = "turn"  # of a shard that not every epoch reads
# Encoded media are compressed already, and never compared: no dictionary, no statistics, no second compression.
_MEDIA_COLUMNS = tuple(
    f"{column}.bytes"
    for column in (
        "images.list.element",
        "audios.list.element",
        "candidates.list.element.image",
        "candidates.list.element.audio",
    )
)


class DatasetError(ValueError):
    """A folder that is no whole data set; the message names what is missing and the command that makes it."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A whole data set, opened for reading."""

    path: Path
    info: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads ``dataset.json`` and sees that every shard is there in its full size.

        Raises:
            DatasetError: no such folder, an unfinished one, another format, or a shard that is missing or cut off.
        """
        folder = Path(path)
        storage.refresh(folder)
        file = folder / INFO_FILE
        if not file.is_file():
            what = (
                "is not there"
                if not folder.is_dir()
                else f"has no {INFO_FILE}: it is no data set, or an unfinished one"
            )
            raise DatasetError(
                f"the data set {folder} {what}; make it with "
                f"`python -m jobs.prepare --source SOURCE --name {folder.name}`{_neighbours(folder)}"
            )
        try:
            info = json.loads(file.read_text())
            version, splits, _ = info["format_version"], info["splits"], info["tasks"]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{file} cannot be read ({error!r}); prepare the data set again with --replace"
            ) from error
        if version > FORMAT_VERSION or info["schema_version"] > SCHEMA_VERSION:
            raise DatasetError(
                f"{file} has format {version} and schema {info['schema_version']}, but this version reads "
                f"format {FORMAT_VERSION} and schema {SCHEMA_VERSION} at most: install a newer mmagent"
            )
        for split in splits.values():
            for shard in split["shards"]:
                _check_shard(_place(folder, shard["file"]), shard["bytes"])
        return cls(folder, info)

    @property
    def name(self) -> str:
        return str(self.info["name"])

    @property
    def task(self) -> str:
        """The task with most training rows: the default."""
        return str(self.info["task"])

    @property
    def tasks(self) -> dict[str, TaskInfo]:
        """Every task of the data set by its name, ``KIND`` or ``KIND:NAME``."""
        return {task: TaskInfo.from_dict(task, raw) for task, raw in self.info["tasks"].items()}

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the default task, in the order of the head's outputs."""
        return self.tasks[self.task].labels

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.info["splits"])

    def rows(self, split: str) -> int:
        return int(self._split(split)["rows"])

    def shard_files(self, split: str) -> list[Path]:
        """The files of a split, in order."""
        return [Path(_place(self.path, shard["file"])) for shard in self._split(split)["shards"]]

    def turns(self, split: str) -> tuple[list[Path], list[list[Path]]]:
        """The files of a split that every epoch reads, and those of which each epoch reads one part, in turn."""
        always: list[Path] = []
        turns: dict[int, list[Path]] = {}
        for shard, file in zip(self._split(split)["shards"], self.shard_files(split), strict=True):
            (always if (turn := shard.get(TURN)) is None else turns.setdefault(turn, [])).append(file)
        return always, [turns[turn] for turn in sorted(turns)]

    def hashes(self, split: str) -> dict[str, str]:
        """The sha256 of each file of a split, in order."""
        return {_place(self.path, shard["file"]): shard["sha256"] for shard in self._split(split)["shards"]}

    def read(self, split: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows in order, one row group at a time."""
        for file in self.shard_files(split):
            with pq.ParquetFile(storage.source(file)) as shard:
                for group in range(shard.num_row_groups):
                    yield shard.read_row_group(group, columns=columns, use_threads=False)

    def _split(self, split: str) -> dict[str, Any]:
        found: dict[str, Any] | None = self.info["splits"].get(split)
        if found is None:
            raise DatasetError(f"the data set {self.path} has no split {split!r}; it has {', '.join(self.splits)}")
        return found


def find(name: str) -> Path:
    """The folder that a command means by a data set: a path, or a name under ``ROOT/data``. It need not exist.

    Raises:
        StorageError: neither.
    """
    return storage.resolve(name) if "/" in name else storage.folder("data", name)


class ShardWriter:
    """Writes one split's records into ``FOLDER/SPLIT/part-NNNNN.parquet``; a file appears whole or not at all.

    Memory holds one row group. As a context manager it closes, or after an error removes, what is open.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        rows_per_shard: int = 8192,
        row_group_rows: int = 256,
        shard_bytes: int = 1 << 30,
        row_group_bytes: int = 64 << 20,
    ) -> None:
        self._folder, self._split = folder, split
        self._rows_per_shard, self._row_group_rows = rows_per_shard, row_group_rows
        self._shard_bytes, self._row_group_bytes = shard_bytes, row_group_bytes
        self._buffer: list[dict[str, Any]] = []
        self._buffer_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self._shard_rows = 0
        self._written_bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._cut = 0  # shards before the last cut

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add(self, record: Record) -> None:
        self._buffer.append(record.to_row())
        self._buffer_bytes += sum(len(media.bytes or b"") for media in record.media())
        full = self._shard_rows + len(self._buffer) >= self._rows_per_shard
        if full or len(self._buffer) >= self._row_group_rows or self._buffer_bytes >= self._row_group_bytes:
            self._flush()
        if full or self._written_bytes >= self._shard_bytes:
            self._finish()

    def close(self) -> list[dict[str, Any]]:
        """Publishes what is left; returns ``{"file", "rows", "bytes", "sha256"}`` for each shard."""
        self.cut()
        return self._shards

    def cut(self, turn: int | None = None) -> None:
        """Ends a shard; all since the last cut are of this turn (see `Dataset.turns`)."""
        self._flush()
        self._finish()
        for shard in self._shards[self._cut :] if turn is not None else ():
            shard[TURN] = turn
        self._cut = len(self._shards)

    def abort(self) -> None:
        """Removes the unfinished shard; the finished ones stay for the caller to remove with their folder."""
        self._buffer.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._draft.unlink(missing_ok=True)

    @property
    def _final(self) -> Path:
        return self._folder / self._split / f"part-{len(self._shards):05d}.parquet"

    @property
    def _draft(self) -> Path:
        return self._final.with_name(f".{self._final.name}.tmp")

    def _flush(self) -> None:
        if not self._buffer:
            return
        if self._writer is None:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._writer = _open_writer(self._draft)
        self._writer.write_table(pa.Table.from_pylist(self._buffer, SCHEMA))
        self._shard_rows += len(self._buffer)
        self._written_bytes += self._buffer_bytes
        self._buffer.clear()
        self._buffer_bytes = 0

    def _finish(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        draft, final = self._draft, self._final
        digest = storage.digest(draft)
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        size = draft.stat().st_size
        os.replace(draft, final)
        name = final.relative_to(self._folder).as_posix()
        self._shards.append({"file": name, "rows": self._shard_rows, "bytes": size, "sha256": digest})
        self._shard_rows = self._written_bytes = 0


def _open_writer(path: Path) -> pq.ParquetWriter:
    columns = _leaf_columns()
    plain = [column for column in columns if column not in _MEDIA_COLUMNS]
    return pq.ParquetWriter(
        path,
        SCHEMA,
        compression={column: "NONE" if column in _MEDIA_COLUMNS else "ZSTD" for column in columns},
        use_dictionary=plain,
        write_statistics=plain,
    )


def _leaf_columns() -> list[str]:
    """The dotted Parquet paths of the schema's leaves, as compression settings want them."""
    sink = pa.BufferOutputStream()
    pq.write_table(SCHEMA.empty_table(), sink)
    schema = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [schema.column(index).path for index in range(len(schema))]


def _place(folder: Path, name: str) -> str:
    """Where a shard lies: in the folder, or, of a data set that was drawn of another one, beside it."""
    place = os.path.join(folder, name)
    return os.path.normpath(place) if name.startswith("..") else place


def _check_shard(file: str, size: int) -> None:
    try:
        found = storage.size(file)
    except OSError as error:
        raise DatasetError(f"the shard {file} is missing; prepare the data set again with --replace") from error
    if found != size:
        raise DatasetError(
            f"the shard {file} has {found} bytes, but {INFO_FILE} says {size}; prepare it again with --replace"
        )


def _neighbours(folder: Path) -> str:
    names = sorted(file.parent.name for file in folder.parent.glob(f"[!.]*/{INFO_FILE}"))
    return f" (data sets beside it: {', '.join(names[:10])})" if names else ""
