"""Few labels: a part of a training split, drawn by a seed, as a data set of its own.

In the seed's order of all rows, a row is taken where one of its labels still has fewer than N: N rows of each class,
and where a row has several labels (multilabel, tag) N or a few more that hold each. Rows without any label (no tag, no
entity) are a class too. Tasks without labels (regress, match, extract, generate) get N rows in all. Each task is drawn
apart; a label of fewer rows gives all it has. What is drawn is a function of the seed and the data set alone; of one
seed, a larger N of single labels holds the rows of a smaller one.

The folder holds the drawn rows and a ``dataset.json`` that names the other splits where they lie: it is read as any
data set is, by workers, baselines and the model card.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs import stream
from jobs.sources import GoodRow
from jobs.sources.tally import Tally
from mmagent import storage
from mmagent.record import Record
from mmagent.shards import INFO_FILE, Dataset, ShardWriter
from mmagent.targets import TaskInfo, labels_of

TRAIN = "train"
_DRAW = 3  # of the seeds that start with the run's: what `stream` and `order` draw has other numbers


class DrawError(ValueError):
    """Rows that cannot be trained on; says what to do."""


def drawn(dataset: Dataset, per_class: int, seed: int, folder: Path) -> Dataset:
    """The data set with `per_class` rows of each class in its training split; written into `folder` unless it is there.

    What a data set knows of its tasks (counts of labels, mean and deviation of values) is of the drawn rows; the labels
    themselves are all of them, so that runs of any number have the same head.

    Raises:
        DrawError: values to regress that are all the same.
    """
    mark = {"labels_per_class": per_class, "seed": seed, "of": _fingerprint(dataset)}
    file = folder / INFO_FILE
    if file.is_file() and json.loads(file.read_text()).get("drawn") == mark:
        return Dataset.open(folder)
    shutil.rmtree(folder, ignore_errors=True)
    tally = Tally()
    with ShardWriter(folder, TRAIN) as writer:
        for number, record in enumerate(_records(dataset, choose(dataset, per_class, seed)), 1):
            tally.add(GoodRow(str(folder), number, record))
            writer.add(record)
        shards = writer.close()
    info = {
        **dataset.info,
        "tasks": {name: _info(each, tally, per_class).to_dict() for name, each in dataset.tasks.items()},
        "splits": {
            split: {**about, "shards": _seen_from(folder, dataset, about["shards"])}
            for split, about in dataset.info["splits"].items()
        }
        | {TRAIN: tally.to_dict() | {"shards": shards}},
        "drawn": mark,
    }
    storage.publish_json(file, info)
    return Dataset.open(folder)


def choose(dataset: Dataset, per_class: int, seed: int) -> np.ndarray:
    """(rows,) places in the training split of the rows that are drawn, in its order."""
    named = [_classes(row) for part in dataset.read(TRAIN, ["task", "target"]) for row in part.to_pylist()]
    counts: Counter[tuple[str, str]] = Counter()
    taken = []
    for place in np.random.default_rng([seed, _DRAW]).permutation(len(named)):
        if any(counts[each] < per_class for each in named[place]):
            counts.update(named[place])
            taken.append(place)
    return np.sort(np.array(taken, np.int64))


def _classes(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """(task, label) for each of its labels; one with an empty label where it has none."""
    record = Record.from_row({"id": "", "messages": (), **row})
    return tuple((record.task, label) for label in dict.fromkeys(labels_of(record)) or ("",))


def _records(dataset: Dataset, places: np.ndarray) -> Iterator[Record]:
    """The records at these places; only row groups that hold one of them are read."""
    first = 0
    for file, group, rows in stream.row_groups(dataset, TRAIN):
        inside = places[(places >= first) & (places < first + rows)] - first
        first += rows
        if len(inside):
            with pq.ParquetFile(storage.source(file)) as shard:
                yield from map(Record.from_row, shard.read_row_group(group).take(pa.array(inside)).to_pylist())


def _info(info: TaskInfo, tally: Tally, per_class: int) -> TaskInfo:
    """What is known of a task after the draw."""
    found = tally.tasks.get(info.task)
    if found is None:
        return replace(info, rows={**info.rows, TRAIN: 0}, counts=dict.fromkeys(info.labels, 0))
    made = found.info(info.task, {**info.rows, TRAIN: found.rows})
    if made.kind == "regress" and not made.deviation:
        raise DrawError(
            f"the {found.rows} rows drawn of {info.task} all have the value {made.mean:g}, so that there is nothing to "
            f"learn: data.labels_per_class={per_class} is too small"
        )
    return replace(made, labels=info.labels, counts={label: made.counts.get(label, 0) for label in info.labels})


def _seen_from(folder: Path, dataset: Dataset, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Below one root as the way from the one folder to the other: the root lies elsewhere on another machine."""
    root = storage.root()
    apart = not (folder.is_relative_to(root) and dataset.path.is_relative_to(root))
    places = [(dataset.path / shard["file"]).absolute() for shard in shards]
    return [
        {**shard, "file": str(place) if apart else os.path.relpath(place, folder)}
        for shard, place in zip(shards, places, strict=True)
    ]


def _fingerprint(dataset: Dataset) -> str:
    return storage.digest(dataset.path / INFO_FILE)
