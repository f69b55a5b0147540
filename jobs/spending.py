"""What runs took: hours of workers by what they computed on, and money where prices are given.

A start of workers writes how long they are there into its run's usage.jsonl (`jobs.meter`); the test split's workers
stand in timing.json. What a search's groups wait between two trials, and the tasks that read the data, are not counted.

A list of prices is a YAML file: what a worker computes on, as here ("cpu", a GPU's name or a part of it), and the price
of its hour:

    cpu: 0.05
    H100: 2.5
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from jobs.meter import METRICS_FILE, USAGE_FILE
from mmagent.config import ConfigError

CPU = "cpu"
_HOUR_S = 3600.0

Hours = dict[str, float]  # of workers, by what they compute on


def hours(folder: Path) -> Hours:
    """What a run, or a search with its trials, took."""
    found: Hours = defaultdict(float)
    for place in (folder, *folder.glob("trials/*"), *folder.glob("seeds/*"), *folder.glob("points/*")):
        for kind, seconds in (*_trained(place), *_evaluated(place)):
            found[kind] += seconds / _HOUR_S
    return {kind: round(value, 4) for kind, value in sorted(found.items())}


def total(each: Iterable[Mapping[str, float]]) -> Hours:
    found: Hours = defaultdict(float)
    for taken in each:
        for kind, value in taken.items():
            found[kind] += value
    return {kind: round(value, 4) for kind, value in sorted(found.items())}


def _trained(place: Path) -> Iterator[tuple[str, float]]:
    if not (place / USAGE_FILE).is_file():
        # Of a run from before there was such a file: its steps alone, and workers of an unknown kind as CPUs.
        # A search's metrics.jsonl is a copy of its winner's.
        rows = [] if (place / "search.yaml").exists() else list(lines(place / METRICS_FILE))
        steps = [row for row in rows if row.get("kind") == "train" and row.get("samples_per_s")]
        if steps:
            yield CPU, sum(row["samples"] / row["samples_per_s"] for row in steps) * _workers(place)
        return
    starts = {row["start_s"]: row for row in lines(place / USAGE_FILE)}  # the last line of each
    for row in starts.values():
        yield str(row["type"]), (row["now_s"] - row["start_s"]) * row["workers"]


def _evaluated(place: Path) -> Iterator[tuple[str, float]]:
    file = place / "timing.json"
    if file.is_file() and (seconds := json.loads(file.read_text()).get("evaluate_s")):
        yield CPU, float(seconds) * _workers(place)


def _workers(place: Path) -> int:
    file = place / "config.yaml"
    raw = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return int(raw.get("cluster", {}).get("workers", 1))


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """A file of JSON lines, without one that a kill cut off."""
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def prices(file: Path) -> dict[str, float]:
    """
    Raises:
        ConfigError: no file, or no list of prices.
    """
    try:
        raw = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the prices {file}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the prices {file} are not YAML: {error}") from error
    if not isinstance(raw, dict) or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 for value in raw.values()
    ):
        raise ConfigError(f"{file} is no list of prices: lines such as `cpu: 0.05` and `H100: 2.5` are wanted")
    return {str(kind).lower(): float(value) for kind, value in raw.items()}


def money(taken: Mapping[str, float], known: Mapping[str, float]) -> float | None:
    """What hours cost; none where one has no price."""
    found = [(value, _price(kind, known)) for kind, value in taken.items()]
    if any(price is None for _, price in found):
        return None
    return round(sum(value * (price or 0.0) for value, price in found), 4)


def unpriced(taken: Mapping[str, float], known: Mapping[str, float]) -> list[str]:
    return [kind for kind in taken if _price(kind, known) is None]


def _price(kind: str, known: Mapping[str, float]) -> float | None:
    """That of a kind itself, else of the longest name that is a part of it."""
    fits = [name for name in known if name in kind.lower()]
    return known[max(fits, key=len)] if fits else None
