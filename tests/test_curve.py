"""A learning curve as a user makes it: stopped, gone on with, made longer; and what it leaves behind."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster, run, train
from mmagent import bundle
from mmagent.config import ConfigError, resolve
from mmagent.record import Record
from mmagent.shards import Dataset

Command = Callable[..., int]


@pytest.fixture
def command(
    ray_cluster: cluster.Cluster, storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
) -> Iterator[Command]:  # fmt: skip
    """``command("name", "key=value", ...)``: the exit status of a training on text, in plain torch."""
    splits = {split: make_records(count, split) for split, count in (("train", 96), ("validation", 8), ("test", 16))}
    make_dataset(storage / "data" / "tiny", splits)
    recipe = {
        **tiny_recipe,
        "model": {**tiny_recipe["model"], "audio": tiny_recipe["model"]["audio"] | {"layers": 0}},
        "optim": {"lr": 5.0e-3},
        "train": {"micro_batch": 8, "epochs": 1, "min_steps": 3, "eval_every_steps": 2, "eval_rows": 8},
        "cluster": {"workers": 1, "max_failures": 0},
        "zero": {"engine": "torch"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda name, *arguments: train.main(["--config", str(tmp_path / "recipe.yaml"), "--name", name, *arguments])
    assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]  # a run gives the signals back (Ray takes SIGTERM)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_learning_curve(command: Command, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = storage / "runs" / "curve"
    assert command("curve", "data.labels_per_class=[2,1]", "train.seeds=2") == 0
    shown = capsys.readouterr().out
    assert "[1 of 4] 1 labels of each class, seed 0" in shown
    assert "[4 of 4] 2 labels of each class, seed 1" in shown
    assert "run n1_seed0: 4 rows of tiny, 3 steps of 8 samples" in shown
    assert f"bundle  {folder / 'bundle'}: of 2 labels of each class, seed 0; the others are not kept" in shown
    found = json.loads((folder / "curve.json").read_text())
    assert (found["data"], found["split"]) == ("tiny", "test")
    steps = found["tasks"]["classify"]["points"]
    assert [(step["labels_per_class"], step["rows"], len(step["values"])) for step in steps] == [(1, 4, 2), (2, 8, 2)]
    assert all(0 <= value <= 1 for step in steps for value in step["values"])
    assert steps[0]["mean"] == pytest.approx(sum(steps[0]["values"]) / 2)
    assert (
        " ± "
        in shown.splitlines()[
            [line.strip().startswith("labels per class") for line in shown.splitlines()].index(True) + 1
        ]
    )
    assert found["bundle"] == {"run": "n2_seed0", "labels_per_class": 2, "seed": 0}

    # The bundle is that run's, its evaluation the curve's own; of the others only figures are left.
    kept = bundle.load("curve")
    assert (kept.name, kept.manifest["run"], kept.config.seed) == ("curve", "n2_seed0", 0)
    assert kept.config.data.labels_per_class == 2
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["metrics"]["accuracy"]["value"] == steps[1]["values"][0]
    page = (folder / "report.html").read_text()
    assert "Few labels" in page
    assert "labels of each class" in page
    assert sorted(path.name for path in (folder / "points").glob("*/bundle")) == []
    assert not (folder / "points" / "n1_seed0" / "checkpoints").exists()

    # The same command does nothing again; a longer list does what is missing.
    times = {path: path.stat().st_mtime_ns for path in folder.glob("points/*/point.json")}
    assert command("curve", "data.labels_per_class=[2,1]", "train.seeds=2") == 0
    assert "steps of 8 samples" not in capsys.readouterr().out
    assert command("curve", "data.labels_per_class=[1,2,3]", "train.seeds=1", "--no-evaluate") == 0
    shown = capsys.readouterr().out
    assert shown.count("steps of 8 samples") == 1
    assert "run n3_seed0: 12 rows of tiny" in shown
    assert "those runs were not asked the test split" in shown
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert bundle.load("curve").manifest["run"] == "n3_seed0"

    # Another config is another curve; a curve is no run.
    assert command("curve", "data.labels_per_class=[1,2]", "optim.lr=0.1") == 2
    assert (
        "the learning curve 'curve' began with another config (optim.lr: was 0.005, is 0.1)" in capsys.readouterr().err
    )
    assert command("curve") == 2
    assert "data.labels_per_class" in capsys.readouterr().err


def test_a_list_is_for_the_training_command_alone(
    storage: Path, tiny_recipe: dict[str, Any], make_dataset: Callable[..., Dataset],
    make_records: Callable[..., list[Record]],
) -> None:  # fmt: skip
    make_dataset(storage / "data" / "tiny", {"train": make_records(16), "validation": make_records(4)})
    config = resolve(tiny_recipe, {"data.labels_per_class": [1, 2]})
    with pytest.raises(run.RunError, match="is a learning curve"):
        run.prepare(config, storage / "runs" / "r")
    prepared = run.prepare(resolve(tiny_recipe, {"data.labels_per_class": 2}), storage / "runs" / "r")
    assert prepared.plan.order.rows == 8
    assert prepared.plan.tasks["classify"].rows["train"] == 8
    assert prepared.plan.total_steps == 3
    longer = run.prepare(
        resolve(tiny_recipe, {"data.labels_per_class": 2, "train.min_steps": 7}), storage / "runs" / "s"
    )
    assert longer.plan.total_steps == 7


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data.labels_per_class": 0}, "greater than 0"),
        ({"data.labels_per_class": [5, -1]}, "greater than 0"),
        ({"data.labels_per_class": []}, "numbers are wanted"),
        ({"data.labels_per_class": 5, "data.share": 0.5}, "give one of them"),
        ({"train.seeds": 0}, r"train\.seeds"),
    ],
)
def test_a_draw_that_means_nothing(tiny_recipe: dict[str, Any], overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(tiny_recipe, overrides)
