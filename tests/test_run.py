"""What is checked before a run's workers start: a mistake is told at once, and mended under the same name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import run
from mmagent.config import resolve
from mmagent.record import Record
from mmagent.shards import Dataset
from mmagent.text import BackboneError


@pytest.fixture
def recipe(
    storage: Path,
    tiny_recipe: dict[str, Any],
    make_records: Callable[..., list[Record]],
    make_dataset: Callable[..., Dataset],
) -> dict[str, Any]:
    make_dataset(storage / "data" / "tiny", {split: make_records(8) for split in ("train", "validation", "test")})
    return tiny_recipe


def test_a_missing_model_is_told_before_workers_start(storage: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match="/no/such/model does not exist"):
        run.prepare(resolve(recipe, {"model.backbone": "/no/such/model"}), storage / "runs" / "r")
    assert not (storage / "runs" / "r").exists()


def test_a_model_without_weights_is_told(storage: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    for file in Path(recipe["model"]["backbone"]).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BackboneError, match=r"has no weights: \*\.safetensors"):
        run.prepare(resolve(recipe, {"model.backbone": str(tmp_path)}), storage / "runs" / "r")


def test_a_run_without_a_checkpoint_takes_another_config(storage: Path, recipe: dict[str, Any]) -> None:
    folder = storage / "runs" / "r"
    run.prepare(resolve(recipe, {"optim.lr": 0.5}), folder)
    prepared = run.prepare(resolve(recipe, {"optim.lr": 0.001}), folder)
    assert prepared.config.optim.lr == 0.001
    assert "lr: 0.001" in (folder / "config.yaml").read_text()


def test_a_run_that_trained_keeps_its_config(storage: Path, recipe: dict[str, Any]) -> None:
    folder = storage / "runs" / "r"
    run.prepare(resolve(recipe, {}), folder)
    (folder / "bundle").mkdir()
    (folder / "bundle" / "manifest.json").write_text("{}")
    with pytest.raises(run.RunError, match=r"optim\.lr: was 0\.001, is 0\.5"):
        run.prepare(resolve(recipe, {"optim.lr": 0.5}), folder)
