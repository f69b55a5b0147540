"""jobs.evaluate on a tiny bundle and data set: the answers, the comparison, and the command itself on a real Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cluster, evaluate
from jobs.answers import Answerer
from mmagent import bundle as bundles
from mmagent import evaluation
from mmagent import storage as storages
from mmagent.record import SCHEMA_VERSION, Media, Record, Target
from mmagent.shards import Dataset, ShardWriter
from mmagent.tasks import make_all

COLOURS = ["black", "blue", "green", "red"]


def write(folder: Path, splits: dict[str, Sequence[Record]], labels: Sequence[str] = COLOURS) -> Dataset:
    """A data set as `jobs.prepare` leaves it."""
    info: dict[str, Any] = {}
    for split, records in splits.items():
        with ShardWriter(folder, split, row_group_rows=16) as writer:
            for record in records:
                writer.add(record)
            info[split] = {"rows": len(records), "shards": writer.close()}
    document = {
        "format_version": 1, "schema_version": SCHEMA_VERSION, "name": folder.name, "source": "tests", "seed": 0,
        "created_ms": 0, "task": "classify", "tasks": {"classify": {"labels": list(labels)}}, "splits": info,
        "quarantine": {"rows": 0},
    }  # fmt: skip
    storages.publish_json(folder / "dataset.json", document)
    return Dataset.open(folder)


@pytest.fixture
def dataset(storage: Path, make_records: Callable[..., list[Record]]) -> Dataset:
    test = make_records(40, "test")
    test.append(replace(test[0], id="damaged", images=(Media(b"no picture"),)))
    test.append(replace(test[0], id="unlabelled", target=Target()))
    return write(storage / "data" / "colours", {"train": make_records(48), "validation": make_records(8), "test": test})


def test_the_command_on_ray(
    ray_cluster: cluster.Cluster, dataset: Dataset, tiny_bundle: Path, storage: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--data", "colours", "--out", "eval/tiny", "--workers", "1"]
    assert evaluate.main([*arguments, "--before", "--without", "image"]) == 0
    out = storage / "eval" / "tiny"
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["bundle"], result["data"], result["n"]) == ("tiny", "colours", 40)
    assert result["errors"]["n"] == 2
    assert result["blind"]["n"] == 41  # the damaged picture is gone, the missing label is not
    assert set(result["before"]) == {"majority", "linear_probe"}
    assert {"form=text", "form=speech", "modalities=text+image"} <= set(result["slices"])
    table = pq.read_table(out / "predictions.parquet")
    assert table["id"].to_pylist()[:2] == ["test-0", "test-1"]
    page = (out / "report.html").read_text()
    assert "<audio" in page
    assert "Evaluation of tiny" in page
    shown = capsys.readouterr()
    assert "form=speech" in shown.out
    assert "not answered: 1 x no usable right answer: no label" in shown.out


def test_the_result_goes_into_the_bundle(dataset: Dataset, tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, own)
    rows = Answerer(str(own), ("form",), None, threads=1)(pa.concat_tables(dataset.read("test")))
    tasks = make_all(bundles.load(own).tasks)
    result = evaluation.evaluate(rows, tasks, "classify", bundle="tiny", data="colours", split="test")
    evaluate.describe(own, dataset, result)
    again = bundles.load(own)  # sealed anew: its hashes hold
    assert "README.md" in again.manifest["files"]
    assert json.loads((own / "metrics.json").read_text())["n"] == 40
    assert "# tiny" in (own / "README.md").read_text()


def test_another_data_set_is_asked_and_its_strange_labels_are_named(
    ray_cluster: cluster.Cluster, storage: Path, tiny_bundle: Path, make_records: Callable[..., list[Record]],
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    records = make_records(8, "test")
    records[0] = replace(records[0], target=Target(label="violet"))
    records[1] = replace(records[1], task="regress", target=Target(value=1.0))
    write(storage / "data" / "other", {"test": records}, labels=("red", "violet"))
    arguments = ["--bundle", str(tiny_bundle), "--data", "other", "--out", "eval/other", "--workers", "1"]
    assert evaluate.main(arguments) == 0
    result = json.loads((storage / "eval" / "other" / "evaluation.json").read_text())
    assert result["unknown_labels"] == ["violet"]
    assert result["unanswered"]["regress"]["n"] == 1
    told = capsys.readouterr().out
    assert "counted as wrong: violet" in told
    assert "task regress: not answered: 1 x this bundle has no task 'regress', but classify" in told


def test_data_without_a_label_in_common_is_refused(
    storage: Path, tiny_bundle: Path, make_records: Callable[..., list[Record]], capsys: pytest.CaptureFixture
) -> None:
    write(storage / "data" / "other", {"test": make_records(4, "test")}, labels=("violet",))
    assert evaluate.main(["--bundle", str(tiny_bundle), "--data", "other", "--out", "eval/other"]) == 2
    assert "they have no label in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bundel", "x"], "unknown flag --bundel: did you mean --bundle?"),
        (["--bundle", "b", "--data", "nowhere", "--out", "o"], "is not there; make it with"),
        (["--bundle", "b", "--data", "colours", "--out", "o", "--without", "smell"], "invalid choice: 'smell'"),
        (["--bundle", "b", "--data", "colours", "--out", "o", "--workers", "0"], "1 or more is wanted"),
        (["--bundle", "nowhere", "--data", "colours", "--out", "o"], "there is no bundle 'nowhere'"),
        (["--bundle", "TINY", "--data", "colours", "--out", "o", "--split", "dev"], "has no split 'dev'"),
    ],
)
def test_a_mistake_is_one_message(
    ray_cluster: cluster.Cluster, dataset: Dataset, tiny_bundle: Path, capsys: pytest.CaptureFixture,
    arguments: list[str], words: str,
) -> None:  # fmt: skip
    given = [str(tiny_bundle) if item == "TINY" else item for item in arguments]
    try:
        status = evaluate.main(given)
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert words in capsys.readouterr().err
