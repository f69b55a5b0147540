"""Few labels: what is drawn of each kind of task, by the seed alone, and read as a data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import draw, prepare, stream
from mmagent.order import Order
from mmagent.record import Record
from mmagent.shards import Dataset


def prepared(storage: Path, name: str, rows: Sequence[dict[str, Any]], *flags: str) -> Dataset:
    """A data set as the command makes it, two of its rows in validation and two in test."""
    file = storage / f"{name}.jsonl"
    splits = {0: "validation", 1: "validation", 2: "test", 3: "test"}
    lines = [json.dumps({"id": str(i), "split": splits.get(i, "train"), **row}) for i, row in enumerate(rows)]
    file.write_text("\n".join(lines) + "\n")
    assert prepare.main(["--source", f"jsonl:{file}", "--name", name, "--workers", "1", *flags]) == 0
    return Dataset.open(storage / "data" / name)


def records(dataset: Dataset) -> list[Record]:
    return [Record.from_row(row) for part in dataset.read("train") for row in part.to_pylist()]


@pytest.fixture
def topics(storage: Path) -> Dataset:
    """300 rows of three classes, of which one has four rows."""
    rows = [{"text": f"say {i}", "label": "rare" if i in (9, 90, 190, 290) else ("a", "b")[i % 2]} for i in range(300)]
    return prepared(storage, "topics", rows)


def test_so_many_rows_of_each_class(topics: Dataset, tmp_path: Path) -> None:
    few = draw.drawn(topics, 10, 0, tmp_path / "few")
    assert Counter(record.target.label for record in records(few)) == {"a": 10, "b": 10, "rare": 4}
    assert few.rows("train") == 24
    info = few.tasks["classify"]
    assert info.labels == topics.tasks["classify"].labels
    assert info.counts == {"a": 10, "b": 10, "rare": 4}
    assert info.rows == {"train": 24, "validation": 2, "test": 2}
    assert few.info["splits"]["train"]["labels"] == {"a": 10, "b": 10, "rare": 4}
    assert few.name == "topics"
    # The other splits are where they were.
    assert few.shard_files("test") == topics.shard_files("test")
    assert sum(len(part) for part in few.read("test")) == 2


def test_the_draw_is_a_function_of_the_seed_and_the_data(topics: Dataset, tmp_path: Path) -> None:
    def ids(per_class: int, seed: int, place: str) -> list[str]:
        return [record.id for record in records(draw.drawn(topics, per_class, seed, tmp_path / place))]

    five = ids(5, 0, "five")
    assert ids(5, 0, "again") == five
    assert ids(5, 1, "other") != five
    assert set(five) <= set(ids(10, 0, "ten"))  # of one seed, more labels are the same and others
    # A folder that holds another draw is written anew, one that holds this draw is left alone.
    written = (tmp_path / "five" / "dataset.json").stat().st_mtime_ns
    assert ids(5, 0, "five") == five
    assert (tmp_path / "five" / "dataset.json").stat().st_mtime_ns == written
    assert ids(5, 1, "five") == ids(5, 1, "other")
    # All rows, where there are no more.
    assert ids(1000, 0, "all") == [record.id for record in records(topics)]


def test_the_stream_takes_it_as_any_data_set(topics: Dataset, tmp_path: Path) -> None:
    few = draw.drawn(topics, 5, 0, tmp_path / "few")
    order = stream.order_of(few, "train", seed=0, window_rows=8)
    assert isinstance(order, Order)
    assert order.rows == 14


def test_rows_of_several_labels_hold_each_label(storage: Path, tmp_path: Path) -> None:
    sets: tuple[list[str], ...] = ([], ["x"], ["y"], ["x", "y"], ["x", "y", "z"])
    rows = [{"text": f"say {i}", "labels": sets[i % 5]} for i in range(104)]
    dataset = prepared(storage, "sets", rows, "--task", "multilabel")
    taken = records(draw.drawn(dataset, 6, 3, tmp_path / "few"))
    held = Counter(label for record in taken for label in record.target.labels or ("",))
    assert set(held) == {"", "x", "y", "z"}
    assert min(held.values()) >= 6
    assert held[""] == 6  # rows without any label are a class too
    assert len(taken) <= 6 * 4  # each row that was taken was wanted for a label


def test_entities_are_drawn_by_their_types(storage: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"ann is in rome {i}", "spans": [{"start": 0, "end": 3, "label": "who"}] * (i % 3 > 0)
         + [{"start": 10, "end": 14, "label": "where"}] * (i % 3 > 1)}
        for i in range(64)
    ]  # fmt: skip
    dataset = prepared(storage, "entities", rows, "--task", "tag")
    taken = records(draw.drawn(dataset, 4, 0, tmp_path / "few"))
    kinds = Counter(len(record.target.spans or ()) for record in taken)
    assert kinds[0] == 4
    assert kinds[2] == 4
    assert 4 <= kinds[1] + kinds[2] <= 8


def test_a_number_is_drawn_so_many_times_in_all(storage: Path, tmp_path: Path) -> None:
    dataset = prepared(storage, "scores", [{"text": f"say {i}", "value": float(i % 7)} for i in range(60)])
    few = draw.drawn(dataset, 8, 0, tmp_path / "few")
    values = [record.target.value for record in records(few)]
    assert len(values) == 8
    info = few.tasks["regress"]
    assert info.mean == pytest.approx(sum(v or 0.0 for v in values) / 8)  # of the drawn rows: no other was seen
    with pytest.raises(draw.DrawError, match=r"data\.labels_per_class=1 is too small"):
        draw.drawn(dataset, 1, 0, tmp_path / "one")


def test_each_task_is_drawn_apart(storage: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"say {i}", "task": "classify:mood", "label": "ab"[i % 2]} if i % 4 < 2 else
        {"text": f"say {i}", "task": "regress:score", "value": float(i)}
        for i in range(4, 120)
    ]  # fmt: skip
    head = [{"text": "hm", "task": "classify:mood", "label": "a"}] * 4
    dataset = prepared(storage, "both", [*head, *rows])
    few = draw.drawn(dataset, 3, 0, tmp_path / "few")
    assert Counter(record.task for record in records(few)) == {"classify:mood": 6, "regress:score": 3}
    assert {name: info.rows["train"] for name, info in few.tasks.items()} == {"classify:mood": 6, "regress:score": 3}


def test_a_storage_root_that_lies_elsewhere_has_it_still(
    topics: Dataset, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw.drawn(topics, 5, 0, storage / "runs" / "few" / "drawn")
    moved = storage.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("MMAGENT_STORAGE", str(moved))
    few = Dataset.open(moved / "runs" / "few" / "drawn")
    assert few.shard_files("test") == Dataset.open(moved / "data" / "topics").shard_files("test")
    assert sum(len(part) for part in few.read("validation")) == 2
