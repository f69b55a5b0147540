"""What validation rows look like to a bundle's own encoders, and how far other rows lie from that.

For each kind of input the mean of its tokens' states is projected on the main directions of validation rows, with what
is left of it as one number more. The distance of two sets of rows is Fréchet's, of normal distributions with diagonal
covariance: the root of sum (m - m')² + (s - s')² over the coordinates, each in standard deviations of validation rows.

Any two sets differ by chance, few rows by more: told is what is beyond four deviations of the distances that sets of
the same sizes have when the rows of both are mixed and drawn anew (a permutation test), so that nothing is told of rows
that come from where validation rows came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

FILE = "familiar.safetensors"
FEWEST = 50  # rows, on either side
_DIRECTIONS = 16
_DRAWS = 64
_DEVIATIONS = 4.0
_ARRAYS = ("mean", "axes", "scale", "rows")


@dataclass(frozen=True, slots=True)
class Familiar:
    """One kind of input, as half of the validation rows showed it, which had no say in the directions.

    Args:
        mean, axes: of the other half: (channels,), (directions, channels).
        scale: (2, coordinates): the mean and the deviation of `rows` before they were scaled.
        rows: (rows, coordinates).
        modalities: of each row, as `Record.modalities`.
    """

    mean: np.ndarray
    axes: np.ndarray
    scale: np.ndarray
    rows: np.ndarray
    modalities: tuple[str, ...]

    def placed(self, states: np.ndarray) -> np.ndarray:
        """(n, channels) -> (n, coordinates)."""
        return (_coordinates(states, self.mean, self.axes) - self.scale[0]) / self.scale[1]

    def distance(self, placed: np.ndarray, modalities: str | None = None) -> float | None:
        """How far rows lie from validation's, beyond what chance makes of it; none of too few.

        Args:
            placed: (n, coordinates), of `placed`.
            modalities: of the rows; none: of all kinds.
        """
        mine = self.rows
        if modalities is not None:
            mine = mine[[each == modalities for each in self.modalities]]
        if min(len(mine), len(placed)) < FEWEST:
            return None
        both = np.concatenate([placed, mine])
        first = np.arange(len(both)) < len(placed)
        mixed = np.random.default_rng(len(both)).permuted(np.tile(first, (_DRAWS, 1)), axis=1)
        found, *chance = _apart(both, np.concatenate([first[None], mixed]).astype(float))
        return round(max(0.0, float(found - np.mean(chance) - _DEVIATIONS * np.std(chance))), 4)


def _coordinates(states: np.ndarray, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    away = states - mean
    along = away @ axes.T
    left = np.sqrt(np.maximum((away**2).sum(1) - (along**2).sum(1), 0.0))
    return np.concatenate([along, left[:, None]], axis=1)


def _apart(rows: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(n, coordinates), and for each draw which of them are a set (draws, n) -> (draws,): its distance to the rest."""
    moments = []
    for mine in (first, 1 - first):
        count = mine.sum(1, keepdims=True)
        mean = mine @ rows / count
        moments.append((mean, np.sqrt(np.maximum(mine @ rows**2 / count - mean**2, 0.0))))
    (mean, spread), (other, others) = moments
    return np.asarray(np.sqrt(((mean - other) ** 2 + (spread - others) ** 2).sum(1)))


def learned(states: np.ndarray, modalities: Sequence[str], seed: int = 0) -> Familiar | None:
    """Of validation rows (n, channels) of one kind of input; none of too few."""
    if len(states) < 2 * FEWEST:
        return None
    order = np.random.default_rng(seed).permutation(len(states))
    shown, kept = order[: len(states) // 2], order[len(states) // 2 :]
    mean = states[shown].mean(0)
    axes = np.linalg.svd(states[shown] - mean, full_matrices=False)[2][:_DIRECTIONS]
    rows = _coordinates(states[kept], mean, axes)
    # Rows that are all alike differ by rounding: that is no scale.
    least = max(1e-3 * float(rows.std(0).max()), 1e-4 * float(np.linalg.norm(mean)), 1e-9)
    scale = np.stack([rows.mean(0), np.maximum(rows.std(0), least)])
    return Familiar(mean, axes, scale, (rows - scale[0]) / scale[1], tuple(modalities[index] for index in kept))


def packed(known: Mapping[str, Familiar]) -> bytes:
    """The file of a bundle, by kind of input."""
    arrays = {
        f"{kind}.{name}": np.ascontiguousarray(getattr(each, name), np.float32)
        for kind, each in known.items()
        for name in _ARRAYS
    }
    return bytes(save(arrays, {kind: json.dumps(each.modalities) for kind, each in known.items()}))


def load(bundle: Path) -> dict[str, Familiar]:
    """Of a bundle's folder, by kind of input; empty where it has none."""
    file = bundle / FILE
    if not file.is_file():
        return {}
    with safe_open(file, "np") as found:
        parts = (
            (kind, tuple(json.loads(modes)), [found.get_tensor(f"{kind}.{name}") for name in _ARRAYS])
            for kind, modes in (found.metadata() or {}).items()
        )
        return {
            kind: Familiar(mean=mean, axes=axes, scale=scale, rows=rows, modalities=modes)
            for kind, modes, (mean, axes, scale, rows) in parts
        }
