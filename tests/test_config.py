"""Recipes and overrides: what is wrong is named, with the nearest right key; what is right arrives whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmagent import config
from mmagent.config import Config, ConfigError

RECIPES = Path(__file__).parents[1] / "jobs" / "recipes"
MINIMAL: dict[str, Any] = {"data": {"name": "shop"}, "model": {"backbone": "folder"}}


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def test_a_recipe_needs_a_data_set_and_a_backbone_only(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path / "r.yaml", MINIMAL))
    assert loaded.data.name == "shop"
    assert loaded.zero.engine == "deepspeed"
    assert loaded.global_batch == loaded.train.micro_batch * loaded.train.accumulation * loaded.cluster.workers


def test_overrides_are_read_as_yaml_and_reach_any_depth(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", MINIMAL)
    loaded = config.load(
        recipe,
        [
            "optim.lr=3e-4",
            "train.cache=none",
            "model.image.size=32",
            "data.media.max_audio_s=5",
            "train.max_steps=",
        ],
    )
    assert loaded.optim.lr == pytest.approx(3e-4)
    assert loaded.train.cache == "none"
    assert loaded.model.image is not None
    assert loaded.model.image.size == 32
    assert loaded.model.audio is None
    assert loaded.data.media.max_audio_s == 5
    assert loaded.train.max_steps is None


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("train.microbatch=4", "train.micro_batch"),
        ("optm.lr=1", "optim.lr"),
        ("model.image.sise=32", "model.image.size"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(tmp_path: Path, override: str, near: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        config.load(write(tmp_path / "r.yaml", MINIMAL), [override])
    assert f"did you mean {near!r}" in str(caught.value)


def test_an_unknown_key_in_a_recipe_names_the_nearest_right_one(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", MINIMAL | {"optim": {"leraning_rate": 0.1}})
    with pytest.raises(ConfigError, match="did you mean 'optim"):
        config.load(recipe)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=-1", "greater than 0"),
        ("optim.lr=fast", "optim.lr: got 'fast'"),
        ("freeze.strategy=top:0", "freeze.strategy"),
        ("model.width=100", "not a multiple of model.heads"),
        ("zero.stage=4", "zero.stage"),
        ("optim.lr", "is no override"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_seen(tmp_path: Path, override: str, says: str) -> None:
    overrides = [override, "model.heads=3"] if "width" in override else [override]
    with pytest.raises(ConfigError, match=says):
        config.load(write(tmp_path / "r.yaml", MINIMAL), overrides)


@pytest.mark.parametrize(
    ("content", "says"),
    [("a: [", "is not YAML"), ("- 1\n- 2\n", "holds list"), ("data: {name: x}\n", "model is missing")],
)
def test_a_recipe_that_is_none_is_named(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(write(tmp_path / "r.yaml", content))


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        config.load(tmp_path / "nowhere.yaml")


def test_a_config_survives_being_written(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path / "r.yaml", MINIMAL), ["model.audio.mels=40", "optim.betas=[0.8, 0.9]"])
    again = config.load(write(tmp_path / "again.yaml", loaded.model_dump(mode="json")))
    assert again == loaded


def test_a_trial_is_the_recipe_with_other_values(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path / "r.yaml", MINIMAL))
    trial = config.override(loaded, {"optim.lr": 0.5, "freeze.strategy": "all"})
    assert (trial.optim.lr, trial.freeze.strategy) == (0.5, "all")
    assert (loaded.optim.lr, loaded.freeze.strategy) == (Config.model_validate(MINIMAL).optim.lr, "connector")


def test_every_key_says_what_it_is() -> None:
    assert not [key for key, says in config.keys().items() if not says]


@pytest.mark.parametrize(
    "recipe",
    [path for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.endswith(("_data", "space", "gate"))],
    ids=lambda path: path.stem,
)
def test_every_recipe_loads(recipe: Path) -> None:
    assert config.load(recipe).data.name


@pytest.mark.parametrize("space", sorted(RECIPES.glob("*space.yaml")), ids=lambda path: path.stem)
def test_every_search_space_names_keys_that_exist(space: Path) -> None:
    # Dotted keys of the config at the top, or below "space"; what else a space file may hold is the search's own.
    content = yaml.safe_load(space.read_text())
    dotted = [key for level in (content, content.get("space") or {}) for key in level if "." in key]
    assert dotted
    assert not set(dotted) - set(config.keys())
