"""mmagent.metrics against numbers worked out by hand, and against scikit-learn where it has the same metric."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss

from mmagent import metrics
from mmagent.metrics import Outcomes

LABELS = ("a", "b")


def outcomes(confidence: list[float], correct: list[bool], groups: list[str] | None = None) -> Outcomes:
    """Rows whose right class is a, answered a (right) or b (wrong) with the given confidence."""
    sure = np.array(confidence)
    said_a = np.where(correct, sure, 1 - sure)
    predicted = ["a" if right else "b" for right in correct]
    return Outcomes.of(LABELS, ["a"] * len(sure), predicted, sure, np.stack([said_a, 1 - said_a], axis=1), groups)


def random_outcomes(rows: int = 400, groups: int | None = None) -> tuple[Outcomes, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    names = ("x", "y", "z")
    probabilities = rng.dirichlet(np.ones(3), rows)
    truth = np.array([rng.choice(3, p=row) for row in probabilities])
    keys = None if groups is None else [f"g{index % groups}" for index in range(rows)]
    said = probabilities.argmax(axis=1)
    made = Outcomes.of(
        names, [names[i] for i in truth], [names[i] for i in said], probabilities.max(axis=1), probabilities, keys
    )
    return made, truth, probabilities


def test_the_numbers_of_four_rows_by_hand() -> None:
    found = metrics.summary(outcomes([0.8, 0.6, 0.9, 0.7], [True, True, False, True]))
    assert found["accuracy"]["value"] == pytest.approx(3 / 4)
    assert found["mean_confidence"]["value"] == pytest.approx(0.75)
    # -ln of what class a was given: 0.8, 0.6, 0.1, 0.7
    assert found["nll"]["value"] == pytest.approx(-math.log(0.8 * 0.6 * 0.1 * 0.7) / 4)
    # of two classes each row adds (1 - p)^2 twice: 0.08, 0.32, 1.62, 0.18
    assert found["brier"]["value"] == pytest.approx(2.20 / 4)
    # a: 3 right, none said wrongly, 1 missed: F1 = 6 / 7; b: said once, never right: 0
    assert found["macro_f1"]["value"] == pytest.approx((6 / 7 + 0) / 2)


def test_calibration_error_by_hand() -> None:
    # Bins of 1/15: 0.80 lies on an edge and belongs to the bin that ends there, 0.82 to the next one.
    found = metrics.calibration(outcomes([0.80, 0.79, 0.82, 0.95], [True, False, True, True]))
    # bin 12: accuracy 1/2, confidence 0.795; bin 13: 1, 0.82; bin 15: 1, 0.95
    assert found["ece"] == pytest.approx((2 * 0.295 + 0.18 + 0.05) / 4)
    filled = {index: row for index, row in enumerate(found["bins"], 1) if row["n"]}
    assert {index: row["n"] for index, row in filled.items()} == {12: 2, 13: 1, 15: 1}
    assert filled[12]["accuracy"] == 0.5
    assert filled[12]["confidence"] == pytest.approx(0.795)
    assert all(row["accuracy"] is None for row in found["bins"] if not row["n"])


def test_a_confidence_of_nothing_and_of_all_has_a_bin() -> None:
    found = metrics.calibration(outcomes([0.0, 1.0], [False, True]))
    assert [row["n"] for row in found["bins"]] == [1, *[0] * 13, 1]
    assert found["ece"] == 0


def test_coverage_takes_the_surest_first_and_ties_together() -> None:
    points = metrics.coverage(outcomes([0.9, 0.8, 0.8, 0.6], [True, True, False, False]))
    assert points == [
        {"coverage": 0.25, "accuracy": 1.0, "confidence": 0.9},
        {"coverage": 0.75, "accuracy": pytest.approx(2 / 3), "confidence": 0.8},
        {"coverage": 1.0, "accuracy": 0.5, "confidence": 0.6},
    ]


def test_coverage_of_many_rows_is_thinned_and_ends_with_all() -> None:
    made, *_ = random_outcomes()
    points = metrics.coverage(made, points=20)
    assert len(points) <= 20
    assert points[-1]["coverage"] == 1
    assert points[-1]["accuracy"] == pytest.approx(float(made.correct.mean()))


def test_per_class_and_confusion_by_hand() -> None:
    made = Outcomes.of(
        ("a", "b", "never"), ["a", "a", "b", "b"], ["a", "b", "b", "b"], np.full(4, 0.5), np.full((4, 3), 1 / 3)
    )
    assert metrics.per_class(made) == {
        "a": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2},
        "b": {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "support": 2},
    }
    assert metrics.confusion(made) == [
        {"truth": "b", "predicted": "b", "count": 2},
        {"truth": "a", "predicted": "a", "count": 1},
        {"truth": "a", "predicted": "b", "count": 1},
    ]


def test_scikit_learn_agrees() -> None:
    made, truth, probabilities = random_outcomes()
    found = metrics.summary(made)
    assert found["macro_f1"]["value"] == pytest.approx(f1_score(truth, probabilities.argmax(axis=1), average="macro"))
    assert found["nll"]["value"] == pytest.approx(log_loss(truth, probabilities))


def test_a_label_that_only_the_data_has_is_wrong_and_finite() -> None:
    made = Outcomes.of(LABELS, ["a", "new"], ["a", "b"], np.array([0.9, 0.6]), np.array([[0.9, 0.1], [0.4, 0.6]]))
    assert made.labels == ("a", "b", "new")
    assert made.p_truth.tolist() == [0.9, 0.0]
    assert made.brier[1] == pytest.approx(0.4**2 + 0.6**2 + 1)
    found = metrics.summary(made)
    assert found["accuracy"]["value"] == 0.5
    assert math.isfinite(found["nll"]["value"] or math.inf)


def test_intervals_hold_the_value_and_come_again_with_their_seed() -> None:
    made, *_ = random_outcomes()
    once, again, other = (metrics.summary(made, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once["accuracy"]["low"] != other["accuracy"]["low"] or once["nll"]["low"] != other["nll"]["low"]
    for name in ("accuracy", "macro_f1", "nll", "brier", "mean_confidence"):
        value, low, high = (once[name][key] for key in ("value", "low", "high"))
        assert low is not None
        assert high is not None
        assert low < (value or 0) < high


def test_the_interval_of_an_accuracy_is_as_wide_as_theory_says() -> None:
    hits = np.arange(1000) < 800
    found = metrics.share(hits, seed=3)
    error = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert found["value"] == 0.8
    assert found["low"] == pytest.approx(0.8 - error, abs=0.005)
    assert found["high"] == pytest.approx(0.8 + error, abs=0.005)


def test_rows_of_one_group_count_as_one_draw() -> None:
    # Ten groups of a hundred equal rows know no more than ten rows.
    hits, groups = np.repeat(np.arange(10) < 8, 100), np.repeat(np.arange(10), 100)
    alone, grouped = metrics.share(hits), metrics.share(hits, groups)
    width = [(found["high"] or 0) - (found["low"] or 0) for found in (alone, grouped)]
    assert width[1] == pytest.approx(10 * width[0], rel=0.25)


def test_all_right_is_all_right_in_every_resample() -> None:
    found = metrics.summary(outcomes([0.9] * 50, [True] * 50))
    assert found["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_taking_rows_takes_them_everywhere() -> None:
    made, *_ = random_outcomes(groups=20)
    mask = np.arange(len(made)) % 2 == 0
    half = made.take(mask)
    assert len(half) == 200
    assert (half.truth == made.truth[mask]).all()
    assert set(half.groups.tolist()) == set(range(10))  # every second group, numbered anew
    assert metrics.summary(half)["accuracy"]["value"] == pytest.approx(float(made.correct[mask].mean()))
