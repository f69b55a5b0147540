"""The search: its space is read or refused, and two trials on a real Ray end in the winner's bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster, search, trials
from mmagent import Predictor, bundle
from mmagent.config import ConfigError
from mmagent.record import Record
from mmagent.shards import Dataset

SPACE: dict[str, Any] = {
    "trials": 2,
    "grace_steps": 2,
    "set": {"train.max_steps": 4},
    "space": {"optim.lr": {"loguniform": [1.0e-3, 1.0e-2]}, "freeze.strategy": {"choice": ["connector", "all"]}},
}


def write(file: Path, content: Any) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"space": {"optim.lrr": {"uniform": [0, 1]}}}, "unknown key 'optim.lrr': did you mean 'optim.lr'?"),
        ({"set": {"data.shar": 0.1}}, "did you mean 'data.share'?"),
        ({"trails": 3}, "trails"),
        ({"trials": 0}, "trials"),
    ],
)
def test_a_mistake_in_the_space_is_told_with_its_file(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    file = write(tmp_path / "space.yaml", {**SPACE, **changed})
    with pytest.raises(ConfigError) as error:
        search.load_space(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)


def test_a_space_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the search space /nowhere\.yaml"):
        search.load_space(Path("/nowhere.yaml"))


@pytest.mark.parametrize(
    "spec",
    [
        0.1,
        {"lognormal": [0, 1]},
        {"uniform": [1, 0]},
        {"uniform": [0]},
        {"uniform": ["low", "high"]},
        {"loguniform": [0, 1]},
        {"choice": []},
        {"choice": "all"},
        {"uniform": [0, 1], "choice": [1]},
    ],
)
def test_a_distribution_that_is_none_names_its_key(spec: Any) -> None:
    with pytest.raises(trials.SpaceError, match=r"^optim\.lr: "):
        trials.distribution("optim.lr", spec)


@pytest.mark.parametrize(
    ("spec", "fits"),
    [
        ({"loguniform": [0.001, 0.1]}, lambda value: 0.001 <= value <= 0.1),
        ({"uniform": [0, 0.5]}, lambda value: 0 <= value <= 0.5),
        ({"randint": [1, 4]}, lambda value: value in (1, 2, 3)),
        ({"choice": ["connector", "top:1"]}, lambda value: value in ("connector", "top:1")),
    ],
)
def test_values_are_drawn_from_the_distribution(spec: Any, fits: Callable[[Any], bool]) -> None:
    drawn = [trials.distribution("key", spec).sample() for _ in range(30)]
    assert all(fits(value) for value in drawn)
    assert len(set(drawn)) > 1


def test_each_choice_has_its_turn() -> None:
    strategies = ["connector", "top:2", "all"]
    space = {
        "freeze.strategy": trials.distribution("freeze.strategy", {"choice": strategies}),
        "optim.lr": trials.distribution("optim.lr", {"loguniform": [1e-4, 1e-2]}),
    }
    first = {"freeze.strategy": "connector", "optim.lr": 0.001}
    for seed in range(5):
        points = trials.points(space, first, trials=7, seed=seed)
        assert points[0] == first
        tried = [point["freeze.strategy"] for point in points]
        assert len(tried) == 7
        assert set(tried[:3]) == set(tried[3:6]) | {"connector"} == set(strategies)
        assert all(set(point) == {"freeze.strategy"} for point in points[1:])  # the rate is drawn


@pytest.mark.slow
def test_two_trials_and_a_winner(
    ray_cluster: cluster.Cluster, storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_dataset(
        storage / "data" / "tiny",
        {"train": make_records(64), "validation": make_records(16, "validation"), "test": make_records(8, "test")},
    )
    recipe = write(
        tmp_path / "recipe.yaml",
        {
            **tiny_recipe,
            "train": {"micro_batch": 8, "eval_every_steps": 2, "eval_rows": 16},
            "cluster": {"workers": 1, "max_failures": 0},
        },
    )
    space = write(tmp_path / "space.yaml", SPACE)
    arguments = ["--config", str(recipe), "--space", str(space), "--name", "s"]
    assert search.main(arguments) == 0  # and no actor of a trial is left: else it were 1
    shown = capsys.readouterr().out
    assert "2 trials of up to 4 steps" in shown
    folder = storage / "search" / "s"
    done = json.loads((folder / "trials.json").read_text())
    assert len(done) == 2
    assert [trial["error"] for trial in done] == [None, None]
    assert {"optim.lr": 0.001, "freeze.strategy": "connector"} in [
        trial["sample"] for trial in done
    ]  # the recipe's own
    winner = json.loads((folder / "winner.json").read_text())
    assert winner["score"] == max(trial["score"] for trial in done)
    found = bundle.load("s")
    assert found.name == "s"
    assert found.config.optim.lr == pytest.approx(winner["sample"]["optim.lr"])
    assert Predictor.load("s", device="cpu").predict([{"text": "what color is the shape?"}])
