"""ZeRO on a GPU, one rank at each stage: what it learns is what plain PyTorch learns there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import engine as engines
from jobs.engine import TorchEngine
from mmagent.record import Record
from tests import ranks
from tests.test_zero import Rows, built, learn, opened

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

STEPS = 12
CASES: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"zero.stage": stage, "freeze.strategy": "all"} for stage in range(4)},
    "stage 2, offload": {"zero.stage": 2, "zero.offload": "optimizer", "freeze.strategy": "all"},
    "stage 3, offload, LoRA": {"zero.stage": 3, "zero.offload": "parameters", "freeze.strategy": "lora:2"},
}


def train(rank: int, world: int, given_file: Path) -> None:
    """Every case in ZeRO, and in plain PyTorch: the losses, and where they were computed."""
    given = torch.load(given_file, weights_only=False)
    out: dict[str, Any] = {}
    for name, settings in CASES.items():
        for kind, make in (("plain", TorchEngine), ("zero", engines.make)):
            engine, config = built(given, settings, make)
            share = config.share(1)
            micros = list(Rows(config, given["rows"], share, 0).steps())
            out[f"{name}, {kind}"] = {
                "losses": [learn(engine, micros[0], share, opened(engine, config, 0, 1)) for _ in range(STEPS)],
                "device": engine.device.type,
            }
    torch.save(out, given_file.with_name("out.pt"))


def test_every_stage_learns_on_a_gpu(
    tiny_recipe: dict[str, Any], make_records: Callable[..., list[Record]], tmp_path: Path
) -> None:
    torch.save({"raw": tiny_recipe, "rows": [make_records(8)]}, tmp_path / "given.pt")
    ranks.run("tests.test_zero_gpu:train", tmp_path / "given.pt", (1,), timeout_s=600)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name in CASES:
        plain, zero = found[f"{name}, plain"], found[f"{name}, zero"]
        assert zero["device"] == plain["device"] == "cuda"
        assert zero["losses"] == pytest.approx(plain["losses"], rel=0.02), name  # bf16
        assert zero["losses"][-1] < 0.9 * zero["losses"][0], name
