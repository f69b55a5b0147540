"""What a refit shows again of what a bundle learned from, so that it is not forgotten: rows balanced by task, kinds of
input and class, of the shards where they still are, else of the memory that lies in the bundle.

A bundle that was refitted learned from its own rows of feedback, and from all that the bundles before it did: `sources`
follows that chain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmagent import storage
from mmagent.bundle import Bundle
from mmagent.record import SCHEMA, Record
from mmagent.shards import Dataset, DatasetError
from mmagent.targets import labels_of

REPLAY = "replay"  # meta source of a row that is shown again
MEMORY = "memory.parquet"  # of a bundle
BASES = "bases"  # in the recipe of a refit's data set: what was trained on before
_COLUMNS = ["id", "task", "messages", "target", "meta", "images.list.element.path", "audios.list.element.path"]
_DRAW = 7  # of the seeds that start with the run's
_MEMORY_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A row, where it stands."""

    file: Path
    group: int
    row: int


def sources(found: Bundle) -> tuple[list[Dataset], list[str]]:
    """The data sets that a bundle learned from, its own first; and the names of those that are gone."""
    there: list[Dataset] = []
    gone: list[str] = []
    names = [str(found.manifest.get("data") or "")]
    while names:
        name = names.pop(0)
        if not name or name in gone or any(each.name == name for each in there):
            continue
        try:
            dataset = Dataset.open(storage.folder("data", name))
        except (DatasetError, storage.StorageError):
            gone.append(name)
            continue
        there.append(dataset)
        names += dataset.info.get("recipe", {}).get(BASES, [])
    return there, gone


def feedback_used(found: Bundle) -> set[str]:
    """The feedback that a bundle, and those before it, learned from or were measured by."""
    return {id for each in sources(found)[0] for id in each.info.get("recipe", {}).get("feedback", [])}


def draw(datasets: Sequence[Dataset], split: str, count: int, seed: int) -> list[Record]:
    """As many rows of a split, each class of each task and kind of input as often as the others, as far as it has
    rows, and what users corrected before as often as what was there at first; by the seed. Of a refit's data set its
    new rows alone: what it replayed stands in the others."""
    return draws(datasets, split, count, [seed])[0]


def draws(datasets: Sequence[Dataset], split: str, count: int, seeds: Sequence[int]) -> list[list[Record]]:
    """`draw` for each seed."""
    by_kind: dict[tuple[bool, str, str, str], list[Place]] = defaultdict(list)
    for dataset in datasets:
        if split not in dataset.splits:
            continue
        refit = BASES in dataset.info.get("recipe", {})
        for file in dataset.shard_files(split):
            with pq.ParquetFile(storage.source(file)) as shard:
                for group in range(shard.num_row_groups):
                    rows = shard.read_row_group(group, columns=_COLUMNS).to_pylist()
                    for index, row in enumerate(rows):
                        if not (refit and dict(row["meta"] or ()).get("source") == REPLAY):
                            by_kind[refit, *_kind(row)].append(Place(file, group, index))
    parts = [{kind: places for kind, places in by_kind.items() if kind[0] == refit} for refit in (True, False)]
    share = [count // 2, count - count // 2]
    there = [sum(map(len, part.values())) for part in parts]
    # What one of the two has too few of, the other one fills up.
    wanted = [max(share[at], count - there[1 - at]) for at in range(2)]
    return [
        list(_read([each for part, n in zip(parts, wanted, strict=True) for each in _balanced(part, n, seed)]))
        for seed in seeds
    ]


def memory(found: Bundle) -> list[Record]:
    """What a bundle holds of what it learned from."""
    file = found.path / MEMORY
    return [Record.from_row(row) for row in pq.read_table(file).to_pylist()] if file.is_file() else []


def remembered(datasets: Sequence[Dataset], count: int, seed: int) -> bytes:
    """A bundle's memory: rows of training, as `draw` gives them, as many as `_MEMORY_BYTES` hold."""
    kept, size = [], 0
    for record in draw(datasets, "train", count, seed):
        size += sum(len(media.bytes or b"") for media in record.media())
        if size > _MEMORY_BYTES:
            break
        kept.append(record.to_row())
    return packed(kept)


def packed(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A memory's file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([*rows], SCHEMA), sink, compression="zstd")
    return bytes(sink.getvalue())


def again(records: Sequence[Record], split: str) -> list[Record]:
    """Rows marked as shown again; their own weight counts."""
    return [replace(each, split=split, meta={**each.meta, "source": REPLAY}) for each in records]


def _kind(row: dict[str, Any]) -> tuple[str, str, str]:
    record = Record.from_row({**row, "images": _some(row["images"]), "audios": _some(row["audios"])})
    return record.task, record.modalities, min(labels_of(record), default="")


def _some(media: Any) -> list[dict[str, Any]]:
    """Places of media whose bytes were not read."""
    return [{"bytes": None, "path": each.get("path")} for each in media or ()]


def _balanced(by_kind: Mapping[tuple[bool, str, str, str], list[Place]], count: int, seed: int) -> list[Place]:
    """In turn one of each kind, in an order that the seed gives, until there are enough."""
    rng = np.random.default_rng([seed, _DRAW])
    queues = [[places[index] for index in rng.permutation(len(places))] for _, places in sorted(by_kind.items())]
    out: list[Place] = []
    depth = 0
    while len(out) < count and any(depth < len(queue) for queue in queues):
        row = [queue[depth] for queue in queues if depth < len(queue)]
        out += row if len(out) + len(row) <= count else [row[i] for i in rng.permutation(len(row))[: count - len(out)]]
        depth += 1
    return out


def _read(places: Sequence[Place]) -> Iterator[Record]:
    """The records at these places, in the order of the shards; only row groups that hold one of them are read."""
    by_group: dict[tuple[Path, int], list[int]] = defaultdict(list)
    for each in places:
        by_group[each.file, each.group].append(each.row)
    for (file, group), rows in sorted(by_group.items()):
        with pq.ParquetFile(storage.source(file)) as shard:
            yield from map(Record.from_row, shard.read_row_group(group).take(pa.array(sorted(rows))).to_pylist())
