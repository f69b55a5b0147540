"""Bundles: what was saved is what is loaded, and what is damaged says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmagent import bundle, text
from mmagent.bundle import BundleError
from mmagent.calibration import Calibration
from mmagent.config import resolve
from mmagent.model import MultimodalModel
from mmagent.predictor import Predictor
from mmagent.record import Record
from tests.conftest import classify

LABELS = ("black", "blue", "green", "red")


@pytest.fixture
def own(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "own"))


def save(path: Path, recipe: dict[str, Any], seed: int = 1) -> tuple[Predictor, dict[str, Any]]:
    """Saves a model of fresh weights; the same model before it was saved, and what it was saved with."""
    config = resolve(recipe, {"seed": seed})
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():  # as if it had been trained
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model = MultimodalModel(config.model, classify(LABELS), encoder.width, None)
    calibration = {"classify": Calibration(temperature=2.0, by_modalities={"text+image": 0.5})}
    infos = {name: task.info for name, task in model.tasks.items()}
    bundle.save(
        path, name="round", config=config, tasks=infos, task="classify", state=model.state_dict(), backbone=encoder,
        tokenizer=tokenizer, calibration=calibration, origin={"run": "r", "data": "d"},
    )  # fmt: skip
    before = Predictor(
        name="round", config=config, tasks=model.tasks, task="classify", model=model, encoder=encoder,
        tokenizer=tokenizer, calibration=calibration, device="cpu",
    )  # fmt: skip
    return before, {"config": config, "calibration": calibration}


def test_a_loaded_bundle_gives_the_same_answers(
    tmp_path: Path, tiny_recipe: dict[str, Any], make_records: Callable[..., list[Record]]
) -> None:
    before, saved = save(tmp_path / "b", tiny_recipe)
    after = Predictor.load(tmp_path / "b", device="cpu")
    records = make_records(16)
    samples = [before.prepare(record) for record in records]
    np.testing.assert_array_equal(after.raws([after.prepare(r) for r in records]), before.raws(samples))
    assert [a.probabilities for a in after.predict(records)] == [a.probabilities for a in before.answer(samples)]
    found = bundle.load(tmp_path / "b")
    assert (found.name, found.labels) == ("round", LABELS)
    assert (found.config, found.calibration) == (saved["config"], saved["calibration"])
    assert found.manifest["modalities"] == ["text", "image", "audio"]
    assert (found.manifest["run"], found.manifest["data"]) == ("r", "d")


def test_a_bundle_needs_nothing_outside_its_folder(
    tmp_path: Path, tiny_recipe: dict[str, Any], tiny_backbone: Path, make_records: Callable[..., list[Record]]
) -> None:
    backbone = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    recipe = {**tiny_recipe, "model": {**tiny_recipe["model"], "backbone": str(backbone)}}
    save(tmp_path / "b", recipe)
    shutil.rmtree(backbone)
    moved = (tmp_path / "b").rename(tmp_path / "elsewhere")
    assert len(Predictor.load(moved, device="cpu").predict(make_records(4))) == 4


def test_a_bundle_is_replaced_whole(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    save(tmp_path / "b", tiny_recipe)
    (tmp_path / "b" / "left_over").touch()
    save(tmp_path / "b", tiny_recipe, seed=2)
    assert bundle.load(tmp_path / "b").config.seed == 2
    assert not (tmp_path / "b" / "left_over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.yaml", "tasks.json", "calibration.json", "backbone/model.safetensors"]
)
def test_a_damaged_or_missing_file_is_named(own: Path, file: str) -> None:
    data = bytearray((own / file).read_bytes())
    data[len(data) // 2] ^= 1
    (own / file).write_bytes(data)
    with pytest.raises(BundleError, match=f"is damaged: {file}"):
        bundle.load(own)
    (own / file).unlink()
    with pytest.raises(BundleError, match=f"lacks {file}"):
        bundle.load(own)


def test_another_format_version_says_what_to_install(own: Path) -> None:
    manifest = json.loads((own / bundle.MANIFEST).read_text())
    (own / bundle.MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(BundleError, match="format version 99, this mmagent reads 1"):
        bundle.load(own)


def test_a_manifest_that_is_torn_is_a_damaged_bundle(own: Path) -> None:
    (own / bundle.MANIFEST).write_text((own / bundle.MANIFEST).read_text()[:40])
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.load(own)


def test_an_unfinished_folder_is_no_bundle(own: Path, storage: Path) -> None:
    (own / bundle.MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"no manifest\.json in"):
        bundle.load(own)
    with pytest.raises(BundleError, match="there is no bundle 'nowhere'") as error:
        bundle.load("nowhere")
    assert str(storage / "runs" / "nowhere" / "bundle") in str(error.value)


@pytest.mark.parametrize("name", ["~nobody\n", "n" * 5_000, "nul\0", "half \ud98d"])
def test_a_name_that_no_file_can_have_is_no_bundle(storage: Path, name: str) -> None:
    with pytest.raises(BundleError, match="there is no bundle"):
        bundle.find(name)


@pytest.mark.parametrize("place", ["runs/demo/bundle", "search/demo/bundle", "demo"])
def test_a_bundle_is_found_by_its_runs_name(storage: Path, tiny_bundle: Path, place: str) -> None:
    shutil.copytree(tiny_bundle, storage / place)
    assert bundle.load("demo").path == storage / place


def test_weights_of_another_shape_are_refused(own: Path) -> None:
    config = (own / "config.yaml").read_text()
    bundle.add(
        own, {"config.yaml": config.replace("width: 32\n  layers: 1\n  heads", "width: 64\n  layers: 1\n  heads")}
    )
    assert bundle.load(own).config.model.width in (32, 64)
    bundle.add(own, {"config.yaml": config.replace("  width: 32", "  width: 64", 1)})
    with pytest.raises(BundleError, match="do not fit its config"):
        bundle.load_model(bundle.load(own))


def test_files_added_later_are_sealed(own: Path) -> None:
    bundle.add(own, {"README.md": "# tiny\n", "golden.jsonl": '{"id": "1"}\n'})
    found = bundle.load(own)
    assert {"README.md", "golden.jsonl"} <= set(found.manifest["files"])
    assert found.golden() == [{"id": "1"}]
    (own / "README.md").write_text("# other\n")
    with pytest.raises(BundleError, match=r"is damaged: README\.md"):
        bundle.load(own)
