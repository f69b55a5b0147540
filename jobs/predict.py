"""Answers every row of a data set with a bundle, and keeps the answers: batch inference on Ray Data.

    python -m jobs.predict --bundle demo --data easy_vqa --split test --name easy_vqa_test
    python -m jobs.predict --bundle shop --data jsonl:new.jsonl --map text=question --name new
    python -m jobs.predict --bundle shop --data folder:photos --task classify:kind --name photos --workers 4
    ray job submit -- python -m jobs.predict --bundle demo --data easy_vqa --name easy_vqa

--data is a data set (a name under data/, or a folder), or a source as `jobs.prepare` reads it, whose rows need no right
answer. Writes ROOT/predictions/NAME/SPLIT/part-NNNNN-NNNNN.parquet, one for each row group of the data, with the
columns id, task, label, labels, value, text, spans, confidence, abstained, error, bundle; and predictions.json last. A
row that cannot be answered has an error, and never ends the command. The same --name again does the parts that are not
there yet; what an interrupted command has published stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import cluster, predictions
from jobs.cluster import ClusterError
from jobs.lock import LockError, locked
from jobs.progress import Progress
from jobs.sources import BadRow, Source, SourceError
from jobs.sources.choose import choose
from mmagent import bundle as bundles
from mmagent import shards, storage
from mmagent.arguments import Parser, mapping, positive
from mmagent.bundle import Bundle, BundleError
from mmagent.record import SCHEMA_VERSION
from mmagent.shards import Dataset, DatasetError, ShardWriter

ALL = "all"  # the one split of a source's rows
UNREADABLE = "unreadable.parquet"
_BATCH_ROWS = 64


class PredictError(ValueError):
    """The rows cannot be asked; the message says what to do."""


_EXPECTED = (BundleError, DatasetError, PredictError, SourceError, LockError, storage.StorageError, ClusterError)


def predict(
    found: Bundle, dataset: Dataset, splits: Sequence[str], folder: Path, *, task: str | None = None, workers: int = 2,
    threads: int = 1,
) -> None:  # fmt: skip
    """Answers, on the connected Ray, the row groups of some splits that have no part in `folder` yet.

    Args:
        task: what every row is asked; none: each row's own task.
        workers: processes that answer, each with a copy of the model and `threads` CPU threads.
    """
    from jobs import stream  # brings Ray, which reads its environment when it is imported: after `cluster.connect`

    missing = {
        split: [
            (file, group, rows, part)
            for file, group, rows in stream.row_groups(dataset, split)
            if not (part := folder / split / f"{Path(file).stem}-{group:05d}.parquet").exists()
        ]
        for split in splits
    }
    kwargs = {"bundle": str(found.path), "task": task, "threads": threads}
    with Progress("predict", sum(rows for each in missing.values() for *_, rows, _ in each), "rows") as progress:
        progress.begin()
        for split, each in missing.items():
            if not each:
                continue
            answers = stream.apply(
                dataset, split, predictions.Answering, kwargs, workers=workers, batch_rows=_BATCH_ROWS,
                threads=threads, groups=[(file, group) for file, group, _, _ in each],
            )  # fmt: skip
            tables = stream.cut((table.cast(predictions.SCHEMA) for table in answers), [rows for _, _, rows, _ in each])
            for (_, _, rows, part), table in zip(each, tables, strict=True):
                storage.publish_parquet(part, table)
                progress.add(rows)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        folder = storage.fetched(storage.folder("predictions", options.name))
        with locked(folder):
            result = _run(options, folder)
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error.strerror or error}: {error.filename or storage.root()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was published stays; the same command does the rest", file=sys.stderr)
        return 130
    _print_summary(folder, result)
    return 0


def _run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = bundles.load(options.bundle)
    if options.task is not None and options.task not in found.tasks:
        raise PredictError(f"the bundle {found.name!r} has no task {options.task!r}; it has {', '.join(found.tasks)}")
    source = _source(options, found)
    dataset = None if source is not None else Dataset.open(shards.find(options.data))
    # Asked for before a name is held: what cannot be done leaves nothing behind that refuses the right command.
    splits = [ALL] if dataset is None else _splits(dataset, options.split)
    if dataset is not None:
        _check_tasks(found, dataset, options.task)
    plan = {
        "bundle": {"name": found.name, "sha256": storage.digest(found.path / bundles.MANIFEST)},
        "data": {"name": dataset.name, "sha256": storage.digest(dataset.path / shards.INFO_FILE)}
        if dataset is not None
        else {"source": options.data, "map": options.map, **(source.recipe() if source else {})},
        "splits": splits,
        "task": options.task,
    }
    _hold(folder, json.loads(json.dumps(plan)))
    cluster.connect()
    from jobs import room  # brings Ray, which reads its environment when it is imported

    room.check_answerers(options.workers)
    if dataset is None:
        assert source is not None
        dataset = _questions(source, folder, found, options)
    predict(found, dataset, splits, folder, task=options.task, workers=options.workers, threads=options.threads)
    parts = sorted(part for split in splits for part in (folder / split).glob("[!.]*.parquet"))
    result = {"name": folder.name, **plan, **predictions.summary(parts)}
    storage.publish_json(folder / "predictions.json", result)
    return result


def _source(options: argparse.Namespace, found: Bundle) -> Source | None:
    """What --data reads, where it is a source."""
    kind, colon, _ = options.data.partition(":")
    if not colon or "/" in kind:
        if options.map:
            raise PredictError("--map is for a source (jsonl:FILE, csv:FILE, ...); a data set has its fields")
        return None
    if options.split is not None:
        raise PredictError(f"--split {options.split} is for a data set; a source is asked whole: leave it out")
    limits = found.config.data.media
    return choose(options.data, columns=options.map, task=options.task, asked=found.task, limits=limits)


def _splits(dataset: Dataset, split: str | None) -> list[str]:
    splits = [each for each in dataset.splits if dataset.rows(each)] if split is None else [split]
    if not any(dataset.rows(each) for each in splits):
        raise PredictError(f"{dataset.path} has no rows{f' in {split}' if split else ''}; name another --split")
    return splits


def _check_tasks(found: Bundle, dataset: Dataset, task: str | None) -> None:
    if task is None and not set(dataset.tasks) & set(found.tasks):
        raise PredictError(
            f"the rows of {dataset.name!r} are for {', '.join(dataset.tasks)}, but the bundle {found.name!r} answers "
            f"{', '.join(found.tasks)}: say with --task which of these every row is asked"
        )


def _hold(folder: Path, plan: Mapping[str, Any]) -> None:
    """Ties a name to a bundle and its data; clears away what a killed command was writing.

    Raises:
        PredictError: the name is tied to others.
    """
    file = folder / "plan.json"
    if not file.exists():
        storage.publish_json(file, plan)
    before = json.loads(file.read_text())
    changed = [key for key in plan if before.get(key) != plan[key]]
    if changed:
        details = "; ".join(f"{key}: {before.get(key)!r:.120} then, {plan[key]!r:.120} now" for key in changed)
        raise PredictError(f"the predictions {folder.name} were begun otherwise ({details}); use another --name")
    for draft in folder.glob("*/.*.tmp"):
        draft.unlink()


def _questions(source: Source, folder: Path, found: Bundle, options: argparse.Namespace) -> Dataset:
    """A source's rows as shards, made once. Those that cannot be read become a part of their own, of errors."""
    home = folder / "questions"
    if (home / shards.INFO_FILE).exists():
        return Dataset.open(home)
    shutil.rmtree(home, ignore_errors=True)
    bad: list[tuple[str, str]] = []
    with ShardWriter(home, ALL) as writer, Progress("rows", source.total, "rows") as progress:
        for row in source.rows(options.workers):
            progress.add()
            if isinstance(row, BadRow):
                bad.append((row.id, f"{row.file} row {row.number}: {row.message}"))
            else:
                writer.add(row.record)
        files = writer.close()
    task = options.task or found.task
    if bad:
        storage.publish_parquet(folder / ALL / UNREADABLE, predictions.unreadable(bad, task, found.name))
    info = {
        "format_version": shards.FORMAT_VERSION, "schema_version": SCHEMA_VERSION, "name": folder.name,
        "source": options.data, "task": task, "tasks": {},
        "splits": {ALL: {"rows": sum(each["rows"] for each in files), "shards": files}},
    }  # fmt: skip
    storage.publish_json(home / shards.INFO_FILE, info)
    return Dataset.open(home)


def _print_summary(folder: Path, result: Mapping[str, Any]) -> None:
    print(f"{result['rows']:,} rows: {result['answered']:,} answered, {result['abstained']:,} of them unsure")
    for reason, count in result["errors"]["reasons"].items():
        print(f"not answered: {count} x {reason}")
    print(f"predictions: {folder}")


def _parser() -> Parser:
    parser = Parser("jobs.predict", __doc__)
    parser.add_argument("--bundle", required=True, metavar="B", help="a bundle folder, or the name of a run")
    parser.add_argument("--data", required=True, metavar="D", help="a data set, or a source such as jsonl:FILE")
    parser.add_argument("--name", required=True, metavar="N", help="the predictions' name")
    parser.add_argument("--split", help="of the data set (default: all splits)")
    parser.add_argument("--task", help="what every row is asked (default: each row's own task)")
    parser.add_argument("--map", type=mapping, default={}, help="FIELD=COLUMN,...: which columns of a source to read")
    parser.add_argument("--workers", type=positive, default=2, help="processes that answer (default: 2)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
