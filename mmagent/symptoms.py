"""What decoded media show that their sender hardly meant: a blank picture, a silent or clipped sound."""

from __future__ import annotations

import numpy as np

USUAL_RATES_HZ = (
    8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400, 192_000,
)  # fmt: skip
_BLANK_RANGE = 2  # of 255: what a lossy format makes of one colour
_SILENT_PEAK = 1e-3  # of full scale: -60 dB
_FULL_SCALE = 0.999
_CLIPPED_SHARE = 1e-3  # of the samples: loud recordings touch full scale, clipped ones stay there


def of_picture(pixels: np.ndarray) -> str:
    """(height, width, 3) uint8 -> ``blank`` where it is of one colour, else nothing."""
    ranges = pixels.max(axis=(0, 1)).astype(int) - pixels.min(axis=(0, 1))
    return "blank" if int(ranges.max()) <= _BLANK_RANGE else ""


def of_sound(wave: np.ndarray) -> str:
    """(samples,) float32 in [-1, 1] -> ``silent``, ``clipped`` or nothing."""
    size = np.abs(wave)
    if not len(wave) or float(size.max()) < _SILENT_PEAK:
        return "silent"
    return "clipped" if float((size >= _FULL_SCALE).mean()) >= _CLIPPED_SHARE else ""
