"""A run before its first step: what cannot work is told then, and a name belongs to one config and one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster, run, train
from jobs.checkpoint import Checkpoints
from mmagent import storage as storages
from mmagent.config import Config, resolve
from mmagent.order import Position
from mmagent.record import Record, Target
from mmagent.shards import Dataset, DatasetError
from mmagent.text import BackboneError

CHECKOUT = Path(__file__).parents[1]
Prepare = Callable[..., run.Run]


@pytest.fixture
def dataset(storage: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]]) -> Dataset:
    splits = {"train": make_records(50), "validation": make_records(8, "validation")}
    return make_dataset(storage / "data" / "tiny", splits)


@pytest.fixture
def prepare(tiny_recipe: dict[str, Any], dataset: Dataset) -> Prepare:
    def made(overrides: Mapping[str, Any] | None = None, name: str = "r") -> run.Run:
        small = {"train.micro_batch": 4, "train.epochs": 2, "cluster.workers": 2, **(overrides or {})}
        return run.prepare(resolve(tiny_recipe, small), storages.folder("runs", name))

    return made


def begun(prepared: run.Run) -> None:
    """As if it had trained up to step 3."""
    folder = prepared.folder / "checkpoints"
    state = {"step": 3, "score": 0.5, "loss": 1.0, "position": {"epoch": 0, "window": 0, "row": 24}}
    Checkpoints(folder, rank=0, barrier=bool, keep_last=1).save(lambda path: (path / "part").touch(), state)


def test_what_is_fixed_before_the_first_step(prepare: Prepare) -> None:
    prepared = prepare()
    assert (prepared.name, prepared.exported, prepared.resumed_step()) == ("r", False, 0)
    assert prepared.plan.tasks["classify"].labels == ("black", "blue", "green", "red")
    assert prepared.plan.total_steps == 14  # 50 rows in batches of 8, twice
    assert prepare({"train.max_steps": 5}, "s").plan.total_steps == 5
    config = yaml.safe_load((prepared.folder / "config.yaml").read_text())
    assert resolve(config, {}) == prepared.config


def test_a_window_is_what_the_config_says_and_holds_a_batch(prepare: Prepare) -> None:
    """Whatever the number of workers, so that the order of rows is the same; a window's last batch may be short."""
    for workers in (1, 2, 5):
        order = prepare({"data.window_rows": 10, "train.global_batch": 8, "cluster.workers": workers}).plan.order
        assert order.window_rows == 10
        assert order.steps(1, 8) == 10
    assert prepare({"data.window_rows": 3}).plan.order.window_rows == 8


def test_rare_labels_weigh_more_where_asked(
    prepare: Prepare, storage: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]]
) -> None:
    assert prepare().plan.label_weights == {"classify": {}}
    records = [replace(record, target=Target(label="red")) for record in make_records(30)] + make_records(10)
    make_dataset(storage / "data" / "uneven", {"train": records, "validation": make_records(8)})
    flat = prepare({"data.name": "uneven", "train.class_balance": 0.0}, "flat").plan.label_weights
    assert flat == {"classify": {}}
    weights = prepare({"data.name": "uneven", "train.class_balance": 1.0}, "even").plan.label_weights["classify"]
    counts = json.loads((storage / "data" / "uneven" / "dataset.json").read_text())["splits"]["train"]["labels"]
    assert list(weights) == ["black", "blue", "green", "red"]
    masses = [weight * counts[label] for label, weight in weights.items()]
    assert masses == pytest.approx([10.0] * 4)  # each label counts the same, and the whole as much as before


def test_a_run_goes_on_only_with_its_own_config(prepare: Prepare) -> None:
    first = prepare()
    assert prepare({"optim.lr": 0.5}).config.optim.lr == 0.5  # nothing was trained yet: nothing is lost
    begun(prepare())
    assert prepare().resumed_step() == 3
    with pytest.raises(run.RunError) as error:
        prepare({"optim.lr": 0.5, "freeze.strategy": "all"})
    words = str(error.value)
    assert "the run 'r' began with another config" in words
    assert f"optim.lr: was {first.config.optim.lr}, is 0.5" in words
    assert "freeze.strategy: was 'connector', is 'all'" in words
    assert "another --name" in words
    assert resolve(yaml.safe_load((first.folder / "config.yaml").read_text()), {}) == first.config


@pytest.mark.parametrize(
    "other",
    [
        {"cluster.workers": 3},
        {"cluster.workers": 1, "train.accumulation": 2, "zero.stage": 3},
        {"train.micro_batch": 1, "train.gradient_checkpointing": True},
        {"cluster.workers": 4, "cluster.min_workers": 2, "zero.offload": "optimizer"},
    ],
)
def test_a_run_goes_on_with_other_workers_and_keeps_its_batch(prepare: Prepare, other: dict[str, Any]) -> None:
    settings = {"train.eval_every_epochs": 1.0, "train.eval_every_steps": 1}
    begun(first := prepare(settings))
    again = prepare({**settings, **other})
    assert first.config.global_batch == again.config.global_batch == 8
    assert again.plan.total_steps == first.plan.total_steps
    assert again.plan.order.window_rows == first.plan.order.window_rows
    assert again.config.train.eval_every_steps == first.config.train.eval_every_steps
    assert prepare(settings).config == first.config  # and back again


