"""How the control plane grows: the law that is fitted, the bottleneck that follows, the points of what is ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import states
from mmagent import features
from tests.bench import scale
from tests.bench.law import fit


def test_a_law_is_found_again() -> None:
    linear = fit([(n, 2.0 + 0.5 * n) for n in (10, 100, 1000)])
    assert (linear.power, round(linear.constant, 6), round(linear.slope, 6)) == (1.0, 2.0, 0.5)
    assert math.isclose(linear.at(2000), 1002.0)
    assert math.isclose(linear.reaches(52.0), 100.0)
    square = fit([(n, 3.0 * n**2) for n in (1, 8, 64)])
    assert math.isclose(square.power, 2.0)
    assert math.isclose(square.reaches(300.0), 10.0)


def test_what_never_grows_has_no_limit() -> None:
    assert fit([(1, 4.0), (8, 4.0), (64, 4.0)]).reaches(5.0) == math.inf


def test_the_bottleneck_is_what_fewest_nodes_reach() -> None:
    parts = {each.name: each for each in scale.PARTS}
    listing = scale.Found(parts["shards"], [(10_000, 1.0), (100_000, 10.0)], law=fit([(10_000, 1.0), (100_000, 10.0)]))
    head = scale.Found(parts["nodes"], [(10, 0.1), (50, 0.5)], ["x"], fit([(10, 0.1), (50, 0.5)]))
    rows = {row.id: row for row in scale.figures([listing, head])}
    assert rows["scale.shards.nodes"].value == pytest.approx(600)  # 60 s, a thousand objects for each
    assert rows["scale.nodes.at_1000"].value == pytest.approx(10)
    assert rows["scale.bottleneck"].value == pytest.approx(100)
    assert "nodes, Ray's" in rows["scale.bottleneck"].what
    assert "left out: x" in rows["scale.nodes.at_1000"].what


def test_a_point_that_would_not_fit_is_left_out(storage: Path) -> None:
    parts = {each.name: each for each in scale.PARTS}
    found = scale.measure(parts["shards"], 0.2)
    assert [count for count, _ in found.points] in ([], [10_000], [10_000, 100_000])
    assert "would take" in found.left_out[0]


def test_kept_states_are_counted_without_drafts(storage: Path) -> None:
    assert states.held_bytes() == 0
    place = storage / features.FOLDER / "ab" / "train"
    place.mkdir(parents=True)
    for name in ("a.parquet", ".b.parquet.1.tmp", ".c.parquet", "digests.json"):
        (place / name).write_bytes(b"four")
    (place.parent / "d.parquet").write_bytes(b"12")
    assert states.held_bytes() == 6


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_short_measurement_of_all_parts(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"MMAGENT_STORAGE": str(tmp_path / "storage"), "SCALE": "small"}
    measure = f"scale.main(['--minutes', '15'], pathlib.Path({str(tmp_path)!r}))"
    code = f"import pathlib, sys; from tests.bench import scale; sys.exit({measure})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["id"]: row for row in json.loads((tmp_path / "runs/bench/scale.json").read_text())["rows"]}
    assert {f"scale.{part.name}.{part.small[0]}" for part in scale.PARTS} <= set(rows)
    assert rows["scale.bottleneck"]["value"] > 0
    assert not list((tmp_path / "storage").glob(".scale-*"))
