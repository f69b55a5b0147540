"""Whether two answers are the same: words exactly, probabilities and values within 1e-4."""

from __future__ import annotations

from typing import Any

import pytest

from mmagent.golden import TOLERANCE, difference

WAS: dict[str, Any] = {"label": "red", "probabilities": {"red": 0.8, "blue": 0.2}, "confidence": 0.8}


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (WAS, WAS, ""),
        (WAS, {**WAS, "label": "blue"}, "label is 'blue', was 'red'"),
        (WAS, {**WAS, "confidence": 0.8 + 0.9 * TOLERANCE["fp32"]}, ""),
        (WAS, {**WAS, "confidence": 0.8 + 2 * TOLERANCE["fp32"]}, "a probability is off by 0.0002"),
        (WAS, {**WAS, "probabilities": {"red": 0.8}}, "a probability is off by 0.2"),
        (
            {"labels": ["a"], "confidence": 1},
            {"labels": ["a", "b"], "confidence": 1},
            "labels is ['a', 'b'], was ['a']",
        ),
        ({"text": "so", "confidence": 1}, {"text": "no", "confidence": 1}, "text is 'no', was 'so'"),
        ({"value": 1000.0, "confidence": 1}, {"value": 1000.05, "confidence": 1}, ""),
        ({"value": 1.0, "confidence": 1}, {"value": 1.05, "confidence": 1}, "value is 1.05, was 1"),
        (
            {"spans": [{"text": "Paris", "label": "city", "confidence": 0.5}], "confidence": 1},
            {"spans": [{"text": "Paris", "label": "city", "confidence": 0.6}], "confidence": 1},
            "",
        ),
        (
            {"spans": [{"text": "Paris", "label": "city"}], "confidence": 1},
            {"spans": [{"text": "Paris", "label": "name"}], "confidence": 1},
            "its spans are others",
        ),
    ],
)
def test_what_differs_is_told(was: dict[str, Any], now: dict[str, Any], words: str) -> None:
    assert difference(was, now)[0] == words


def test_how_far_a_probability_is_off_is_told_too() -> None:
    assert difference(WAS, {**WAS, "confidence": 0.80005})[1] == pytest.approx(5e-5)


def test_of_bfloat16_three_digits_are_asked_for_and_every_label() -> None:
    near = {**WAS, "confidence": 0.79}
    assert difference(WAS, near)[0]
    assert difference(WAS, near, TOLERANCE["bf16"])[0] == ""
    assert difference(WAS, {**near, "label": "blue"}, TOLERANCE["bf16"])[0] == "label is 'blue', was 'red'"
