"""Takes back what was said of answers, everywhere: segments, the data sets of refits, memories in bundles.

    python -m jobs.forget --answer ans_01JDX3YQ2M8T5W6V7R9K0N1P4S [--answer ...]
    python -m jobs.forget               # what was deleted over HTTP (DELETE /v1/answers/ID); jobs.refine does so too

A service deletes an answer's trace and question at once, and marks the feedback on it as deleted, which nobody reads
from then on. This command removes the rows themselves: lines of segments of past days (a service may still write
today's; those go tomorrow), rows of ROOT/data/CHANNEL-rNNN that were made of them, and rows of a bundle's memory. What
a model has learned of a row stays until it is trained anew: its run and bundle are named.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs import replay
from mmagent import bundle as bundles
from mmagent import feedback, storage
from mmagent.arguments import Parser
from mmagent.record import Record
from mmagent.shards import INFO_FILE, Dataset, DatasetError, ShardWriter


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.forget", __doc__)
    parser.add_argument(
        "--answer", action="append", default=[], metavar="ID", help="an answer; more than once for more"
    )
    args = parser.parse_args(argv)
    try:
        for each in args.answer:
            mark(each)
        lines, rows, learned = forget()
    except (OSError, storage.StorageError, DatasetError, bundles.BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"removed {lines} lines of feedback and {rows} rows of data sets and memories")
    for name in learned:
        print(f"learned from it: {name}")
    return 0


def mark(answer: str) -> None:
    """Says that nothing may be used any more that was said of an answer."""
    place = feedback.folder()
    place.mkdir(parents=True, exist_ok=True)
    told = {"says": feedback.DELETED, "answer": answer, "created_ms": int(time.time() * 1000), "key": "jobs.forget"}
    with open(place / f"{time.strftime('%Y-%m-%d', time.gmtime())}.forget.jsonl", "a") as out:
        out.write(json.dumps(told) + "\n")


def forget() -> tuple[int, int, list[str]]:
    """Removes all that is marked as deleted: lines, rows, and the names of what learned from them."""
    gone = feedback.read(feedback.folder()).deleted
    if not gone:
        return 0, 0, []
    lines = sum(_segment(file, gone) for file in _closed_segments())
    rows, learned = 0, []
    for file in sorted(storage.root().glob(f"data/*/{INFO_FILE}")):
        if found := _dataset(file.parent, gone):
            rows += found
            learned.append(f"data set {file.parent.name}, run {file.parent.name}")
    for file in sorted(storage.root().glob(f"*/*/bundle/{replay.MEMORY}")):
        if found := _memory(file.parent, gone):
            rows += found
            learned.append(f"bundle {file.parent}")
    return lines, rows, learned


def _closed_segments() -> Iterator[Path]:
    today = time.strftime("%Y-%m-%d", time.gmtime())
    yield from (file for file in sorted(feedback.folder().glob("*.jsonl")) if not file.name.startswith(today))


def _segment(file: Path, gone: Collection[str]) -> int:
    """The marks stay: bundles and copies elsewhere may hold what they are about."""
    kept, dropped = [], 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            about = row["feedback"]["answer"] if row["says"] != feedback.DELETED else None
        except (ValueError, KeyError, TypeError):
            about = None
        if about in gone:
            dropped += 1
        else:
            kept.append(line)
    if dropped:
        storage.publish(file, b"".join(kept))
    return dropped


def _dataset(folder: Path, gone: Collection[str]) -> int:
    """Writes the shards of a refit's data set again without these rows."""
    info: dict[str, Any] = json.loads((folder / INFO_FILE).read_text())
    if replay.BASES not in info.get("recipe", {}):
        return 0
    dataset, dropped = Dataset.open(folder), 0
    for split in dataset.splits:
        always, turns = dataset.turns(split)
        parts = [[each for file in files for each in _records(file)] for files in (always, *turns)]
        kept = [[each for each in part if each.meta.get("answer") not in gone] for part in parts]
        if [*map(len, kept)] == [*map(len, parts)]:
            continue
        dropped += sum(map(len, parts)) - sum(map(len, kept))
        fewest = min(map(len, kept[1:]), default=0)  # epochs have as many rows
        old = dataset.shard_files(split)
        with ShardWriter(folder, f"{split}.{int(time.time() * 1000)}") as writer:
            for turn, part in enumerate(kept, -1):
                for each in part if turn < 0 else part[:fewest]:
                    writer.add(each)
                writer.cut(turn if turn >= 0 else None)
            rows = len(kept[0]) + fewest * len(turns)
            info["splits"][split] |= {"rows": rows, "shards": writer.close()}
        storage.publish_json(folder / INFO_FILE, info)
        for file in old:
            file.unlink()
            storage.removed(file)
    return dropped


def _records(file: Path) -> Iterator[Record]:
    yield from map(Record.from_row, pq.read_table(storage.source(file)).to_pylist())


def _memory(folder: Path, gone: Collection[str]) -> int:
    table = pq.read_table(storage.fetched(folder / replay.MEMORY))
    kept = [row for row in table.to_pylist() if dict(row["meta"] or ()).get("answer") not in gone]
    if len(kept) < table.num_rows:
        bundles.add(folder, {replay.MEMORY: replay.packed(kept)})
    return int(table.num_rows - len(kept))


if __name__ == "__main__":
    sys.exit(main())
