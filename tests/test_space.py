"""Search spaces: read or refused, drawn from evenly and by a seed, turned into samples and back."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmagent import config, space
from mmagent.config import Config, ConfigError
from mmagent.space import Space

SPEC: dict[str, Any] = {
    "optim.lr": {"loguniform": [1.0e-4, 1.0e-2]},
    "model.dropout": {"uniform": [0.0, 0.4]},
    "train.micro_batch": {"integer": [8, 11]},
    "freeze.strategy": {
        "choice": ["connector", "all", {"top": {"integer": [1, 3]}}, {"lora": {"choice": [4, 8]}}],
    },
    "freeze.lora_dropout": {"uniform": [0.0, 0.2], "when": {"freeze.strategy": "lora"}},
    "optim.layer_decay": {"uniform": [0.5, 1.0], "when": {"freeze.strategy": ["all", "top"]}},
}


def made(spec: dict[str, Any] | None = None, **more: Any) -> Space:
    return Space(space=SPEC if spec is None else spec, **more)


def write(file: Path, content: Any) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"space": {"optim.lrr": {"uniform": [0, 1]}}}, "unknown key 'optim.lrr': did you mean 'optim.lr'?"),
        ({"set": {"data.shar": 0.1}}, "did you mean 'data.share'?"),
        ({"set": {"optim.lr": 0.1}}, "optim.lr stands under set"),
        ({"trails": 3}, "unknown key 'trails': did you mean 'trials'?"),
        ({"trials": 0}, "trials"),
        ({"method": "grid"}, "method"),
        ({"space": {}}, "space"),
        ({"space": {"optim.lr": {"lognormal": [0, 1]}}}, "optim.lr: got {'lognormal': [0, 1]}"),
        ({"space": {"optim.lr": {"uniform": [1, 0]}}}, "optim.lr: uniform wants low < high, but got [1, 0]"),
        ({"space": {"optim.lr": {"loguniform": [0, 1]}}}, "both above 0"),
        ({"space": {"optim.lr": {"uniform": ["low", "high"]}}}, "[low, high] of numbers"),
        ({"space": {"optim.lr": {"uniform": [0]}}}, "[low, high] of numbers"),
        ({"space": {"optim.lr": {"uniform": [0, math.inf]}}}, "low < high"),
        ({"space": {"optim.lr": 0.1}}, "optim.lr: got 0.1"),
        ({"space": {"train.micro_batch": {"integer": [1.5, 4]}}}, "whole numbers"),
        ({"space": {"freeze.strategy": {"choice": []}}}, "takes a list"),
        ({"space": {"freeze.strategy": {"choice": "all"}}}, "takes a list"),
        ({"space": {"freeze.strategy": {"choice": ["all", "all"]}}}, "twice"),
        ({"space": {"freeze.strategy": {"choice": [{"top": 3}]}}}, "top wants a distribution"),
        (
            {"space": {"optim.lr": {"uniform": [0, 1], "when": {"freeze.strategy": "lora"}}}},
            "when names 'freeze.strategy', which is not drawn",
        ),
        (
            {
                "space": {
                    "freeze.strategy": {"choice": ["all", "bias"]},
                    "optim.lr": {"uniform": [0, 1], "when": {"freeze.strategy": "lora"}},
                }
            },
            "when wants freeze.strategy=lora, but there are all, bias",
        ),
    ],
)
def test_a_mistake_is_told_with_its_file_and_key(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    file = write(tmp_path / "space.yaml", {"trials": 4, "space": SPEC, **changed})
    with pytest.raises(ConfigError) as error:
        space.load(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)


def test_a_space_that_is_not_there_or_no_map(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the search space /nowhere\.yaml"):
        space.load(Path("/nowhere.yaml"))
    with pytest.raises(ConfigError, match="it holds list"):
        space.load(write(tmp_path / "list.yaml", [1]))


@pytest.mark.parametrize("file", sorted(Path("jobs/recipes").glob("*space.yaml")), ids=lambda file: file.stem)
def test_the_spaces_that_are_shipped_are_good(file: Path, tiny_recipe: dict[str, Any]) -> None:
    found = space.load(file)
    base = config.resolve(tiny_recipe, {})
    for sample in space.corners(space.dimensions(found)):
        config.override(base, sample)


def test_samples_hold_what_exists_in_them() -> None:
    dims = space.dimensions(made())
    drawn = space.spread(dims, 64, seed=0)
    assert len(drawn) == 64
    for sample in drawn:
        strategy, _, number = sample["freeze.strategy"].partition(":")
        assert ("freeze.lora_dropout" in sample) == (strategy == "lora")
        assert ("optim.layer_decay" in sample) == (strategy in ("all", "top"))
        assert number in {"connector": [""], "all": [""], "top": ["1", "2", "3"], "lora": ["4", "8"]}[strategy]
        assert 1e-4 <= sample["optim.lr"] <= 1e-2
        assert sample["train.micro_batch"] in (8, 9, 10, 11)
        assert not any(":" in key for key in sample)
    assert space.spread(dims, 64, seed=0) == drawn
    assert space.spread(dims, 64, seed=1) != drawn


@pytest.mark.parametrize("seed", range(5))
def test_every_choice_has_its_turn_and_every_part_of_a_range_its_sample(seed: int) -> None:
    dims = space.dimensions(made())
    drawn = space.spread(dims, 8, seed)
    strategies = Counter(sample["freeze.strategy"].partition(":")[0] for sample in drawn)
    assert strategies == {"connector": 2, "all": 2, "top": 2, "lora": 2}
    eighths = {int(8 * math.log(sample["optim.lr"] / 1e-4) / math.log(100)) for sample in drawn}
    assert eighths == set(range(8))


def test_a_sample_is_drawn_from_what_it_is_made_of() -> None:
    dims = space.dimensions(made())
    for sample in space.spread(dims, 32, seed=3):
        raw = space.raw(sample, dims)
        assert space.sample(raw, dims) == sample
        for each in dims:
            assert each.key not in raw or each.share(raw[each.key]) is not None


def test_where_a_value_lies_in_its_distribution() -> None:
    dims = {each.key: each for each in space.dimensions(made())}
    rate = dims["optim.lr"]
    assert [rate.at(share) for share in (0.0, 0.5)] == [1e-4, 1e-3]
    assert rate.share(1e-3) == pytest.approx(0.5)
    assert rate.share(0.5) is None
    assert rate.share(None) is None
    assert dims["freeze.strategy"].share("gradual") is None
    assert dims["train.micro_batch"].at(0.999) == 11


def test_the_corners_hold_every_end_and_every_choice() -> None:
    corners = space.corners(space.dimensions(made()))
    strategies = {sample.get("freeze.strategy") for sample in corners}
    assert {"connector", "all", "top:1", "top:3", "lora:4", "lora:8"} <= strategies
    lora = [sample for sample in corners if "freeze.lora_dropout" in sample]
    assert {sample["freeze.strategy"].partition(":")[0] for sample in lora} == {"lora"}


def test_the_recipes_own_values(tiny_recipe: dict[str, Any]) -> None:
    dims = space.dimensions(made())
    base: Config = config.resolve(tiny_recipe, {})
    own = space.own(base, dims)
    assert own["optim.lr"] == base.optim.lr
    assert own["freeze.strategy"] == "connector"
    assert config.override(base, own) == base


def test_a_population_changes_settings_of_training_alone() -> None:
    assert {each.key for each in space.mutable(space.dimensions(made()))} == {"optim.lr", "model.dropout"}
