"""jobs.baselines: what simpler answers reach, by hand and on plain colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import baselines
from mmagent import bundle as bundles
from mmagent import predictions
from mmagent.record import Message, Record, Target
from mmagent.shards import Dataset
from mmagent.targets import TaskInfo
from mmagent.tasks import make


def table_of(records: Sequence[Record], column: str = "form") -> pa.Table:
    """Predictions without answers: what the baselines read of them."""
    rows = [
        {
            "id": r.id,
            "group": r.id,
            "task": "classify",
            "without": "",
            "label": r.target.label,
            f"slice.{column}": r.meta.get(column),
        }
        for r in records
    ]
    return pa.Table.from_pylist(rows, predictions.schema([column]))


def test_the_majority_answer_by_hand(storage: Path, make_dataset: Callable[..., Dataset]) -> None:
    def ask(key: str, words: str, label: str | None, **meta: str) -> Record:
        return Record(key, (Message("user", words),), target=Target(label=label), meta={"form": "text", **meta})

    train = [ask("1", "shape?", "red"), ask("2", "shape?", "red"), ask("3", "shape?", "blue")]
    train += [ask("4", "tie?", "green"), ask("5", "tie?", "black"), ask("6", "once?", "blue")]
    validation = [ask("7", "shape?", "blue"), ask("8", "shape?", "blue")]  # turns the majority
    test = [
        ask("a", "shape?", "blue"),
        ask("b", "other words", "blue", question="shape?", form="speech"),
        ask("c", "tie?", "black"),  # of equals the first in the alphabet
        ask("d", "never seen", "blue"),  # the most frequent of all
        ask("e", "shape?", "red"),
        ask("f", "shape?", None),
    ]
    dataset = make_dataset(storage / "data" / "hand", {"train": train, "validation": validation, "test": test})
    found = baselines.majority(dataset, "test", table_of(test), make(TaskInfo("classify")))
    assert found["n"] == 5
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(4 / 5)
    assert found["slices"]["form=speech"]["metrics"]["accuracy"]["value"] == 1.0


def test_the_linear_probe_sees_colours_in_an_untrained_tower(
    storage: Path,
    tiny_bundle: Path,
    make_records: Callable[..., list[Record]],
    make_dataset: Callable[..., Dataset],
) -> None:
    test = make_records(24, "test")
    dataset = make_dataset(storage / "data" / "probe", {"train": make_records(48), "test": test})
    found = bundles.load(tiny_bundle)
    once, again = (
        baselines.linear_probe(
            dataset, "test", table_of(test), found.config, found.tasks, "classify", column="form", seed=0
        )
        for _ in range(2)
    )
    assert once == again
    assert once["metrics"]["accuracy"]["value"] > 0.9  # four plain colours are linear in almost anything
    assert once["slices"]["form=speech"]["n"] == 12
    assert "fitted on 48 training rows" in once["what"]


def test_picking_reads_the_wanted_records(
    storage: Path, make_records: Callable[..., list[Record]], make_dataset: Callable[..., Dataset]
) -> None:
    dataset = make_dataset(storage / "data" / "picked", {"test": make_records(40, "test")})
    picked = list(baselines.pick(dataset, "test", ["test-30", "test-2", "unknown"]))
    assert [record.id for record in picked] == ["test-2", "test-30"]
    assert picked[0].images[0].bytes


def test_the_constant_answers_by_hand(
    storage: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]]
) -> None:
    dataset = make_dataset(storage / "data" / "hand", {"train": make_records(8)})
    labels = ("a", "b", "c")
    # Of ten rows nine have a, five b, one c: {a} makes 18/25, {a, b} 28/35, all three 30/45.
    many = TaskInfo("multilabel", labels, Counter(a=9, b=5, c=1), rows={"train": 10})
    dataset.info["tasks"] = {"multilabel": many.to_dict()}
    rows = [
        {"id": key, "group": key, "task": "multilabel", "without": "", "label": "", "truth": truth}
        for key, truth in (("1", '["a"]'), ("2", '["a", "b"]'))
    ]
    table = pa.Table.from_pylist(rows, predictions.schema([]))
    found = baselines.constant(dataset, table, make(many))
    assert found["what"].endswith(": a, b")
    assert found["metrics"]["micro_f1"]["value"] == pytest.approx(2 * 3 / (4 + 3))
