"""A model from its config: which language model it wants, and where things join."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmagent import native, processor, text
from mmagent.config import ModelConfig
from mmagent.model import MultimodalModel
from mmagent.native import Native, NativeModel
from mmagent.soft import SoftModel
from mmagent.targets import kind
from mmagent.tasks import Task
from mmagent.text import TextEncoder
from mmagent.writer import load_writer

Model = MultimodalModel | SoftModel


def load_language(
    config: ModelConfig, tasks: Mapping[str, object], *, place: str | None = None, weights: bool = True,
    dropout: float | None = None,
) -> TextEncoder:  # fmt: skip
    """The language model that tasks want: with its output layer where one of them writes.

    Args:
        tasks: by name.
        place: of the checkpoint, where it is not the config's backbone.

    Raises:
        BackboneError: see `mmagent.text.load_encoder` and `mmagent.writer.load_writer`.
    """
    load: Callable[..., TextEncoder] = load_writer if _writes(tasks) else text.load_encoder
    if config.join == "native":
        load = native.load
    return load(place or config.backbone, weights=weights, dropout=dropout)


def load_reading(config: ModelConfig, *, place: str | None = None) -> Any:
    """What makes a model's tokens of words: the backbone's tokenizer, or a native model's processor.

    Raises:
        BackboneError: see `mmagent.text.load_tokenizer` and `mmagent.processor.load`.
    """
    load = processor.load if config.join == "native" else text.load_tokenizer
    return load(place or config.backbone)


def inside(config: ModelConfig) -> bool:
    """Whether the language model is part of the module in any case: it computes on what the towers make."""
    return config.join in ("input", "native")


def assemble(
    config: ModelConfig, tasks: Mapping[str, Task], encoder: TextEncoder, *, trained: bool = False, weights: bool = True
) -> Model:
    """The module of a config.

    Args:
        encoder: of `load_language`.
        trained: whether the language model trains or is computed each time, and so is inside the module.
        weights: whether pretrained towers get their weights here.

    Raises:
        ValueError: tasks that the join cannot serve.
    """
    if config.join == "native":
        assert isinstance(encoder, Native)
        return NativeModel(config, tasks, encoder)
    if inside(config):
        return SoftModel(config, tasks, encoder, weights=weights)
    if _writes(tasks):
        raise ValueError("the task generate writes with the language model: set model.join=input")
    return MultimodalModel(config, tasks, encoder.width, encoder if trained else None, weights=weights)


def _writes(tasks: Mapping[str, object]) -> bool:
    return any(kind(name) == "generate" for name in tasks)
