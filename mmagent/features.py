"""What frozen parts of a model make of its data, kept on disk: the states of texts, pictures and sounds.

    features/HASH/SHARD.parquet

HASH is of one frozen part: its weights, and how its input is made; SHARD of a data shard's bytes. A file has the row
groups and rows of its shard, and for each row the items that the part computes on: a key by content, and the states,
float32 of (states, channels). So runs and search trials share what they have in common, and a stream that reads a
piece of a shard finds its states in the same places. A file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmagent import pretrained, storage, towers
from mmagent.config import Config, TowerConfig
from mmagent.pretrained import WEIGHT_FILES

Kind = Literal["text", "image", "audio"]
KINDS: tuple[Kind, ...] = ("text", "image", "audio")
FOLDER = "features"
COLUMN = "states"  # of a stream's rows
ITEMS = pa.list_(pa.struct([("key", pa.binary(16)), ("states", pa.binary()), ("count", pa.int32())]))
_FORMAT = 1
_LARGE_BYTES = 256 << 20
_READ_BESIDES = ("*.json", "*.txt", "*.model", "*.jinja")  # of a checkpoint, beside its weights


@dataclass(frozen=True, slots=True)
class Kept:
    """The states that one frozen part makes of a run's data.

    Args:
        folder: of the part.
        files: of states, by the data shard whose rows they are of.
    """

    kind: Kind
    folder: Path
    files: Mapping[str, str]

    def missing(self) -> list[str]:
        """Data shards without states, or with states of other rows."""
        return [shard for shard, file in self.files.items() if not _fits(Path(file), Path(shard))]


def key(kind: Kind, data: bytes) -> bytes:
    """Of a text's token ids (int64), or of a picture's or sound's encoded bytes."""
    return hashlib.blake2b(data, digest_size=16, person=kind.encode()).digest()


def of(config: Config, kind: Kind, tasks: Iterable[str], shards: Mapping[str, str]) -> Kept:
    """Where the states of a part lie, or would.

    Args:
        tasks: names of those that read the text.
        shards: sha256 of each data shard, by its file.
    """
    folder = storage.root() / FOLDER / _hash(config, kind, tasks)
    return Kept(kind, folder, {file: str(folder / f"{digest[:32]}.parquet") for file, digest in shards.items()})


def _hash(config: Config, kind: Kind, tasks: Iterable[str]) -> str:
    about: dict[str, Any] = {"format": _FORMAT, "kind": kind, "media": config.data.media.model_dump(mode="json")}
    if kind == "text":
        about |= {
            "weights": _weights(config.model.backbone, "model.backbone"),
            "tokens": config.data.max_text_tokens,
            "tasks": sorted(tasks),
            "transcripts": config.model.audio is not None and config.model.audio.align > 0,
        }
    else:
        tower = config.model.image if kind == "image" else config.model.audio
        assert isinstance(tower, TowerConfig)
        assert tower.checkpoint is not None
        shape = tower.model_dump(mode="json", include={"tokens", "size", "max_s", "mels"})
        start = storage.digest(towers.start_file(tower.start)) if tower.start else None
        about |= {"weights": _weights(tower.checkpoint, f"model.{kind}.checkpoint"), "shape": shape, "start": start}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _weights(name: str, key: str) -> str:
    """Of all files that a checkpoint's model, and what prepares its input, are read from."""
    folder, found = pretrained.folder_of(name, key), hashlib.sha256()
    for file in sorted({file for pattern in (*WEIGHT_FILES, *_READ_BESIDES) for file in folder.glob(pattern)}):
        found.update(f"{file.name} {_digest(file)}\n".encode())
    return found.hexdigest()


def _digest(file: Path) -> str:
    """A file's sha256; of a large one remembered while it stays as it is, since reading one of many gigabytes takes a
    minute."""
    about = file.resolve().stat()
    if about.st_size < _LARGE_BYTES:
        return storage.digest(file)
    known_file = storage.root() / FOLDER / "digests.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):  # not there yet
        known = json.loads(known_file.read_text())
    name = f"{file.resolve()} {about.st_size} {about.st_mtime_ns}"
    if name not in known:
        known[name] = storage.digest(file)
        storage.publish_json(known_file, known)
    return known[name]


def packed(rows: Sequence[Mapping[bytes, np.ndarray]]) -> pa.Array:
    """The items of rows as a column."""
    return pa.array(
        [
            [{"key": name, "states": states.tobytes(), "count": len(states)} for name, states in items.items()]
            for items in rows
        ],
        ITEMS,
    )


def unpacked(items: Iterable[Mapping[str, Any]] | None) -> dict[bytes, np.ndarray]:
    """A row's items: key -> states (states, channels)."""
    # A copy, since tensors want arrays that may be written to.
    return {
        item["key"]: np.frombuffer(bytearray(item["states"]), np.float32).reshape(item["count"], -1)
        for item in items or ()
    }


def writer(file: Path) -> pq.ParquetWriter:
    """Row groups of one column. Rows of the same text share its states on disk, as a dictionary does."""
    return pq.ParquetWriter(
        file,
        pa.schema([(COLUMN, ITEMS)]),
        compression="NONE",
        write_statistics=False,
        dictionary_pagesize_limit=1 << 26,
    )


def _fits(file: Path, shard: Path) -> bool:
    if not file.is_file():
        return False
    mine, data = pq.read_metadata(storage.source(file)), pq.read_metadata(storage.source(shard))
    return _groups(mine) == _groups(data)


def _groups(footer: pq.FileMetaData) -> list[int]:
    return [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
