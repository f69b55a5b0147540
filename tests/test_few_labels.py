"""Learning curves: means and deviations by hand, the table, the chart."""

from __future__ import annotations

import re
import statistics

import pytest

from mmagent import few_labels


def point(labels: int, seed: int, value: float, metric: str = "accuracy") -> dict[str, object]:
    tasks = {"classify": {"metric": metric, "value": value}}
    return {"labels_per_class": labels, "seed": seed, "rows": 4 * labels, "split": "test", "tasks": tasks}


POINTS = [point(5, 0, 0.5), point(5, 1, 0.7), point(10, 0, 0.8), point(10, 1, 0.9), point(50, 0, 0.95)]


def test_mean_and_deviation_over_seeds() -> None:
    found = few_labels.curve(POINTS)["classify"]
    assert found["metric"] == "accuracy"
    first, second, third = found["points"]
    assert (first["labels_per_class"], first["rows"], first["values"]) == (5, 20, [0.5, 0.7])
    assert first["mean"] == pytest.approx(0.6)
    assert first["deviation"] == pytest.approx(0.2 / 2**0.5)  # of a sample: n - 1
    assert second["deviation"] == pytest.approx(statistics.stdev([0.8, 0.9]))
    assert third["deviation"] is None  # one seed says nothing of it
    assert few_labels.curve([]) == {}


def test_the_table() -> None:
    lines = few_labels.text(few_labels.curve(POINTS)).splitlines()
    assert lines[0].split("  ")[-1] == "accuracy of classify"
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[1:3]] == [
        ["5", "20", "2", "60.0 ± 14.1 %"],
        ["10", "40", "2", "85.0 ± 7.1 %"],
    ]
    assert lines[3].split()[:3] == ["50", "200", "1"]
    errors = few_labels.curve([point(5, 0, 12.0, "rmse"), point(5, 1, 14.0, "rmse")])
    assert few_labels.text(errors).endswith("13 ± 1.414")


def test_the_chart_has_a_mark_and_a_bar_for_each_number() -> None:
    page = few_labels.section(few_labels.curve(POINTS), "test")
    assert page.count("<circle") == 3
    assert page.count("whisker") == 2
    for words in ("labels of each class", "60.0 ± 14.1 %", "50.0", "Accuracy on test"):
        assert words in page
    xs = [float(x) for x in re.findall(r'<circle cx="([0-9.]+)"', page)]
    # Equal factors are equal steps: 5 to 10 is a step of log 2, 10 to 50 one of log 5.
    assert (xs[2] - xs[1]) / (xs[1] - xs[0]) == pytest.approx(2.3219, abs=0.01)
    low = few_labels.section(few_labels.curve([point(5, 0, -3.0, "r2"), point(8, 0, 2.0, "r2")]), "validation")
    assert low.count("<circle") == 2
    one = few_labels.section(few_labels.curve([point(5, 0, 1.0)]), "test")
    assert one.count("<circle") == 1
