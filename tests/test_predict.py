"""Batch inference on a real Ray: what is published stays, what is missing is done, what is damaged says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import predict
from mmagent.predictor import Predictor
from mmagent.record import Media, Record
from mmagent.shards import Dataset

ROWS = 40


@pytest.fixture
def dataset(storage: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]]) -> Dataset:
    """Two splits, of 40 rows in five row groups and of 8 rows in one; the eleventh row's picture is damaged."""
    records = make_records(ROWS)
    records[10] = replace(records[10], images=(Media(b"no picture"),))
    splits = {"train": records, "test": make_records(8, "test")}
    return make_dataset(storage / "data" / "colours", splits, row_group_rows=8)


def asked(bundle: Path, name: str, *more: str, data: str = "colours") -> int:
    return predict.main(["--bundle", str(bundle), "--data", data, "--name", name, "--workers", "1", *more])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.rglob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [{**row, "confidence": None} for row in one] == [{**row, "confidence": None} for row in other]
    assert [row["confidence"] for row in one] == pytest.approx([row["confidence"] for row in other], abs=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_every_row_is_answered_and_the_same_command_does_the_rest(
    storage: Path, dataset: Dataset, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(tiny_bundle, "all") == 0
    folder = storage / "predictions" / "all"
    parts = sorted(folder.rglob("part-*.parquet"))
    assert [str(part.relative_to(folder)) for part in parts] == [
        "test/part-00000-00000.parquet", *(f"train/part-00000-{group:05d}.parquet" for group in range(5)),
    ]  # fmt: skip
    rows = rows_of(folder / "train")
    assert [row["id"] for row in rows] == [f"train-{index}" for index in range(ROWS)]
    records = [Record.from_row(row) for table in dataset.read("train") for row in table.to_pylist()]
    good = [index for index in range(ROWS) if index != 10]
    expected = Predictor.load(tiny_bundle).predict([records[index] for index in good])
    assert [rows[index]["label"] for index in good] == [answer.label for answer in expected]
    assert {row["error"] for row in rows} == {None, rows[10]["error"]}
    assert rows[10]["error"].startswith("images[0]: not a picture")
    assert (rows[10]["label"], rows[10]["confidence"]) == (None, None)
    assert {row["bundle"] for row in rows} == {"tiny"}

    done = json.loads((folder / "predictions.json").read_text())
    assert (done["rows"], done["parts"], done["answered"]) == (ROWS + 8, 6, ROWS + 7)
    assert done["errors"]["rows"] == 1
    assert "48 rows: 47 answered" in capsys.readouterr().out

    # As after a kill: half of the parts, a draft, no summary.
    before = rows_of(folder)
    kept = {part: part.stat().st_mtime_ns for part in parts[::2]}
    for part in parts[1::2]:
        part.unlink()
    (folder / "train" / ".part-00000-00001.parquet.1.tmp").write_bytes(b"half")
    (folder / "predictions.json").unlink()
    assert asked(tiny_bundle, "all") == 0
    same(rows_of(folder), before)
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert json.loads((folder / "predictions.json").read_text()) == done
    assert not list(folder.rglob(".*.tmp"))

    # The name is tied to what it was begun with.
    assert asked(tiny_bundle, "all", "--split", "test") == 2
    assert "begun otherwise (splits: ['train', 'test'] then" in capsys.readouterr().err


@pytest.mark.usefixtures("ray_cluster")
def test_a_file_without_answers_is_asked_as_it_is(
    storage: Path, tiny_bundle: Path, make_png: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (storage / "red.png").write_bytes(make_png("red"))
    (storage / "bad.png").write_bytes(b"no picture")
    lines: list[dict[str, Any]] = [
        {"question": "what color is the shape?", "image": "red.png"},
        {"question": "what color is it?", "image": "bad.png"},
        {"question": "is it there?", "task": "tag"},
        {"question": "is it blue?"},
    ]
    file = storage / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert asked(tiny_bundle, "new", "--map", "text=question", data="jsonl:rows.jsonl") == 0, capsys.readouterr().err
    folder = storage / "predictions" / "new"
    rows = {row["id"]: row for row in rows_of(folder / "all")}
    assert {id: row["label"] is not None for id, row in rows.items()} == {
        "rows-1": True,
        "rows-3": False,
        "rows-4": True,
    }
    assert "no task 'tag'; it has classify" in rows["rows-3"]["error"]
    [bad] = pq.read_table(folder / "all" / predict.UNREADABLE).to_pylist()
    assert (bad["id"], bad["label"]) == ("rows-2", None)
    assert "not a picture" in bad["error"]
    done = json.loads((folder / "predictions.json").read_text())
    assert (done["rows"], done["answered"], done["errors"]["rows"]) == (4, 2, 2)

    # Another file under the same name.
    file.write_text(json.dumps(lines[0]) + "\n")
    assert asked(tiny_bundle, "new", "--map", "text=question", data="jsonl:rows.jsonl") == 2
    assert "begun otherwise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "data", "says"),
    [
        (["--task", "sing"], "colours", "no task 'sing'; it has classify"),
        (["--split", "dev"], "colours", "has no split 'dev'"),
        (["--map", "text=q"], "colours", "--map is for a source"),
        (["--split", "test"], "jsonl:rows.jsonl", "--split test is for a data set"),
        ([], "jsonl:none.jsonl", "does not exist"),
        ([], "nowhere", "is not there"),
    ],
)
def test_a_wrong_command_says_what_to_do(
    dataset: Dataset, tiny_bundle: Path, storage: Path, capsys: pytest.CaptureFixture[str], more: list[str], data: str,
    says: str,
) -> None:  # fmt: skip
    assert asked(tiny_bundle, "n", *more, data=data) == 2
    assert says in capsys.readouterr().err
    assert not (storage / "predictions" / "n" / "plan.json").exists()
