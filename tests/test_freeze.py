"""Freezing: what a strategy trains, at which rate, and that the rest stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mmagent import freeze, text
from mmagent.config import Config, ConfigError, resolve
from mmagent.model import MultimodalModel
from tests.conftest import classify

Make = Callable[..., tuple[MultimodalModel, Config]]


@pytest.fixture
def make(tiny_recipe: dict[str, Any]) -> Make:
    def build(strategy: str, overrides: Mapping[str, Any] | None = None) -> tuple[MultimodalModel, Config]:
        config = resolve(tiny_recipe, {"freeze.strategy": strategy, **(overrides or {})})
        encoder = text.load_encoder(config.model.backbone)
        model = MultimodalModel(config.model, classify("abcd"), encoder.width, encoder)
        freeze.apply(model, strategy)
        return model, config

    return build


@pytest.mark.parametrize(
    ("strategy", "trained", "needs"),
    [
        ("head", {"head"}, False),
        ("connector", {"head", "join", "towers"}, False),
        ("top:1", {"head", "join", "towers", "layer 1"}, True),
        ("top:2", {"head", "join", "towers", "layer 0", "layer 1"}, True),
        ("all", {"head", "join", "towers", "layer 0", "layer 1", "embeddings"}, True),
    ],
)
def test_what_trains(make: Make, strategy: str, trained: set[str], needs: bool) -> None:
    model, _ = make(strategy)
    assert model.backbone is not None
    layers = {f"layer {index}": layer for index, layer in enumerate(model.backbone.blocks())}
    owners = {id(p): name for name, layer in layers.items() for p in layer.parameters()}
    rest = {"image_tower": "towers", "audio_tower": "towers", "speech": "towers", "backbone": "embeddings"}
    states: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        states.setdefault(owners.get(id(parameter), rest.get(first, first)), set()).add(parameter.requires_grad)
    assert {part: {part in trained} for part in states} == states
    assert freeze.needs_backbone(strategy) == needs


def test_more_layers_than_there_are(make: Make) -> None:
    with pytest.raises(ValueError, match="the language model has 2 layers"):
        make("top:3")


@pytest.mark.parametrize("strategy", ["", "top:0", "top:", "heads", "top:-1"])
def test_an_unknown_strategy_is_refused_with_the_config(tiny_recipe: dict[str, Any], strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"freeze\.strategy"):
        resolve(tiny_recipe, {"freeze.strategy": strategy})


@pytest.mark.parametrize("strategy", ["head", "connector", "top:1", "all"])
def test_the_groups_hold_each_trained_parameter_once(make: Make, strategy: str) -> None:
    model, config = make(strategy)
    grouped = [id(parameter) for group in freeze.groups(model, config) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({}, {"backbone": 0.1 / 20, "towers": 0.1, "rest": 0.1}),
        (
            {"optim.lr_backbone": 0.002, "optim.lr_towers": 0.3},
            {"backbone": 0.002, "towers": 0.3, "rest": 0.1},
        ),
    ],
)
def test_rates_and_decay_of_the_parts(make: Make, given: dict[str, float], rates: dict[str, float]) -> None:
    model, config = make("all", {"optim.lr": 0.1, "optim.weight_decay": 0.5, **given})
    groups = freeze.groups(model, config)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(rates)
    assert {group["name"]: group["peak_lr"] for group in groups} == pytest.approx(rates)
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}
    assert model.image_tower is not None
    towers = {id(p) for group in groups if group["name"] == "towers" for p in group["params"]}
    assert {id(p) for p in model.image_tower.parameters()} <= towers


def test_what_is_frozen_stays(make: Make) -> None:
    model, config = make("top:1")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(freeze.groups(model, config))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
