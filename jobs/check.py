"""What a data set holds that its owner should know: `jobs.prepare --check` writes it to ROOT/data/NAME/check.json.

Row groups are looked at by processes (`jobs.inspection`); here their counts and hashes come together: the same media or
rows on both sides of a split, rows of one question and different answers, lengths, sample rates, labels. Memory holds
some 30 bytes a row, whatever the media. Rows that training cannot use are listed in quarantine/check.jsonl.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jobs import diagnosis, pool
from jobs.inspection import Fault, Glass, Look, Place, look
from jobs.progress import Progress
from mmagent import storage
from mmagent.config import Config, ConfigError
from mmagent.media import Limits
from mmagent.shards import Dataset

FORMAT_VERSION = 1
FAULTS_FILE = "quarantine/check.jsonl"
_EXAMPLES = 5
_KINDS = ("image", "audio")


class Gathered:
    """All that was seen of one split."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self.rows = sum(len(each.keys) for each in looks)
        self.keys = _joined([each.keys for each in looks], np.uint64)
        self.answers = _joined([each.answers for each in looks], np.uint64)
        self.lengths = _joined([each.lengths for each in looks], np.int32)
        self.seconds = _joined([each.seconds for each in looks], np.float32)
        starts = list(itertools.accumulate((len(each.keys) for each in looks), initial=0))
        self.media = {kind: _joined([each.media[kind] for each in looks], np.uint64) for kind in _KINDS}
        self.owners = {
            kind: _joined([each.owners[kind] + at for each, at in zip(looks, starts, strict=False)], np.int64)
            for kind in _KINDS
        }
        self.faults = [fault for each in looks for fault in each.faults]
        self.counts: dict[str, Counter[str]] = {}
        self.examples: dict[str, list[str]] = {}
        for each in looks:
            for name, counter in each.counts.items():
                self.counts.setdefault(name, Counter()).update(counter)
            for sign, ids in each.examples.items():
                self.examples[sign] = (self.examples.get(sign, []) + ids)[:_EXAMPLES]


def check(dataset: Dataset, config: Config | None, workers: int) -> dict[str, Any]:
    """Looks at every row of a data set by `workers` processes, and writes check.json and quarantine/check.jsonl.

    Args:
        config: whose tokenizer counts tokens, and whose limits hold; none: words are counted.

    Raises:
        ConfigError: the recipe's language model has no tokenizer.
        PoolError: a process was killed.
    """
    glass = _glass(config) if config else Glass(Limits())
    looks = _looked(dataset, glass, workers)
    splits = {split: Gathered([each for each in looks if each.place.split == split]) for split in dataset.splits}
    found: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": dataset.name,
        "shards": diagnosis.fingerprint(dataset),
        "checked_ms": int(time.time() * 1000),
        "tokenizer": config.model.backbone if config else None,
        "max_tokens": glass.max_tokens,
        "tower_rate_hz": config.model.audio.sample_rate_hz if config and config.model.audio else None,
        "splits": {split: _of_split(dataset, split, held, glass) for split, held in splits.items()},
        "shared": [_shared(dataset, *pair, splits) for pair in itertools.combinations(splits, 2)],
    }
    found["warnings"] = diagnosis.warnings(found)
    _publish_faults(dataset, [fault for held in splits.values() for fault in held.faults])
    storage.publish_json(dataset.path / diagnosis.FILE, found)
    return found


def _glass(config: Config) -> Glass:
    from mmagent import text  # brings torch

    try:
        place = text.locate(config.model.backbone)
        text.load_tokenizer(place)  # what is missing is told by one process
    except text.BackboneError as error:
        raise ConfigError(str(error)) from error
    return Glass(config.data.media, place, config.data.max_text_tokens)


def _looked(dataset: Dataset, glass: Glass, workers: int) -> list[Look]:
    places = [
        Place(split, str(file), group)
        for split in dataset.splits
        for file in dataset.shard_files(split)
        for group in range(pq.read_metadata(storage.source(file)).num_row_groups)
    ]
    looks = []
    with Progress("check", sum(dataset.rows(split) for split in dataset.splits), "rows") as progress:
        for each in pool.ordered(functools.partial(look, glass), places, min(workers, max(1, len(places)))):
            progress.add(len(each.keys))
            looks.append(each)
    return looks


