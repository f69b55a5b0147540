"""The measurement of freezing, on tiny data: each figure is there and stands for what its name says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmagent.record import Record
from mmagent.shards import Dataset
from tests.bench import freeze


@pytest.mark.long
def test_a_small_measurement_writes_every_figure(
    storage: Path, tmp_path: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
) -> None:  # fmt: skip
    make_dataset(storage / "data" / "tiny", {"train": make_records(32)})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe))
    monkeypatch.setenv("SCALE", "small")
    monkeypatch.setattr(freeze, "ROUNDS", 1)
    assert freeze.main(["train.micro_batch=4"], recipe, ("lora:2",), tmp_path) == 0
    written = json.loads((tmp_path / "runs" / "bench" / "freeze.json").read_text())
    found = {row["id"]: row["value"] for row in written["rows"]}
    figures = ("samples_per_s", "peak_mb", "trained_share", "zero_samples_per_s", "zero_peak_mb")
    assert list(found) == [f"freeze.lora2.{figure}" for figure in figures]
    assert found["freeze.lora2.samples_per_s"] > 0
    assert found["freeze.lora2.zero_samples_per_s"] > 0
    assert 0 < found["freeze.lora2.trained_share"] < 1
    assert 100 < found["freeze.lora2.peak_mb"] < 100_000
