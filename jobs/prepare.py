"""Makes a data set of a source: Parquet shards of the record schema under ROOT/data/NAME.

    python -m jobs.prepare --source easy_vqa --name easy_vqa
    python -m jobs.prepare --source jsonl:rows.jsonl --name shop --map text=question,label=answer --group-by customer
    python -m jobs.prepare --source csv:train.csv --test test.csv --name shop
    python -m jobs.prepare --source parquet:DIR --name birds           (as Hugging Face datasets writes it)
    python -m jobs.prepare --source folder:photos --name photos        (a sub-folder for each label)
    python -m jobs.prepare --source hf:OWNER/NAME:CONFIG --name glue   (a hub id, or a folder of save_to_disk)
    python -m jobs.prepare --source conll:DIR --name entities          (train.txt, dev.txt, test.txt)
    python -m jobs.prepare --source squad:train-v2.0.json --test dev-v2.0.json --name squad
    python -m jobs.prepare --source parallel:text.de,text.en --name de_en
    python -m jobs.prepare --source webdataset:tars/train-*.tar --name captions --map answer=text
    python -m jobs.prepare --check --name shop --config jobs/recipes/small.yaml
    ray job submit -- python -m jobs.prepare --source easy_vqa --name easy_vqa

A row's task is what --task says, or its column task, or what its answer is: label, labels, value, spans, answer,
answers or candidates (the README has the table). Rows of several tasks may stand together where each names its own.
A row that cannot be used is set aside in ROOT/data/NAME/quarantine with its reason; above --max-bad-share nothing is
published. The folder appears whole, by a rename: an interrupted command leaves no data set, and is simply run again.

--check looks at every row of the data set, made just now or before: what cannot be used, silent or clipped sound, odd
sample rates, blank or repeated pictures, media and rows on both sides of a split, one question with several answers,
lengths, labels. It is told here, and kept in ROOT/data/NAME/check.json, whose warnings a training begins with. With
--config lengths are tokens of that recipe's language model. Pictures and sounds may be as large as data.media of that
recipe allows, also where the data set is made.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import diagnosis
from jobs.check import check
from jobs.pool import PoolError
from jobs.progress import Progress
from jobs.sources import BadRow, Source, SourceError, tally
from jobs.sources.choose import choose
from jobs.sources.cut import Cut
from jobs.sources.quarantine import Quarantine
from jobs.sources.spool import Spool
from jobs.sources.tally import Tally
from mmagent import config as configs
from mmagent import shards, storage, targets
from mmagent.arguments import Parser, mapping, positive
from mmagent.record import SCHEMA_VERSION

_SHOWN = 10  # labels named in a note


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.source is None and not options.check:
        parser.error("--source is missing: easy_vqa, or KIND:PLACE; --help lists them (--check alone needs none)")
    try:
        _run(options)
        return 0
    except (SourceError, storage.StorageError, shards.DatasetError, configs.ConfigError, PoolError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error.strerror or error}: {error.filename or storage.root()}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: what was not whole is not published; run the same command again", file=sys.stderr)
        return 130
    return 2


def _run(options: argparse.Namespace) -> None:
    folder = storage.folder("data", options.name)
    if options.source is not None:
        _make(options, folder)
    if options.check:
        print(diagnosis.show(check(shards.Dataset.open(folder), _config(options), options.workers)))
        print(f"checked: {folder / diagnosis.FILE}")


def _config(options: argparse.Namespace) -> configs.Config | None:
    return configs.load(options.config, [f"data.name={options.name}"]) if options.config else None


def _make(options: argparse.Namespace, folder: Path) -> None:
    config = _config(options)
    with _claim(folder) as draft:
        source = choose(
            options.source,
            seed=options.seed,
            validation_share=options.validation_share,
            columns=options.map,
            group_by=options.group_by,
            task=options.task,
            test=options.test,
            limits=config.data.media if config else None,
        )
        recipe = json.loads(json.dumps(_settings(options) | source.recipe()))  # as it reads in dataset.json
        if folder.exists() and not options.replace:
            _compare(folder, recipe)
            return
        started_s = time.monotonic()
        info = _write(source, draft, options, recipe)
        _publish(draft, folder)
    _print_summary(folder, info, time.monotonic() - started_s)


def _write(source: Source, draft: Path, options: argparse.Namespace, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the whole data set into `draft`, its dataset.json last."""
    cut = Cut(options.seed, {"validation": options.validation_share, "test": options.test_share}, source.splits)
    tallies = {split: Tally() for split in shards.SPLITS}
    with ExitStack() as stack:
        quarantine = stack.enter_context(Quarantine(draft, total=source.total, max_share=options.max_bad_share))
        writers = {split: stack.enter_context(shards.ShardWriter(draft, split)) for split in shards.SPLITS}
        spool = None if source.shuffled else stack.enter_context(Spool(draft / ".spool"))
        progress = stack.enter_context(Progress("rows", source.total, "rows"))
        for row in source.rows(options.workers):
            progress.add()
            if isinstance(row, BadRow):
                quarantine.add(row)
                continue
            split = cut.split_of(row.record)
            tallies[split].add(row)
            record = replace(row.record, split=split)
            if split == "train" and spool is not None:
                spool.add(record)
            else:
                writers[split].add(record)
        tally.check(tallies, cut.splits)
        for record in spool.shuffled(options.seed) if spool else ():
            writers["train"].add(record)
        files = {split: writer.close() for split, writer in writers.items()}
    tasks = tally.tasks(tallies)
    info = {
        "format_version": shards.FORMAT_VERSION,
        "schema_version": SCHEMA_VERSION,
        "name": options.name,
        "source": options.source,
        "created_ms": int(time.time() * 1000),
        "seed": options.seed,
        "task": next(iter(tasks)),
        "tasks": {name: task.to_dict() for name, task in tasks.items()},
        "splits": {split: tallies[split].to_dict() | {"shards": files[split]} for split in shards.SPLITS},
        "quarantine": quarantine.to_dict(),
        "recipe": recipe,
    }
    storage.publish_json(draft / shards.INFO_FILE, info)
    return info


