"""Asks a bundle every question of a split, and writes how good and how honest its answers are.

    python -m jobs.evaluate --bundle demo --data easy_vqa --split test --out runs/demo --before --without image
    python -m jobs.evaluate --bundle /models/shop --data /data/shop --split test --slices form,channel --out eval/shop
    ray job submit -- python -m jobs.evaluate --bundle demo --data easy_vqa --split test --out runs/demo

The data set may be another one than the bundle was trained on: then what it reaches on its own stands beside, tasks
of other names are matched by kind and labels (or by --tasks THEIRS=OWN), and labels that the bundle does not know are
counted, and count as wrong.

--slices COL,COL also tells the gaps between groups of these columns of meta (`mmagent.fairness`); --swap PAIRS.csv asks
with words swapped for others, such as names or pronouns (`jobs.counterfactual`); what a bundle writes is looked for in
its training texts (`jobs.verbatim`).

Writes into --out: evaluation.json (format: see mmagent/evaluation.py), report.html, a page that stands alone, and
predictions.parquet, a row for each question. Rows that cannot be answered are counted by reason and never end the run.
Paths are absolute or relative to the storage root (MMAGENT_STORAGE). A bundle is a folder or the name of a run; a data
set is a folder or a name under data/.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs import baselines, cluster, counterfactual, transfer, verbatim
from jobs.answers import MODALITIES, Answerer
from jobs.cluster import ClusterError
from jobs.page import SLICES, first_slice, read_curves, write_report
from jobs.progress import Progress
from jobs.summary import table_of
from mmagent import bundle as bundles
from mmagent import evaluation, fairness, predictions, report, shards, storage
from mmagent.arguments import Parser, mapping, positive
from mmagent.bundle import Bundle, BundleError
from mmagent.predictions import EvaluationError
from mmagent.record import Record
from mmagent.shards import Dataset, DatasetError
from mmagent.tasks import make_all
from mmagent.text import BackboneError

_BATCH_ROWS = 64


def evaluate(
    bundle: str | Path,
    dataset: Dataset,
    split: str,
    *,
    out: Path,
    slices: Sequence[str] = SLICES,
    before: bool = False,
    without: str | None = None,
    workers: int = 2,
    threads: int = 1,
    seed: int = 0,
    tasks: Mapping[str, str] | None = None,
    swap: Mapping[str, str] | None = None,
    more: Sequence[report.Section] = (),
) -> dict[str, Any]:
    """Evaluates on the connected Ray, writes the three files into `out`, and returns what evaluation.json holds.

    Args:
        bundle: a folder, or the name of a run.
        slices: keys of the records' meta, or ``modalities``, whose values are reported apart.
        before: also what a majority answer and a linear probe reach, both fitted on the training split.
        without: a modality; also asks every question with it taken away.
        workers: processes that answer, each with a copy of the model and `threads` CPU threads.
        tasks: the bundle's task for a task of the data set, where the names do not say it (see `jobs.transfer`).
        swap: words to be swapped for others, in a second round of questions (see `jobs.counterfactual`).
        more: sections of report.html behind the first one.

    Raises:
        BundleError, DatasetError, BackboneError: what is missing, and where.
        EvaluationError: there is nothing to measure.
    """
    found = bundles.load(bundle)
    named = {each.asked: each.answered for each in _check(found, dataset, split, tasks)}
    bundles.load_model(found)  # weights that do not fit are told here, in one message, not by an actor that dies
    started = time.monotonic()
    table = _predict(found, dataset, split, slices, without, workers, threads, named)
    predicted = time.monotonic()
    storage.publish_parquet(out / "predictions.parquet", table)
    column, made = first_slice(table, slices), make_all(found.tasks)
    others = _before(found, dataset, split, table, named, column, seed) if before else None
    result = evaluation.evaluate(
        table, made, found.task, bundle=found.name, data=dataset.name, split=split, before=others, seed=seed
    )
    result["seconds"] = {"predict": round(predicted - started, 1), "before": round(time.monotonic() - predicted, 1)}
    if swap:
        result["counterfactual"] = counterfactual.ask(
            str(found.path), dataset, split, table, swap, named, workers=workers, threads=threads, seed=seed
        )
    if written := _verbatim(found, dataset, split, table):
        result["verbatim"] = written
    if renamed := {asked: answered for asked, answered in named.items() if asked != answered}:
        result["matched"] = renamed
    if dataset.name != found.manifest.get("data") and (own := _at_home(found, slices, workers, threads, seed)):
        result["own"] = own
    storage.publish_json(out / "evaluation.json", result)
    curves = read_curves(found.path.parent / "metrics.jsonl")
    write_report(result, found, dataset, table, out, slices=slices, seed=seed, curves=curves, more=more)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        dataset = Dataset.open(shards.find(options.data))
        found = bundles.load(options.bundle)
        swap = counterfactual.load(options.swap) if options.swap else None
        # Before Ray is looked for, which takes a while.
        for each in _check(found, dataset, options.split, options.tasks):
            if told := each.told(found.name, dataset.name):
                print(told)
        cluster.connect()
        from jobs import room  # brings Ray, which reads its environment when it is imported

        room.check_answerers(options.workers)
        out = storage.resolve(options.out)
        result = evaluate(
            options.bundle, dataset, options.split, out=out, slices=options.slices, before=options.before,
            without=options.without, workers=options.workers, threads=options.threads, seed=options.seed,
            tasks=options.tasks, swap=swap,
        )  # fmt: skip
    except (BundleError, DatasetError, BackboneError, EvaluationError, storage.StorageError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error.strerror or error}: {error.filename or options.out}", file=sys.stderr)
        return 2
    print(table_of(result))
    for line in _audited(result):
        print(line)
    print(f"report: {out / 'report.html'}")
    return 0


def _verbatim(found: Bundle, dataset: Dataset, split: str, table: pa.Table) -> dict[str, Any]:
    """What is repeated of training, of each task that writes; none where what was learned is not here."""
    writing = [name for name, info in found.tasks.items() if info.kind == "generate"]
    if not writing:
        return {}
    try:
        learned = Dataset.open(storage.folder("data", str(found.manifest.get("data"))))
    except (DatasetError, storage.StorageError):
        return {}
    out = {}
    for name in writing:
        asked = (Record.from_row(row) for part in dataset.read(split) for row in part.to_pylist())
        out[name] = verbatim.repeated(table.filter(pc.equal(table["task"], name)), asked, learned, name)
    return out


def _audited(result: Mapping[str, Any]) -> Iterator[str]:
    """What is told of groups, swapped words and repeated texts."""
    for block in evaluation.blocks(result).values():
        yield from fairness.lines(block.get("gaps", {}))
    if "counterfactual" in result:
        yield from counterfactual.lines(result["counterfactual"])
    for each in result.get("verbatim", {}).values():
        yield verbatim.line(each)


def _parser() -> Parser:
    parser = Parser("jobs.evaluate", __doc__)
    parser.add_argument("--bundle", required=True, metavar="B", help="a bundle folder, or the name of a run")
    parser.add_argument("--data", required=True, metavar="D", help="a data set: a name under data/, or a folder")
    parser.add_argument("--split", default="test", help="the split to ask (default: test)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the three files are written")
    names = ",".join(SLICES)
    parser.add_argument(
        "--slices", type=_names, default=SLICES, metavar="COL,COL", help=f"meta keys reported apart (default: {names})"
    )
    parser.add_argument("--before", action="store_true", help="compare with a majority answer and a linear probe")
    parser.add_argument("--without", choices=MODALITIES, help="also ask everything with this modality taken away")
    parser.add_argument(
        "--swap", type=Path, metavar="PAIRS.csv", help="also ask with words swapped: do answers change?"
    )
    parser.add_argument(
        "--tasks",
        type=mapping,
        default={},
        metavar="THEIRS=OWN",
        help="which task of the bundle answers one of the data",
    )
    parser.add_argument("--workers", type=positive, default=2, help="processes that answer (default: 2)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of intervals, comparisons and examples (default: 0)")
    return parser


def _names(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def _check(
    found: Bundle, dataset: Dataset, split: str, tasks: Mapping[str, str] | None = None
) -> tuple[transfer.Match, ...]:
    if not dataset.rows(split):
        raise DatasetError(f"the split {split!r} of {dataset.path} has no rows; name another one with --split")
    return transfer.match(found, dataset, tasks)


def _at_home(found: Bundle, slices: Sequence[str], workers: int, threads: int, seed: int) -> dict[str, Any] | None:
    """What the bundle reaches on its own data set: as it was measured when it was made, else asked now."""
    if (known := transfer.home(found)) is not None:
        return known
    try:
        dataset = Dataset.open(storage.folder("data", found.manifest["data"]))
        _check(found, dataset, "test")
    except (DatasetError, EvaluationError, storage.StorageError) as error:
        print(f"note: its own data set cannot be set beside: {error}", file=sys.stderr)
        return None
    table = _predict(found, dataset, "test", slices, None, workers, threads, {})
    result = evaluation.evaluate(
        table, make_all(found.tasks), found.task, bundle=found.name, data=dataset.name, split="test", seed=seed
    )
    return transfer.kept(result, evaluation.blocks(result))


def _predict(
    found: Bundle,
    dataset: Dataset,
    split: str,
    slices: Sequence[str],
    without: str | None,
    workers: int,
    threads: int,
    tasks: Mapping[str, str],
) -> pa.Table:
    from jobs import stream  # brings Ray, which reads its environment when it is imported: after `cluster.connect`

    kwargs: dict[str, Any] = {"bundle": str(found.path), "slices": tuple(slices), "without": without}
    kwargs |= {"threads": threads, "tasks": dict(tasks)}
    parts = []
    with Progress("evaluate", dataset.rows(split), "rows") as progress:
        answers = stream.apply(
            dataset, split, Answerer, kwargs, workers=workers, batch_rows=_BATCH_ROWS, threads=threads
        )  # fmt: skip
        for part in answers:
            parts.append(part)
            progress.add(pc.sum(pc.equal(part["without"], "")).as_py() or 0)
    table = pa.concat_tables(parts).cast(predictions.schema(slices))
    for name in set(slices) - set(SLICES):
        if table[predictions.slice_column(name)].null_count == table.num_rows:
            print(f"--slices {name}: no row has this key in its meta", file=sys.stderr)
    return table


def _before(
    found: Bundle,
    dataset: Dataset,
    split: str,
    table: pa.Table,
    tasks: Mapping[str, str],
    column: str | None,
    seed: int,
) -> dict[str, dict[str, Any]]:
    asked, there = {own: name for name, own in tasks.items()}, set(table["task"].to_pylist())
    return {
        task: baselines.before(
            dataset, split, table, found.config, found.tasks, task, asked=asked.get(task), column=column, seed=seed
        )
        for task in sorted(set(found.tasks) & there)
    }


if __name__ == "__main__":
    sys.exit(main())
