"""Gaps between groups by fairlearn's definitions, against counts by hand; with intervals; none of too few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmagent import fairness, predictions
from mmagent.targets import TaskInfo
from mmagent.tasks import make

TASK = make(TaskInfo("classify", ("yes", "no")))


def table(rows: Sequence[tuple[str | None, str, str]]) -> pa.Table:
    """(group, right answer, given answer)."""
    made: list[dict[str, Any]] = [
        {"id": str(n), "group": str(n), "task": "classify", "without": "", "label": truth, "predicted": said,
         "right": truth == said, "slice.region": group}
        for n, (group, truth, said) in enumerate(rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(made, predictions.schema(("region",)))


def test_gaps_are_those_of_the_counts() -> None:
    north = [("north", "yes", "yes")] * 40 + [("north", "no", "no")] * 40 + [("north", "yes", "no")] * 20
    south = [("south", "yes", "yes")] * 20 + [("south", "no", "no")] * 50 + [("south", "no", "yes")] * 30
    found = fairness.gaps(table(north + south), TASK, "region")
    assert found is not None
    assert found["groups"] == {"north": {"n": 100, "accuracy": 0.8}, "south": {"n": 100, "accuracy": 0.7}}
    assert found["accuracy"]["value"] == pytest.approx(0.1)
    assert found["demographic_parity"]["value"] == pytest.approx(0.1)  # yes: 40 % and 50 %
    # Of "yes": true positives 40/60 and 20/20, false positives 0/40 and 30/80. Of "no": 40/40 and 50/80; 20/60 and 0.
    assert found["equalized_odds"]["value"] == pytest.approx(0.375)
    assert found["accuracy"]["low"] <= 0.1 <= found["accuracy"]["high"]


def test_groups_that_are_alike_have_a_gap_that_is_chance() -> None:
    rng = np.random.default_rng(0)
    rows = [(str(rng.choice(["a", "b"])), "yes", str(rng.choice(["yes", "no"], p=[0.8, 0.2]))) for _ in range(2000)]
    found = fairness.gaps(table(rows), TASK, "region")
    assert found is not None
    assert found["accuracy"]["low"] < 0.02


def test_few_rows_and_rows_without_a_group_are_left_out() -> None:
    rows = [("a", "yes", "yes")] * 30 + [("b", "yes", "no")] * 5 + [(None, "yes", "no")] * 90
    assert fairness.gaps(table(rows), TASK, "region") is None
    found = fairness.gaps(table(rows + [("c", "yes", "no")] * 25), TASK, "region")
    assert found is not None
    assert set(found["groups"]) == {"a", "c"}


def test_a_task_without_labels_has_a_gap_of_right_answers_alone() -> None:
    rows = [("a", "1", "1")] * 30 + [("b", "1", "2")] * 30
    found = fairness.gaps(table(rows), make(TaskInfo("regress", mean=0.0, deviation=1.0)), "region")
    assert found is not None
    assert set(found) == {"groups", "accuracy"}
    assert found["accuracy"]["value"] == 1.0
    assert "gaps between 2 groups of region: accuracy 1.000" in fairness.lines({"region": found})[0]
