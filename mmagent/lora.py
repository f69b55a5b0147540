"""Low-rank adaptation (LoRA, arXiv:2106.09685): trained products of two thin matrices beside frozen linear layers.

peft makes them; here is said beside which layers they stand, and how they are merged into a model's weights, so that a
bundle holds an ordinary model and needs no peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmagent import text
from mmagent.config import FreezeConfig

_NAME = "default"  # peft's of an adapter


def pretrained(part: nn.Module) -> list[nn.Module]:
    """The Transformers models inside a part, outermost first; none where it starts from scratch."""
    from transformers import PreTrainedModel

    return [module for module in part.modules() if isinstance(module, PreTrainedModel)]


def add(owner: nn.Module | None, part: str, rank: int, config: FreezeConfig) -> None:
    """Stands products of a rank beside every linear layer of the blocks of a part's pretrained model.

    Args:
        owner: the part, where the model has it; `part` is its name.

    Raises:
        ValueError: the model lacks the part, or nothing in it is pretrained or linear.
    """
    from peft import LoraConfig, inject_adapter_in_model

    found = pretrained(owner) if owner is not None else []
    linear = _linear_layers(found[0]) if found else []
    if not linear:
        raise ValueError(
            f"freeze.lora_parts names {part}, but "
            + ("it has no linear layers in its blocks" if found else "there is no pretrained model in it")
        )
    settings = LoraConfig(
        r=rank,
        lora_alpha=config.lora_scale * rank,  # type: ignore[arg-type]  # peft divides; a fraction is as good
        lora_dropout=config.lora_dropout,
        target_modules=linear,
        fan_in_fan_out=any(not isinstance(found[0].get_submodule(name), nn.Linear) for name in linear),
    )
    inject_adapter_in_model(settings, found[0])


def _linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers inside a model's blocks, by their type. GPT-2's `Conv1D` is one, transposed."""
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for block in text.blocks(model) for module in block.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | Conv1D)
    ]


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as the model without adapters has it, the products added: W + s B A (section 4.1 of the paper).

    Args:
        model: that the state is of; its own weights are not read, so that they may lie on other ranks.
    """
    out = dict(state)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        down, up = out.pop(f"{name}.lora_A.{_NAME}.weight"), out.pop(f"{name}.lora_B.{_NAME}.weight")
        change = layer.scaling[_NAME] * (up @ down)  # (out, in)
        weight = out.pop(f"{name}.base_layer.weight")
        out[f"{name}.weight"] = weight + (change.T if layer.fan_in_fan_out else change).to(weight.dtype)
        if f"{name}.base_layer.bias" in out:
            out[f"{name}.bias"] = out.pop(f"{name}.base_layer.bias")
    return out
