"""A dry run by the real command: the steps of two gloo ranks measured, a forecast told, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import rehearsal, train
from jobs.estimate import forecast
from jobs.rehearsal import Measured, Rehearsal, RehearsalError
from mmagent.config import resolve
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.shards import Dataset


@pytest.fixture
def recipe(
    storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path, make_dataset: Callable[..., Dataset],
    make_records: Callable[..., list[Record]],
) -> Path:  # fmt: skip
    """Of 96 rows, a quarter of them longer than the model reads."""
    long = [parse({"id": f"long-{i}", "text": "is it red? " * 20, "label": "red", "split": "train"}) for i in range(24)]
    splits = {"train": [*make_records(72), *long], "validation": make_records(16, "validation")}
    make_dataset(storage / "data" / "tiny", splits)
    settings = {
        "train": {"micro_batch": 4, "accumulation": 2, "epochs": 50, "eval_every_steps": 6, "eval_rows": 16},
        "cluster": {"workers": 2},
        "zero": {"stage": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**tiny_recipe, **settings}))
    return tmp_path / "recipe.yaml"


@pytest.mark.long
def test_a_dry_run_tells_what_a_run_would_take(recipe: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(storage.rglob("*"))
    assert train.main(["--config", str(recipe), "--name", "dry", "--dry-run"]) == 0
    assert sorted(storage.rglob("*")) == before
    told = capsys.readouterr().out
    assert "run dry: 96 rows of tiny, 300 steps of 16 samples (2 workers x 4 x 2), ZeRO 2" in told
    assert "backbone" in told  # the table of parts
    assert "tiny is not checked" in told
    lines = {line.split()[0]: line for line in told.splitlines() if line.strip()}
    assert "with 2 of 2 workers" in lines["measured"]
    assert "96 an epoch, 50.0 epochs" in lines["rows"]
    assert 10 < float(lines["rows"].split(" looked at ")[1].split("%")[0]) < 40
    assert 1 < float(lines["tokens"].split()[1]) < 32
    assert "300 steps" in lines["time"]
    assert "50 validations" in lines["time"]
    assert 0.1 < float(lines["memory"].split()[1]) < 10
    assert float(lines["disk"].split(" of ")[1].split()[0]) > 0
    assert "would not fit" not in told


def test_what_would_not_fit_is_said(recipe: Path, tiny_recipe: dict[str, Any]) -> None:
    from jobs import run
    from mmagent import config as configs

    plan = run.prepare(configs.load(recipe), recipe.parent / "run").plan
    rank = Measured(
        rows=64, tokens=640, cut_rows=16, steps_s=(1.0, 2.0, 3.0), validation_s=4.0, peak_bytes=3 * 10**9,
        checkpoint_bytes=10**9,
    )  # fmt: skip
    slow = Measured(
        rows=64, tokens=1280, cut_rows=0, steps_s=(1.0, 4.0, 5.0), validation_s=2.0, peak_bytes=10**9,
        checkpoint_bytes=10**9,
    )  # fmt: skip
    fits = forecast(plan, Rehearsal((rank, slow), available_bytes=7 * 10**9, free_bytes=10**10))
    told = "\n".join(fits.lines)
    assert fits.troubles == ()
    assert "12.5% are cut: about 12 an epoch" in told
    assert "15.0 a row, about 1,440 an epoch, 72,000 in all" in told
    assert "4 s (1 to 5), 4 samples/s" in told  # the slower rank's median
    assert "300 steps 20 min 0 s, 50 validations 3 min 20 s" in told
    tight = forecast(plan, Rehearsal((rank, slow), available_bytes=5 * 10**9, free_bytes=3 * 10**9))
    memory, disk = tight.troubles
    assert "6.0 GB of memory into 5.0 GB: lower train.micro_batch=4" in memory
    assert "4.0 GB of checkpoints and bundle on a disk with 3.0 GB free" in disk


def test_a_machine_without_a_gpu_says_so(tiny_recipe: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RehearsalError, match=r"cluster\.gpu=false"):
            rehearsal._world(resolve(tiny_recipe, {"cluster.gpu": True}))
