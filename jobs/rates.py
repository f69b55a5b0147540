"""The learning rate of a refit, searched on the round's own data: the recipe's own and others around it, by
`jobs.search`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from jobs import search
from mmagent.config import Config

_AROUND = 4.0  # times and parts of the recipe's own rate


def searched(config: Config, name: str, trials: int) -> bool:
    """Searches, and leaves the winner's bundle in ROOT/search/NAME; whether it came to its end.

    Args:
        config: of the refit; its own rate is the first trial, and stays where no other does better on validation.
    """
    with tempfile.TemporaryDirectory(prefix="rates-") as folder:
        recipe, space = Path(folder) / "recipe.yaml", Path(folder) / "space.yaml"
        recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        space.write_text(yaml.safe_dump(spaced(config.optim.lr, trials)))
        return search.search(recipe, space, name, ()) == 0


def spaced(rate: float, trials: int) -> dict[str, Any]:
    """The file of the search space. A round is too short to measure how seeds deviate."""
    around = {"loguniform": [rate / _AROUND, rate * _AROUND]}
    return {"trials": trials, "seeds": 1, "space": {"optim.lr": around}}
