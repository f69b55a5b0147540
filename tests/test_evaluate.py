"""jobs.evaluate on a tiny bundle and data set: the answers, the comparison, and the command itself on a real Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cluster, evaluate, transfer
from jobs import page as pages
from jobs.answers import Answerer
from mmagent import bundle as bundles
from mmagent import evaluation, predictions
from mmagent import storage as storages
from mmagent.record import SCHEMA_VERSION, Media, Record, Target
from mmagent.shards import Dataset, ShardWriter
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all

COLOURS = ["black", "blue", "green", "red"]


def write(
    folder: Path, splits: dict[str, Sequence[Record]], labels: Sequence[str] = COLOURS, task: str = "classify"
) -> Dataset:
    """A data set as `jobs.prepare` leaves it."""
    info: dict[str, Any] = {}
    for split, records in splits.items():
        with ShardWriter(folder, split, row_group_rows=16) as writer:
            for record in records:
                writer.add(record)
            info[split] = {"rows": len(records), "shards": writer.close()}
    document = {
        "format_version": 1, "schema_version": SCHEMA_VERSION, "name": folder.name, "source": "tests", "seed": 0,
        "created_ms": 0, "task": task, "tasks": {task: {"labels": list(labels)}}, "splits": info,
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
    own = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, own)
    rows = Answerer(str(own), ("form",), None, threads=1)(pa.concat_tables(dataset.read("test")))
    tasks = make_all(bundles.load(own).tasks)
    result = evaluation.evaluate(rows, tasks, "classify", bundle="tiny", data="colours", split="test")
    pages.describe(own, dataset, result)
    again = bundles.load(own)  # sealed anew: its hashes hold
    assert "README.md" in again.manifest["files"]
    assert json.loads((own / "metrics.json").read_text())["n"] == 40
    assert "# tiny" in (own / "README.md").read_text()


@pytest.mark.long
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
    assert result["unknown_labels"] == {"violet": 1}
    assert result["unanswered"]["regress"]["n"] == 1
    told = capsys.readouterr().out
    assert "counted as wrong: violet (1): 1 of 7 rows" in told
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


def renamed(records: Sequence[Record], task: str) -> list[Record]:
    return [replace(record, task=task) for record in records]


def tell_home(bundle: Path, data: str = "home") -> None:
    """As if the bundle had been evaluated on its own data set."""
    number = {"value": 0.875, "low": 0.8, "high": 0.9}
    block = {
        "task": "classify",
        "main": "accuracy",
        "n": 64,
        "metrics": {"accuracy": number, "ece": number},
        "slices": {},
    }
    found = {"data": data, "split": "test", **block, "tasks": {"classify": block}}
    bundles.add(bundle, {"metrics.json": json.dumps(found)})


@pytest.mark.long
def test_a_second_domain_beside_its_own(
    ray_cluster: cluster.Cluster, storage: Path, tiny_bundle: Path, tmp_path: Path,
    make_records: Callable[..., list[Record]], capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    own = tmp_path / "tiny"
    shutil.copytree(tiny_bundle, own)
    tell_home(own)
    records = make_records(12, "test")
    records[0] = replace(records[0], target=Target(label="violet"))
    shades = {"train": make_records(16), "test": records}
    splits: dict[str, Sequence[Record]] = {key: renamed(rows, "classify:shade") for key, rows in shades.items()}
    write(storage / "data" / "away", splits, labels=("blue", "red", "violet"), task="classify:shade")
    given = ["--bundle", str(own), "--data", "away", "--out", "eval/away", "--workers", "1", "--before"]
    assert evaluate.main(given) == 0
    told = capsys.readouterr().out
    assert "the task classify:shade of away is answered by classify of tiny: 2 of its 3 labels are the bundle's" in told
    assert "violet (1): 1 of 12 rows" in told
    assert "the same bundle on its own data set and on this one" in told
    assert "87.5" in told
    result = json.loads((storage / "eval" / "away" / "evaluation.json").read_text())
    assert result["matched"] == {"classify:shade": "classify"}
    assert (result["task"], result["n"], result["unknown_rows"]) == ("classify", 12, 1)
    assert result["unknown_labels"] == {"violet": 1}
    assert result["own"]["data"] == "home"
    assert result["own"]["tasks"]["classify"]["metrics"]["accuracy"]["value"] == 0.875
    assert set(result["before"]) == {"majority", "linear_probe"}
    page = (storage / "eval" / "away" / "report.html").read_text()
    assert "Its own domain and this one" in page
    assert "home (test)" in page


@pytest.mark.long
def test_its_own_data_set_is_asked_where_it_never_was(
    ray_cluster: cluster.Cluster, storage: Path, tiny_bundle: Path, make_records: Callable[..., list[Record]]
) -> None:
    """The bundle was made of data called tiny, and holds no evaluation."""
    write(storage / "data" / "tiny", {"test": make_records(8, "test")})
    write(storage / "data" / "away", {"test": make_records(4, "test")})
    assert evaluate.main(["--bundle", str(tiny_bundle), "--data", "away", "--out", "eval/x", "--workers", "1"]) == 0
    result = json.loads((storage / "eval" / "x" / "evaluation.json").read_text())
    assert (result["own"]["data"], result["own"]["tasks"]["classify"]["n"], result["n"]) == ("tiny", 8, 4)


def test_which_task_answers_which(storage: Path, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    infos = {
        "classify:mood": TaskInfo("classify:mood", ("bad", "good", "so-so")),
        "classify:kind": TaskInfo("classify:kind", ("a", "b", "good")),
        "regress": TaskInfo("regress", mean=0.0, deviation=1.0),
    }
    bundle = bundles.load(make_bundle(tmp_path / "three", infos, "regress"))

    def asked(tasks: dict[str, Any], wanted: dict[str, str] | None = None) -> dict[str, str]:
        info = {"name": "other", "tasks": tasks, "splits": {}}
        found = transfer.match(bundle, Dataset(tmp_path, info), wanted)
        return {each.asked: each.answered for each in found}

    feeling = {"classify:feeling": {"labels": ["bad", "good"]}}
    assert asked(feeling) == {"classify:feeling": "classify:mood"}  # two labels in common, not one
    assert asked(feeling, {"classify:feeling": "classify:kind"}) == {"classify:feeling": "classify:kind"}
    assert asked({"regress:stars": {}, **feeling}) == {"classify:feeling": "classify:mood", "regress:stars": "regress"}
    # A task of one name is never given to another.
    both = {"classify:mood": {"labels": ["bad"]}, "classify:x": {"labels": ["bad", "good", "so-so"]}}
    assert asked(both) == {"classify:mood": "classify:mood", "classify:x": "classify:kind"}
    for tasks, wanted, words in (
        ({"classify:x": {"labels": ["good"]}}, None, "might be answered by classify:kind or classify:mood"),
        ({"tag": {"labels": ["good"]}}, None, "none is in both"),
        ({"classify:x": {"labels": ["violet"]}}, None, "none of one kind have a label in common"),
        ({"classify:mood": {"labels": ["violet"]}}, None, "they have no label in common"),
        (feeling, {"classify:feeling": "regress"}, "of two kinds"),
        (feeling, {"classify:feelin": "regress"}, "'other' has no task 'classify:feelin'"),
    ):
        with pytest.raises(predictions.EvaluationError, match=words):
            asked(tasks, wanted)
