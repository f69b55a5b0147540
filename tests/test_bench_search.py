"""The measurement of searches: its figures from what trials reported, and a short run of all sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench import search


def trial(began: float, *reports: tuple[float, float]) -> dict[str, Any]:
    """`reports`: seconds of its steps, step."""
    return {
        "reports": [
            {"time_s": began + seconds, "metrics": {"seconds": seconds, "startup_s": 3.0, "step": step}}
            for seconds, step in reports
        ]
    }


def test_time_is_counted_from_the_first_start_to_the_last_report() -> None:
    trials = [trial(100.0, (13.0, 10), (23.0, 20)), trial(130.0, (5.0, 10))]
    assert search._wall_s(trials[:1]) == 26.0
    assert search._wall_s(trials) == 38.0


def test_memory_of_the_first_quarter_of_trials_is_told_apart() -> None:
    trials = [trial(0.0, (ends, 10)) for ends in (10.0, 20.0, 30.0, 40.0)]
    assert search._peaks([(5.0, 3), (10.0, 4), (11.0, 9), (35.0, 6)], trials) == (4, 9)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_short_measurement_of_all_sides(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"MMAGENT_STORAGE": str(tmp_path / "storage"), "SCALE": "small"}
    measure = f"search.main([], pathlib.Path({str(tmp_path)!r}))"
    code = f"import pathlib, sys; from tests.bench import search; sys.exit({measure})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["id"]: row for row in json.loads((tmp_path / "runs/bench/search.json").read_text())["rows"]}
    assert rows["search.leaked"]["value"] == 0
    assert rows["search.startup_s"]["value"] < 20
    assert 1 <= rows["search.memory_growth"]["value"] < 2
    assert {"search.vs_one_run", "search.points_behind_best", "search.vs_textbook"} <= set(rows)
