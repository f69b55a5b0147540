"""What trains: a named strategy applied to a model, and the learning rate of each part.

head: the head alone. connector: also the join, and towers that start from scratch (a frozen random tower would be
meaningless). top:K: also the K last layers of the language model. all: everything.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmagent.config import Config
from mmagent.model import MultimodalModel


def needs_backbone(strategy: str) -> bool:
    """Whether the language model trains, and so must be inside the module; else its states may come from memory."""
    return strategy == "all" or strategy.startswith("top:")


def apply(model: MultimodalModel, strategy: str) -> None:
    """Sets `requires_grad` of every parameter.

    Raises:
        ValueError: more layers are to be trained than the language model has.
    """
    model.requires_grad_(strategy != "head")
    model.heads.requires_grad_(True)
    if model.backbone is None:
        return
    model.backbone.requires_grad_(strategy == "all")
    if strategy.startswith("top:"):
        depth, blocks = int(strategy.removeprefix("top:")), model.backbone.blocks()
        if depth > len(blocks):
            raise ValueError(f"freeze.strategy={strategy}, but the language model has {len(blocks)} layers")
        for block in blocks[-depth:]:
            block.requires_grad_(True)


def groups(model: MultimodalModel, config: Config) -> list[dict[str, Any]]:
    """The trained parameters as optimizer groups: for each part (backbone, towers, rest) its learning rate, and
    weight decay on matrices only."""
    rates = {
        "backbone": config.optim.lr_backbone or config.optim.lr / 20,
        "towers": config.optim.lr_towers or config.optim.lr,
        "rest": config.optim.lr,
    }
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first = name.split(".")[0]
            part = {"backbone": "backbone", "image_tower": "towers", "audio_tower": "towers", "speech": "towers"}
            members.setdefault((part.get(first, "rest"), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": part,
            "peak_lr": rates[part],
            "lr": rates[part],
            "weight_decay": config.optim.weight_decay if matrix else 0.0,
        }
        for (part, matrix), parameters in members.items()
    ]