def _of_split(dataset: Dataset, split: str, held: Gathered, glass: Glass) -> dict[str, Any]:
    """A split as check.json has it."""
    contradicting = _contradicting(held)
    return {
        "rows": held.rows,
        "unusable": {"rows": len(held.faults), "reasons": dict(Counter(f.reason for f in held.faults).most_common()),
                     "examples": [fault.id for fault in held.faults[:_EXAMPLES]]},
        "repeated_rows": held.rows - len(np.unique(held.keys)),
        "contradicting": {"rows": len(contradicting), "examples": _ids(dataset, split, contradicting)},
        "image": _media(held, "image") | {"sizes": dict(held.counts.get("sizes", Counter()).most_common(10))},
        "audio": _media(held, "audio") | {"rates_hz": dict(held.counts.get("rates_hz", Counter()).most_common()),
                                          "seconds": _spread(held.seconds)},
        "signs": dict(held.counts.get("signs", {})),
        "examples": held.examples,
        "length": _spread(held.lengths) | {"histogram": _histogram(held.lengths)},
        "cut_rows": int((held.lengths > glass.max_tokens).sum()) if glass.max_tokens else None,
        "labels": {
            name.removeprefix("labels/"): dict(counter.most_common())
            for name, counter in sorted(held.counts.items()) if name.startswith("labels/") and counter
        },
    }  # fmt: skip


def _media(held: Gathered, kind: str) -> dict[str, Any]:
    """How many there are, how many different ones, and in how many rows the commonest stands."""
    names, times = np.unique(held.media[kind], return_counts=True)
    return {
        "count": len(held.media[kind]),
        "distinct": len(names),
        "rows": len(np.unique(held.owners[kind])),
        "commonest": int(times.max()) if len(times) else 0,
    }


def _contradicting(held: Gathered) -> np.ndarray:
    """The rows that ask what another row asks, word for word, and answer otherwise."""
    pairs = np.unique(np.stack([held.keys, held.answers]), axis=1)
    keys, times = np.unique(pairs[0], return_counts=True)
    return np.flatnonzero(np.isin(held.keys, keys[times > 1]))


def _shared(dataset: Dataset, one: str, other: str, splits: Mapping[str, Gathered]) -> dict[str, Any]:
    """What two splits have in common: rows of the second whose media, or all of which, the first has too."""
    first, second = splits[one], splits[other]
    same_rows = np.flatnonzero(np.isin(second.keys, first.keys))
    media, with_media = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for kind in _KINDS:
        media.append(second.owners[kind][np.isin(second.media[kind], first.media[kind])])
        with_media.append(second.owners[kind])
    rows = np.unique(np.concatenate(media))
    return {
        "splits": [one, other],
        "media_rows": len(rows),
        "of": len(np.unique(np.concatenate(with_media))),
        "media_examples": _ids(dataset, other, rows),
        "same_rows": len(same_rows),
        "same_examples": _ids(dataset, other, same_rows),
    }


def _ids(dataset: Dataset, split: str, rows: np.ndarray) -> list[str]:
    """The ids of the first of some rows, counted over the split."""
    wanted, found, at = rows[:_EXAMPLES].tolist(), [], 0
    for table in dataset.read(split, columns=["id"]) if wanted else ():
        found += [str(table["id"][row - at].as_py()) for row in wanted if at <= row < at + len(table)]
        at += len(table)
        if len(found) == len(wanted):
            break
    return found


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, middle, high = np.percentile(values, [50, 90, 99])
    told = {"mean": values.mean(), "p50": low, "p90": middle, "p99": high, "max": values.max(), "sum": values.sum()}
    return {key: round(float(value), 3) for key, value in told.items()}


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(up to so many, rows) in powers of two; the empty ones at both ends left out."""
    if not len(lengths):
        return []
    power = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(power)
    return [(1 << index, int(count)) for index, count in enumerate(counts) if index >= power.min()]


def _publish_faults(dataset: Dataset, faults: Iterable[Fault]) -> None:
    file, lines = dataset.path / FAULTS_FILE, []
    for fault in faults:
        lines.append(json.dumps(asdict(fault) | {"file": Path(fault.file).relative_to(dataset.path).as_posix()}))
    if lines or file.exists():
        storage.publish(file, "".join(line + "\n" for line in lines))


def _joined(arrays: Sequence[np.ndarray], kind: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *arrays]).astype(kind, copy=False)
