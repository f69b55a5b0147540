"""What a model takes over from an earlier bundle: its weights, and heads that grow where there are new labels.

A grown head answers for the labels that it knew exactly as before: theirs come first, with their weights, and what is
new begins at zero, as unlikely as the least likely of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmagent import bundle as bundles
from mmagent.assembly import Model, assemble, load_language
from mmagent.bundle import Bundle
from mmagent.config import Config, ConfigError, override
from mmagent.model import module_name
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all

_HEADS = ("heads", "image_heads")
_OWN = ("model.dropout", "model.head_dropout", "model.backbone_dropout")  # settings of training, not of the weights


def settle(config: Config) -> Config:
    """The config of a run that begins with a bundle: its path, and its model, whose language model is its own copy.

    Raises:
        BundleError: there is none, or it is damaged.
    """
    if config.start.bundle is None:
        return config
    found = bundles.load(config.start.bundle)
    model: dict[str, Any] = {f"model.{key}": value for key, value in found.config.model.model_dump(mode="json").items()}
    own = {key: getattr(config.model, key.partition(".")[2]) for key in _OWN}
    place = {"model.backbone": str(found.path / "backbone"), "start.bundle": str(found.path)}
    return override(config, {**model, **own, **place})


def described(infos: Mapping[str, TaskInfo], found: Bundle) -> dict[str, TaskInfo]:
    """The tasks of a data set as a run on them has them that begins with a bundle: labels that the bundle knows come
    first, in its order; values are scaled as they were; what no row asks for is kept.

    Raises:
        ConfigError: none of the bundle's tasks is among them.
    """
    if not found.tasks.keys() & infos.keys():
        raise ConfigError(
            f"the data has the tasks {', '.join(infos)}, but {found.name}, which start.bundle names, answers "
            f"{', '.join(found.tasks)}: give data of one of them"
        )
    out = {name: replace(info, counts={}, rows={}) for name, info in found.tasks.items()}
    for name, info in infos.items():
        if (was := found.tasks.get(name)) is None:
            out[name] = info
            continue
        labels = (*was.labels, *(label for label in info.labels if label not in was.labels))
        counts = {label: info.counts.get(label, 0) for label in labels}
        out[name] = replace(
            info, labels=labels, counts=counts, mean=was.mean, deviation=was.deviation, dual=was.dual
        )  # fmt: skip
    return out


def take(model: Model, found: Bundle) -> None:
    """Gives a fresh model a bundle's weights, those of a language model inside it apart, which it has already.

    Raises:
        BundleError: they do not fit.
    """
    state, fresh = load_file(found.path / "model.safetensors"), model.state_dict()
    known = {module_name(name): name for name in model.tasks}
    for key in [key for key in state if key.startswith(tuple(f"{part}." for part in _HEADS))]:
        if known.get(key.split(".")[1]) is None:
            del state[key]  # of a task that is answered no more
        elif key in fresh and fresh[key].shape != state[key].shape:
            state[key] = _grown(state[key], fresh[key])
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise bundles.BundleError(f"the weights of the bundle {found.path} do not fit the model: {error}") from error
    new = {module_name(name) for name in model.tasks if name not in found.tasks}
    lost = [key for key in missing if not key.startswith("backbone.") and key.split(".")[1:2] not in [[n] for n in new]]
    if lost or unexpected:
        raise bundles.BundleError(
            f"the weights of the bundle {found.path} do not fit the model: {[*lost, *unexpected][:3]}"
        )


def teacher(config: Config, found: Bundle, *, inside: bool) -> Model:
    """The bundle's model as it is, to learn from.

    Args:
        inside: whether it computes its language model's states itself, as the model that learns does.
    """
    encoder = load_language(config.model, found.tasks, place=str(found.path / "backbone"))
    model = assemble(config.model, make_all(found.tasks), encoder, trained=inside, weights=False)
    take(model, found)
    return model.eval().requires_grad_(False)


def _grown(old: Tensor, fresh: Tensor) -> Tensor:
    """The output layer of a head with more labels: see the module."""
    if old.shape[1:] != fresh.shape[1:] or len(old) > len(fresh):
        return old  # of another shape altogether, which loading tells
    out = torch.zeros_like(fresh)
    if out.ndim == 1:
        out += old.min()
    out[: len(old)] = old
    return out
