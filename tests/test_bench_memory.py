"""The measurement of memory: what it counts, on a small BERT; its formula; and the page that it fills."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from jobs.ranks import together
from tests.bench import figures, memory


def test_the_formula_by_hand() -> None:
    """For 7.5 billion parameters and 64 ranks, as the paper's figure 1 has it, but in fp32."""
    total = {stage: sum(memory.per_parameter(stage, 64).values()) * 7.5 for stage in memory.STAGES}
    assert total == pytest.approx({0: 120, 1: 7.5 * (8 + 12 / 64), 2: 7.5 * (4 + 16 / 64), 3: 7.5 * 20 / 64})


@pytest.mark.long
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_what_zero_holds_is_what_the_formula_says(stage: int) -> None:
    """Stages 0 and 2 are left to `make bench-memory`: a stage takes ten seconds."""
    config = memory.settings(stage)
    ranks: list[dict[str, float]] = together(functools.partial(memory.hold, config, (20_000, 320, 8)), 2, config)
    for found in ranks:
        for part, size in memory.per_parameter(stage, 2).items():
            assert found[part] == pytest.approx(size * found["parameters"], rel=0.05), part
        assert found["resident"] > found["weights"] + found["gradients"] + found["optimizer"]


def test_storages_are_counted_once() -> None:
    layer = nn.Linear(100, 10, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    held: Any = memory.holdings(layer, optimizer)
    assert (held["weights"], held["gradients"]) == (4000, 4000)
    assert held["optimizer"] == pytest.approx(8000, abs=8)  # and the number of steps


@pytest.mark.long
def test_a_run_over_more_shards(storage: Path, tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tiny_recipe, "train": {"micro_batch": 8}}))
    memory._write(storage / "data" / "few", 2)
    peak = memory._peak(recipe, "few")
    assert 100e6 < peak < 5e9


def test_the_page_has_its_figures(storage: Path, tmp_path: Path) -> None:
    from mmagent import measurement

    measurement.publish("memory_forecast", memory.forecast(), tmp_path)
    page = (figures.CHECKOUT / "docs" / "memory.md").read_text()
    pasted, missing = figures.paste(page, tmp_path / "runs" / "bench")
    assert missing == ["memory"]
    assert "| GB | 8 GPUs | 64 GPUs | 1,024 GPUs |" in pasted
    assert "| 7B parameters, stage 2 | 42 | 29.8 | 28.1 |" in pasted
    assert "| 70B parameters, stage 3 | 175 | 21.9 | 1.37 |" in pasted
    written = json.loads((tmp_path / "runs" / "bench" / "memory_forecast.json").read_text())
    assert len(written["rows"]) == 36
