"""What simpler answers reach on the same questions: the `before` of an evaluation.

Where an answer is one label (classify, relate): the most frequent one to the same question text, which looks at no
picture and hears no sound; and a linear probe, logistic regression on the features of the model before fine-tuning.
Where it is any number of labels, or a number: the one answer that suits most training rows. Other tasks have none.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from jobs.progress import Progress
from mmagent import comparison, predictions, storage
from mmagent.batch import PartError
from mmagent.config import Config
from mmagent.predictions import EvaluationError
from mmagent.predictor import Predictor
from mmagent.record import Record, segments
from mmagent.shards import Dataset
from mmagent.targets import TaskInfo
from mmagent.tasks import Decision, Task, make

TRAIN = "train"
PROBE_TRAIN_ROWS = 6_000
PROBE_TEST_ROWS = 1_000  # of each value of the slice column
_BATCH = 64


def before(
    dataset: Dataset,
    split: str,
    table: pa.Table,
    config: Config,
    infos: Mapping[str, TaskInfo],
    task: str,
    *,
    asked: str | None = None,
    column: str | None,
    seed: int = 0,
) -> dict[str, Any]:
    """What simpler answers reach on one task, by name; empty where there is none to compare with.

    Args:
        asked: how the data set calls the task, where by another name.
        table: predictions on `split`, of all tasks.
        config, infos: the bundle's.
        column: the slice whose values the probe is tested on alike.
    """
    mine = table.filter(pc.and_(pc.equal(table["task"], task), pc.equal(table["without"], "")))
    mine = mine.filter(pc.is_valid(mine["label"]))
    if not mine.num_rows:
        return {}
    made, asked = make(infos[task]), asked or task
    if made.kind in ("multilabel", "regress"):
        return {"constant": constant(dataset, mine, made, asked=asked, seed=seed)}
    if made.kind in ("classify", "relate"):
        probe = linear_probe(dataset, split, mine, config, infos, task, asked=asked, column=column, seed=seed)
        return {"majority": majority(dataset, split, mine, made, asked=asked, seed=seed), "linear_probe": probe}
    return {}


def constant(
    dataset: Dataset, table: pa.Table, task: Task, *, asked: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """The same answer to everything: the mean of the training values, or the set of labels with the best micro F1 on
    the training rows (the k most frequent ones, for the best k).

    Raises:
        EvaluationError: the data set has no such task in training.
    """
    info = dataset.tasks.get(asked or task.name)
    if info is None or not info.rows.get(TRAIN, 0):
        raise EvaluationError(f"the data set {dataset.name!r} has no training rows of the task {task.name!r}")
    if task.kind == "regress":
        said, what = Decision(value=info.mean or 0.0), f"the mean of the training values, {info.mean or 0.0:.4g}"
    else:
        labels = _best_set(info.counts, info.rows[TRAIN])
        said = Decision(labels=labels, probabilities={k: n / info.rows[TRAIN] for k, n in info.counts.items()})
        what = f"the labels that suit most training rows, the same everywhere: {', '.join(labels) or 'none'}"
    return comparison.compare_answers(table, task, [said] * table.num_rows, what, seed=seed)


def majority(
    dataset: Dataset, split: str, table: pa.Table, task: Task, *, asked: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """The answer that the other splits give most often to a record's question (``meta.question`` where it is, e.g. the
    words of a spoken one, else its text); to a question never seen the most frequent answer of all.

    Args:
        table: predictions on `split`, whose rows are judged.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for other in (TRAIN, *({"validation"} & set(dataset.splits) - {split})):
        for question, label in _questions(dataset, other, "target", asked or task.name):
            if label is not None:
                counts[question][label] += 1
    everywhere = sum(counts.values(), Counter())
    if not everywhere:
        raise EvaluationError(f"the data set {dataset.name!r} has no training rows of the task {task.name!r}")
    best = {question: _most(counter) for question, counter in counts.items()}
    questions = _questions(dataset, split, "id", asked or task.name)
    guess = {key: best.get(question) or _most(everywhere) for question, key in questions}
    rows = zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)
    hits = [None if label is None else guess[key] == label for key, label in rows]
    what = "the most frequent answer to the same question in training and validation"
    return comparison.compare(table, hits, what, name=task.score, seed=seed)