@contextmanager
def _claim(folder: Path) -> Iterator[Path]:
    """Holds the name of a data set for this command, and gives an empty folder beside it to write into.

    The kernel lets go of the lock when the command dies, however it dies; what it left is removed by the next one.

    Raises:
        SourceError: another command holds the name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("draft", "old"))
    with open(folder.with_name(f".{folder.name}.lock"), "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise SourceError(
                f"the data set {folder.name} is being prepared by {lock.read().strip() or 'another command'}; "
                "wait for it, or use another --name"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        if old.exists() and not folder.exists():  # killed between the two renames of _publish
            old.rename(folder)
        for path in (draft, old):
            shutil.rmtree(path, ignore_errors=True)
        draft.mkdir()
        try:
            with storage.lease(folder):
                yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    storage.removed(folder / shards.INFO_FILE)
    storage.send(folder)


def _compare(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Says that the data set is there already.

    Raises:
        SourceError: it was made in another way, or it is damaged.
    """
    try:
        dataset = shards.Dataset.open(folder)
    except shards.DatasetError as error:
        raise SourceError(f"{error}. To make it again: the same command with --replace") from error
    made: dict[str, Any] = dataset.info["recipe"]
    changed = sorted(key for key in made.keys() | recipe.keys() if made.get(key) != recipe.get(key))
    if changed:
        details = "; ".join(f"{key}: {made.get(key)!r:.80} then, {recipe.get(key)!r:.80} now" for key in changed[:5])
        raise SourceError(
            f"the data set {folder.name} exists already, made in another way ({details}); "
            "use another --name, or --replace to make it anew"
        )
    print(f"the data set {folder.name} is already there, made of the same source in the same way: {folder}")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    keys = ("source", "map", "group_by", "task", "test", "validation_share", "test_share", "seed", "max_bad_share")
    return {key: getattr(options, key) for key in keys}


def _print_summary(folder: Path, info: Mapping[str, Any], passed_s: float) -> None:
    for split, counts in info["splits"].items():
        modalities = ", ".join(f"{name} {count:,}" for name, count in counts["modalities"].items())
        print(f"{split:<11}{counts['rows']:>9,} rows in {len(counts['shards'])} shards ({modalities})")
    aside = info["quarantine"]
    if aside["rows"]:
        print(f"set aside  {aside['rows']:>9,} rows: {aside['reasons']}: see {folder / aside['file']}")
    for name, task in info["tasks"].items():
        _print_notes(name, task)
    tasks = ", ".join(f"{name}: {_known(task)}" for name, task in info["tasks"].items())
    print(f"{tasks}; prepared in {passed_s:.0f} s: {folder}")


def _known(task: Mapping[str, Any]) -> str:
    if task["mean"] is not None:
        return f"mean {task['mean']:g}, deviation {task['deviation']:g}"
    return f"{len(task['labels'])} labels" if task["labels"] else f"{task['rows']['train']:,} rows"


def _print_notes(name: str, task: Mapping[str, Any]) -> None:
    """What stops nothing, and may surprise."""
    missing = [split for split, count in task["rows"].items() if not count]
    if missing:
        print(f"note: {name} has no rows in {' and '.join(missing)}: it cannot be measured there")
    rare = [label for label, count in task["counts"].items() if count == 1]
    if rare:
        more = f" and {len(rare) - _SHOWN} more" if len(rare) > _SHOWN else ""
        print(
            f"note: {len(rare)} of {len(task['labels'])} labels of {name} occur once in training: "
            f"{', '.join(map(repr, rare[:_SHOWN]))}{more}"
        )


def _parser() -> Parser:
    parser = Parser("jobs.prepare", __doc__)
    parser.add_argument("--source", help="easy_vqa, or KIND:PLACE, see above; may be left out with --check")
    parser.add_argument("--name", required=True, help="the data set's name")
    parser.add_argument("--map", type=mapping, default={}, help="FIELD=COLUMN,...: which columns hold the fields")
    parser.add_argument(
        "--task",
        type=_task,
        help="KIND or KIND:NAME of every row (default: their column task, or what the answers are)",
    )
    parser.add_argument("--group-by", metavar="COLUMN", help="rows with one value of it go into one split together")
    parser.add_argument("--test", metavar="PATH", help="the test split, of the same kind as the source")
    parser.add_argument("--validation-share", type=float, default=0.1, help="cut out of training (default %(default)s)")
    parser.add_argument("--test-share", type=float, default=0.1, help="cut out of training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the cut and of all that is drawn (default %(default)s)")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="of rows set aside (default %(default)s)")
    parser.add_argument("--workers", type=positive, default=_cores(), help="processes (default: all cores)")
    parser.add_argument("--replace", action="store_true", help="make the data set anew where it exists")
    parser.add_argument("--check", action="store_true", help="look at every row, and write check.json")
    parser.add_argument(
        "--config", type=Path, metavar="RECIPE", help="whose limits of media hold, and with --check whose tokens"
    )
    return parser


def _task(text: str) -> str:
    try:
        targets.kind(text)
    except targets.TargetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
