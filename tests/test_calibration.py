"""Calibration: a confidence that means what it says."""

from __future__ import annotations

import numpy as np
import pytest

from mmagent import calibration
from mmagent.calibration import MIN_ROWS, Calibration


def answers(rows: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at `temperature` is the true chance of each label, and labels drawn by these chances."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, 5))
    chances = calibration.softmax(logits / temperature)
    labels = (rng.random((rows, 1)) < chances.cumsum(1)).argmax(1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    logits, labels = answers(20_000, temperature)
    assert calibration.temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_confidence_becomes_accuracy_for_each_kind_of_input() -> None:
    kinds = {"text": 4.0, "text+image": 0.5}
    parts = [answers(5000, temperature, seed) for seed, temperature in enumerate(kinds.values())]
    logits, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    names = np.repeat(list(kinds), 5000)
    fitted = calibration.fit(logits, labels, names.tolist())
    assert fitted.by_modalities == pytest.approx(kinds, rel=0.1)
    chances = fitted.probabilities(logits, names.tolist())
    for name in kinds:
        rows = names == name
        accuracy = (chances[rows].argmax(1) == labels[rows]).mean()
        assert chances[rows].max(1).mean() == pytest.approx(accuracy, abs=0.02)


def test_a_kind_too_rare_for_its_own_shares_the_common_one() -> None:
    logits, labels = answers(MIN_ROWS * 2 - 1, 2.0)
    kinds = ["text"] * MIN_ROWS + ["audio"] * (MIN_ROWS - 1)
    fitted = calibration.fit(logits, labels, kinds)
    assert fitted.by_modalities["audio"] == calibration.temperature(logits, labels)
    assert fitted.by_modalities["text"] == calibration.temperature(logits[:MIN_ROWS], labels[:MIN_ROWS])


def test_what_validation_never_saw_is_not_made_surer() -> None:
    logits, labels = answers(2000, 0.2)
    fitted = calibration.fit(logits, labels, ["text+image"] * 2000)
    assert fitted.by_modalities["text+image"] == pytest.approx(0.2, rel=0.1)
    np.testing.assert_allclose(fitted.probabilities(logits[:1], ["text"]), calibration.softmax(logits[:1]))


def test_the_answer_stays_and_chances_sum_to_one() -> None:
    logits, labels = answers(300, 2.0)
    chances = calibration.fit(logits, labels, ["text"] * 300).probabilities(logits, ["text"] * 300)
    np.testing.assert_array_equal(chances.argmax(1), logits.argmax(1))
    np.testing.assert_allclose(chances.sum(1), 1)
    np.testing.assert_allclose(calibration.softmax(np.array([[1e4, 0.0, -1e4]])), [[1, 0, 0]])


def test_rows_without_a_label_count_nothing() -> None:
    logits, labels = answers(1000, 2.0)
    more = np.concatenate([logits, np.full((500, 5), 100.0)])
    unknown = np.concatenate([labels, np.full(500, -100)])
    assert calibration.fit(more, unknown, ["text"] * 1500) == calibration.fit(logits, labels, ["text"] * 1000)
    assert calibration.fit(logits, np.full(1000, -100), ["text"] * 1000) == Calibration()


@pytest.mark.parametrize("rows", [40, 400])
def test_a_model_that_is_always_right_is_as_sure_as_its_rows_allow(rows: int) -> None:
    logits = np.eye(4)[np.arange(rows) % 4]
    chances = calibration.fit(logits, np.arange(rows) % 4, ["text"] * rows).probabilities(logits, ["text"] * rows)
    assert 1 - chances.max(1).mean() == pytest.approx(0.75 / (rows + 2), rel=0.01)


def test_it_survives_json() -> None:
    fitted = calibration.fit(*answers(400, 2.0), ["text"] * 400)
    assert Calibration.model_validate_json(fitted.model_dump_json()) == fitted