def linear_probe(
    dataset: Dataset,
    split: str,
    table: pa.Table,
    config: Config,
    infos: Mapping[str, TaskInfo],
    task: str,
    *,
    asked: str | None = None,
    column: str | None,
    seed: int,
) -> dict[str, Any]:
    """Logistic regression on standardised features of the untrained model: mean states of the text, mean tokens of
    pictures and of sounds. Fitted on `PROBE_TRAIN_ROWS` seeded rows; tested on `PROBE_TEST_ROWS` of each value of the
    slice `column`, or of the whole split.

    Raises:
        BackboneError: the pretrained model that the config names is not there.
    """
    rng = np.random.default_rng(seed)
    training = [
        key
        for part in dataset.read(TRAIN, columns=["id", "task"])
        for key, name in zip(part["id"].to_pylist(), part["task"].to_pylist(), strict=True)
        if name == (asked or task)
    ]
    wanted = _some(training, PROBE_TRAIN_ROWS, rng)
    tested = sorted({key for ids in _cells(table, column) for key in _some(ids, PROBE_TEST_ROWS, rng)})
    predictor = Predictor.untrained(config, {task: infos[task]}, task)
    with Progress("linear probe", len(wanted) + len(tested), "rows") as progress:
        x, y, _ = _features(predictor, dataset, TRAIN, wanted, progress)
        probe = _fit(x, y, seed)
        x_test, y_test, ids = _features(predictor, dataset, split, tested, progress)
    right = dict(zip(ids, (probe.predict(x_test) == y_test).tolist(), strict=True))
    hits = [right.get(key) for key in table["id"].to_pylist()]
    what = (
        f"logistic regression on the features of the model before fine-tuning, fitted on {len(y):,} training rows, "
        f"tested on {len(ids):,} questions"
    )
    return comparison.compare(table, hits, what, name=predictor.tasks[task].score, seed=seed)


def pick(dataset: Dataset, split: str, ids: Sequence[str]) -> Iterator[Record]:
    """The records of these ids, in the order of the shards; only row groups that hold one of them are read whole."""
    wanted = pa.array(ids, pa.string())
    for file in dataset.shard_files(split):
        with pq.ParquetFile(storage.source(file)) as shard:
            for group in range(shard.num_row_groups):
                mask = pc.is_in(shard.read_row_group(group, columns=["id"])["id"], value_set=wanted)
                if pc.any(mask).as_py():
                    yield from map(Record.from_row, shard.read_row_group(group).filter(mask).to_pylist())


def _questions(dataset: Dataset, split: str, column: str, task: str) -> Iterator[tuple[str, Any]]:
    """The question of each row of a task, with its label (`column` target) or its id."""
    for part in dataset.read(split, columns=[column, "task", "messages", "meta"]):
        for row in part.to_pylist():
            if row["task"] != task:
                continue
            value = (row["target"] or {}).get("label") if column == "target" else row["id"]
            yield dict(row["meta"] or ()).get("question") or _words(row), value


def _words(row: Mapping[str, Any]) -> str:
    contents = (message["content"] or "" for message in row["messages"] or ())
    return " ".join(words.strip() for content in contents for kind, words in segments(content) if kind == "text")


def _best_set(counts: Mapping[str, int], rows: int) -> tuple[str, ...]:
    """The labels that, said of every row, have the best micro F1: 2 hits / (said + right)."""
    ranked = sorted(counts, key=lambda label: (-counts[label], label))
    total, hits, best, kept = sum(counts.values()), 0, 0.0, 0
    for size, label in enumerate(ranked, 1):
        hits += counts[label]
        if (score := 2 * hits / (size * rows + total)) > best:
            best, kept = score, size
    return tuple(ranked[:kept])


def _most(counter: Counter[str]) -> str:
    """The most frequent one, of equals the first in the alphabet."""
    return min(counter, key=lambda label: (-counter[label], label))


def _cells(table: pa.Table, column: str | None) -> list[list[str]]:
    """Ids of the rows with a label, for each value of the slice `column`."""
    known = table.filter(pc.is_valid(table["label"]))
    if column is None:
        return [known["id"].to_pylist()]
    cells: dict[str, list[str]] = defaultdict(list)
    values = known[predictions.slice_column(column)].to_pylist()
    for key, value in zip(known["id"].to_pylist(), values, strict=True):
        if value is not None:
            cells[value].append(key)
    return [cells[value] for value in sorted(cells)]


def _some(ids: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    return [ids[index] for index in rng.permutation(len(ids))[:count]]


def _features(
    predictor: Predictor, dataset: Dataset, split: str, ids: Sequence[str], progress: Progress
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features (n, channels), labels (n,) and ids of the rows that have a label and can be read."""
    records = pick(dataset, split, ids)
    blocks: list[np.ndarray] = []
    labels: list[str] = []
    read: list[str] = []
    skipped = 0
    while group := list(itertools.islice(records, _BATCH)):
        samples = []
        for record in group:
            if record.target.label is None:
                skipped += 1
                continue
            try:
                samples.append(predictor.prepare(replace(record, task=predictor.task)))
            except PartError:  # counted; the evaluation itself names the reasons
                skipped += 1
                continue
            labels.append(record.target.label)
            read.append(record.id)
        if samples:
            blocks.append(predictor.features(samples))
        progress.add(len(group))
    if skipped:
        print(f"linear probe: {skipped} rows of {split} have no label or cannot be read", file=sys.stderr)
    if len(set(labels)) < 2:
        raise EvaluationError(f"a linear probe wants rows of two labels or more in the split {split!r}")
    return np.concatenate(blocks), np.array(labels), read


def _fit(features: np.ndarray, labels: np.ndarray, seed: int) -> Pipeline:
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=100, random_state=seed))
    with warnings.catch_warnings():
        # 100 steps are where its accuracy has long settled; waiting for the last digit of the loss buys nothing.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features, labels)
    return probe
