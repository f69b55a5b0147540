"""Symptoms: one colour, silence and clipping are told from what is only dark, quiet or loud."""

from __future__ import annotations

import numpy as np

from mmagent import symptoms


def test_symptoms_are_told_from_what_is_only_dark_quiet_or_loud() -> None:
    noise = np.random.default_rng(0)
    assert symptoms.of_picture(np.full((8, 8, 3), 7, np.uint8)) == "blank"
    assert symptoms.of_picture(noise.integers(0, 9, (8, 8, 3), np.uint8)) == ""
    wave = np.sin(np.arange(8000) * 0.05).astype(np.float32)
    assert symptoms.of_sound(wave * 5e-4) == "silent"
    assert symptoms.of_sound(np.zeros(0, np.float32)) == "silent"
    assert symptoms.of_sound(wave * 0.005) == ""
    assert symptoms.of_sound(np.clip(wave * 2, -1, 1)) == "clipped"
    assert symptoms.of_sound(wave * 0.99) == ""
