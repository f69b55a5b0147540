"""Measurements: goals are judged by the value, files are written twice, and README gets them pasted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmagent import measurement
from mmagent.measurement import Row
from tests.bench import figures


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [(99.0, ">= 99.0", True), (0.06, "<= 0.05", False), (1.0, "< 1", False), (5.0, None, None)],
)
def test_a_goal_is_judged(value: float, goal: str | None, met: bool | None) -> None:
    assert Row("x.y", value, "s", "what", goal).met is met


def test_a_goal_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x\.y: the goal is '99 %'"):
        Row("x.y", 1.0, "s", "what", "99 %")


def test_figures_are_written_and_pasted(storage: Path, tmp_path: Path) -> None:
    rows = [
        Row("train.vs_plain", 1.024, "ratio", "rate | plain rate", ">= 0.9"),
        Row("train.rate", 250.3, "samples/s", "two workers"),
    ]
    measurement.publish("train", rows, tmp_path)
    written = json.loads((storage / "bench" / "train.json").read_text())
    assert written == json.loads((tmp_path / "runs" / "bench" / "train.json").read_text())
    assert written["rows"][0] | {"what": ""} == {
        "id": "train.vs_plain", "value": 1.024, "unit": "ratio", "what": "", "goal": ">= 0.9", "met": True,
    }  # fmt: skip
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["packages"]["torch"]

    readme = "a\n<!-- figures:train -->\nold\n<!-- /figures -->\nb\n<!-- figures:other -->\nkept\n<!-- /figures -->\n"
    pasted, missing = figures.paste(readme, tmp_path / "runs" / "bench")
    assert missing == ["other"]
    assert "| `train.vs_plain` | 1.02 | >= 0.9 ✓ | rate \\| plain rate |" in pasted
    assert "old" not in pasted
    assert "kept" in pasted
    assert figures.paste(pasted, tmp_path / "runs" / "bench")[0] == pasted
    assert "MISSED" not in measurement.table(rows)


def test_a_table_of_several_units_names_its_machine_and_one_of_a_formula_does_not() -> None:
    machine = measurement.machine()
    rows = [
        {"what": "all | memory", "value": 1458.4, "unit": "MB"}, {"what": "all | share", "value": 0.0637, "unit": "x"},
    ]  # fmt: skip
    shown = figures.markdown({"rows": rows, "machine": machine})
    assert "|  | memory | share |\n|---|---|---|\n| all | 1,458 | 0.0637 |\n" in shown
    assert machine["packages"]["torch"] in shown
    shown = figures.markdown({"rows": rows[:1], "machine": machine})
    assert shown == "| MB | memory |\n|---|---|\n| all | 1,458 |\n"


def test_a_long_measurement_can_be_made_in_parts(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids() -> list[tuple[str, float]]:
        found = json.loads((tmp_path / "runs" / "bench" / "quality.json").read_text())
        return [(row["id"], row["value"]) for row in found["rows"]]

    measurement.publish("quality", [Row("a", 1.0, "%", "x"), Row("b", 2.0, "%", "x")], tmp_path, keep=True)
    measurement.publish("quality", [Row("a", 3.0, "%", "x"), Row("c", 4.0, "%", "x")], tmp_path, keep=True)
    assert ids() == [("a", 3.0), ("b", 2.0), ("c", 4.0)]
    later = measurement.machine() | {"measured": "2099-01-01T00:00:00Z"}
    monkeypatch.setattr(measurement, "machine", lambda: later)
    measurement.publish("quality", [Row("b", 6.0, "%", "x")], tmp_path, keep=True)
    assert ids() == [("a", 3.0), ("b", 6.0), ("c", 4.0)]
    other = later | {"cores": 1024}
    monkeypatch.setattr(measurement, "machine", lambda: other)
    measurement.publish("quality", [Row("a", 5.0, "%", "x")], tmp_path, keep=True)
    assert ids() == [("a", 5.0)]  # what another machine made does not stand beside it
