"""What a recipe leaves to the data set: towers that nothing would come to, what trains where that is `auto`, and how
often to validate. Settled once, before a run begins; what was settled stands in the run's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmagent import pretrained
from mmagent.config import Config, override
from mmagent.shards import Dataset
from mmagent.targets import kind

SMALL = 200_000_000  # parameters of a language model that trains as a whole on one machine
_LORA = "lora:16"
_OF_WORDS = ("tag", "relate", "extract", "match", "generate")  # the answer is about single words, not the gist


def settle(config: Config, dataset: Dataset) -> tuple[Config, list[str]]:
    """The config of a run on a data set, and a line for each thing that the recipe did not say.

    Raises:
        BackboneError: a language model whose config cannot be read.
    """
    found: dict[str, Any] = {}
    notes = []
    there = _modalities(dataset)
    for name, tower, words in (("image", config.model.image, "pictures"), ("audio", config.model.audio, "sound")):
        if tower is not None and name not in there:
            found[f"model.{name}"] = None
            notes.append(f"no {words} in {dataset.name}: model.{name}=null")
    towers = [n for n, t in (("image", config.model.image), ("audio", config.model.audio)) if t and n in there]
    if config.freeze.strategy == "auto":
        found["freeze.strategy"], why = _strategy(config, dataset, towers=bool(towers))
        notes.append(f"freeze.strategy={found['freeze.strategy']}: {why}")
    if config.train.eval_every_epochs is not None:
        epoch = dataset.rows("train") * config.data.share / config.global_batch
        steps = max(config.train.eval_every_steps, round(config.train.eval_every_epochs * epoch))
        found |= {"train.eval_every_steps": steps, "train.eval_every_epochs": None}
    return (override(config, found) if found else config), notes


def _modalities(dataset: Dataset) -> set[str]:
    """What some row of training holds: text, image, audio; also where only candidates hold it."""
    counted: Mapping[str, int] = dataset.info["splits"]["train"].get("modalities") or {}
    if not counted:  # made by hand: nothing is known
        return {"text", "image", "audio"}
    return {name for key in counted for name in key.split("+")}


def _strategy(config: Config, dataset: Dataset, *, towers: bool) -> tuple[str, str]:
    """What trains, and why: a frozen language model's states can be kept, which makes training with towers fast; where
    the answer lies in the words, they have to learn."""
    words = sorted({kind(task) for task in dataset.tasks} & set(_OF_WORDS))
    if towers and not words and config.model.join == "output":
        return "connector", "towers learn, the language model's states are kept"
    size = _size(config.model.backbone)
    why = f"{' and '.join(words)} ask for single words" if words else "all there is to learn from is text"
    if config.model.join == "input":
        why = "towers join at the language model's input"
    if size <= SMALL:
        return "all", f"{why}; the language model has {size / 1e6:,.0f}M parameters"
    return _LORA, f"{why}; the language model has {size / 1e6:,.0f}M parameters, too many to train them all"


def _size(backbone: str) -> int:
    from transformers import AutoModel

    config = pretrained.config_of(backbone, "model.backbone")
    with torch.device("meta"), pretrained.quietly():
        model = AutoModel.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
