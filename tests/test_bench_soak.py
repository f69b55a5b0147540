"""The measurement of memory over time: its slope is the one that is there, and it runs as it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import soak

ROOT = Path(__file__).resolve().parents[1]


def test_the_slope_is_of_what_comes_after_the_warm_up() -> None:
    warm = [(at / 10, 100.0 + 200.0 * at / 20) for at in range(20)]  # two minutes in which caches fill
    noise = (0.5, -0.5)
    late = [(at / 10, 300.0 + 2.5 * (at / 10) + noise[at % 2]) for at in range(20, 101)]
    assert soak.slope(warm + late) == pytest.approx(2.5, abs=0.02)
    assert soak.slope(warm + [(at, 300.0) for at, _ in late]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_it_runs_and_loses_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "MMAGENT_STORAGE": str(tmp_path / "storage"), "SCALE": "small"}
    script = "import pathlib, sys; from tests.bench import soak; soak.main(sys.argv[2:], pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path), "--bundle", str(tiny_bundle)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["id"]: row for row in json.loads((tmp_path / "runs" / "bench" / "soak.json").read_text())["rows"]}
    assert set(rows) == {"soak.replica_mb_per_min", "soak.proxy_mb_per_min", "soak.controller_mb_per_min", "soak.lost"}
    assert rows["soak.lost"]["value"] == 0, done.stderr
    assert all(kind in rows["soak.lost"]["what"] for kind in soak.KINDS)