def test_a_run_does_not_go_on_with_another_batch(prepare: Prepare) -> None:
    begun(prepare())
    with pytest.raises(run.RunError, match=r"train\.global_batch: was 8, is 16"):
        prepare({"train.global_batch": 16})


def test_a_run_that_has_its_bundle_keeps_its_config(prepare: Prepare) -> None:
    bundle = prepare().folder / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(run.RunError, match=r"optim\.lr: was 0\.001, is 0\.5"):
        prepare({"optim.lr": 0.5})


def test_a_run_at_its_end_has_no_step_left(prepare: Prepare) -> None:
    prepared = prepare()
    begun(prepared)
    assert prepared.at_its_end().plan.total_steps == 3
    assert prepared.plan.total_steps == 14


# ---------------------------------------------------------------------------------------------- bad input


def without_rows(dataset: Dataset, split: str) -> None:
    change(dataset, lambda info: info["splits"][split].update(rows=0, shards=[], labels={}))


def unknown_label(dataset: Dataset) -> None:
    change(dataset, lambda info: info["splits"]["validation"]["labels"].update(purple=1))


def no_labels(dataset: Dataset) -> None:
    change(dataset, lambda info: info["tasks"]["classify"].update(labels=[]))


def change(dataset: Dataset, how: Callable[[dict[str, Any]], None]) -> None:
    info = json.loads((dataset.path / "dataset.json").read_text())
    how(info)
    storages.publish_json(dataset.path / "dataset.json", info)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda dataset: without_rows(dataset, "train"), "no rows in its split 'train'"),
        (lambda dataset: without_rows(dataset, "validation"), "no rows in its split 'validation'"),
        (unknown_label, "labels that training never has: ['purple']"),
        (no_labels, "labels that training never has: ['black'"),
    ],
)
def test_a_data_set_that_cannot_be_trained_on(
    prepare: Prepare, dataset: Dataset, damage: Callable[[Dataset], None], words: str
) -> None:
    damage(dataset)
    with pytest.raises(run.RunError) as error:
        prepare()
    assert words in str(error.value)
    assert str(dataset.path) in str(error.value)


def test_a_data_set_that_is_not_there(prepare: Prepare) -> None:
    with pytest.raises(DatasetError, match=r"is not there; make it with.*\n*.*jobs\.prepare"):
        prepare({"data.name": "nowhere"})


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (None, "does not exist"),
        ("tokenizer.json", "has no tokenizer"),
        ("config.json", "has no config.json"),
        ("model.safetensors", r"has no weights: \*\.safetensors"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_told_before_workers_start(
    prepare: Prepare, tiny_backbone: Path, tmp_path: Path, lost: str | None, words: str
) -> None:
    own = tmp_path / "model"
    if lost is not None:
        shutil.copytree(tiny_backbone, own)
        (own / lost).unlink()
    with pytest.raises(BackboneError, match=words) as error:
        prepare({"model.backbone": str(own)}, "unmade")
    assert str(own) in str(error.value)
    assert not storages.folder("runs", "unmade").exists()


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optim.lrr=0.1"], "unknown key 'optim.lrr': did you mean 'optim.lr'?"),
        (["train.epochs=many"], "train.epochs: got 'many'"),
        (["data.name=nowhere"], "python -m jobs.prepare"),
        (["--nam", "x"], "did you mean --name?"),
        (["model.backbone=/nowhere/model"], "the model folder /nowhere/model does not exist"),
        (["model.heads=5"], "is not a multiple of model.heads=5"),
        (["freeze.strategy=top:9"], "has 2 layers"),
        (["model.image.tokens=5"], "model.image.tokens=5 is no square number"),
    ],
)
def test_the_command_says_a_mistake_in_one_message_and_trains_nothing(
    ray_cluster: cluster.Cluster, dataset: Dataset, tiny_recipe: dict[str, Any], storage: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str,
) -> None:  # fmt: skip
    given = ["--config", str(write_recipe(tmp_path, tiny_recipe)), "--name", "r", *arguments]
    try:
        status = train.main(given)
    except SystemExit as stop:
        status = int(stop.code or 0)
    shown = capsys.readouterr().err
    assert status == 2
    assert words in shown
    assert "Traceback" not in shown
    assert not (storage / "runs" / "r" / "ray").exists()


def test_a_recipe_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "/nowhere.yaml", "--name", "r"]) == 2
    assert "cannot read the recipe /nowhere.yaml" in capsys.readouterr().err


def test_the_stream_of_a_resumed_run_begins_where_it_stopped(prepare: Prepare) -> None:
    prepared = prepare()
    begun(prepared)
    order, found = prepared.plan.order, Position(0, 0, 24)
    parts = list(order.parts(found, 14 - 3, 8))
    assert sum(part.steps(8) for part in parts) >= 11
    assert parts[0].skip == 24


def test_the_config_that_is_compared_is_the_resolved_one(prepare: Prepare) -> None:
    begun(prepare())
    config: Config = prepare({"optim.lr": 1e-3, "train.patience": 0}).config  # the defaults, written out
    assert config.train.patience == 0
