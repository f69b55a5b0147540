"""A Transformers checkpoint: where it lies, the part of it that is wanted, and its weights.

Nothing here knows a model by name. A part is recognised by what its forward takes: token ids, pictures, or sound; so a
model of text and pictures gives its vision part as a tower, and a model that transcribes gives its encoder.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmagent import storage

Kind = Literal["text", "image", "audio"]
ARGUMENTS: dict[Kind, tuple[str, ...]] = {
    "text": ("input_ids",),
    "image": ("pixel_values",),
    "audio": ("input_features", "input_values"),
}
_WANTED = {"text": "language", "image": "vision", "audio": "audio"}
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
# What Transformers, safetensors and torch raise of files that are missing, damaged, or of another kind.
_REFUSALS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, pickle.UnpicklingError)

_DROPOUT = re.compile(r"dropout|pdrop$")


class BackboneError(ValueError):
    """A checkpoint that cannot be loaded; says which path and what is missing."""


@dataclass(frozen=True, slots=True)
class Part:
    """What was wanted of a checkpoint."""

    model: Any  # the part itself, a Transformers model
    outline: Any  # the same on the meta device: shapes without numbers
    config: Any  # of the whole checkpoint
    prefix: str  # where the part stands in the whole; "" where it is the whole
    missing: frozenset[str]  # the part's parameters that the files do not hold
    place: str

    def require(self, names: Iterable[str]) -> None:
        """
        Raises:
            BackboneError: a parameter of these names is not in the files, and so would be random.
        """
        lost = sorted(self.missing & set(names))
        if lost:
            raise BackboneError(
                f"the weights in {self.place} lack {len(lost)} parameters, such as {lost[0]}: "
                "they belong to another model than config.json says; copy both from one place"
            )


def locate(name: str) -> str:
    """The folder of a checkpoint, or the hub id where the name is none.

    Raises:
        BackboneError: a folder that is missing or lacks its config.
    """
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise BackboneError(
                f"{name!r}: the Python package {package!r} is not installed; "
                f"`pip install {package.replace('_', '-')}` brings it"
            )
        return _checked(Path(spec.submodule_search_locations[0]) / inner, name)
    path = Path(os.path.expanduser(name))
    if path.is_absolute() or name.startswith((".", "~")):
        return _checked(path, name)
    below = storage.root() / name
    storage.fetched(below)
    if below.is_dir():
        return _checked(below, name)
    if name.count("/") > 1:
        raise BackboneError(f"{name!r}: no folder {below}, and no hub id either (those have one '/')")
    return name


def folder_of(name: str, key: str) -> Path:
    """The files of a checkpoint: its folder, or where the hub's lie on this machine.

    Args:
        key: of the config that names it.

    Raises:
        BackboneError: see `locate`; also where the hub's are not here.
    """
    from transformers.utils.hub import cached_file

    place = Path(locate(name))
    if place.is_dir():
        return place
    with refusing(name, str(place), key):
        found = cached_file(name, "config.json")
        if found is None:
            raise OSError("it has no config.json")
        return Path(found).parent


def load(name: str, kind: Kind, *, key: str, weights: bool = True, dropout: float | None = None) -> Part:
    """The part of a checkpoint that takes text, pictures or sound, with its pretrained weights or fresh ones.

    Parameters are made in one precision, whatever the files hold: the engine chooses how to compute. Files that are no
    safetensors are read with torch's ``weights_only=True``: none of their code runs.

    Args:
        key: the config's key that names the checkpoint, for messages.
        weights: false where the weights come from elsewhere, as a bundle's do.
        dropout: instead of the checkpoint's own, where given.

    Raises:
        BackboneError: see `locate`; also where weights are missing, or no part takes what is wanted.
    """
    place, config = locate(name), config_of(name, key)
    auto = _auto_class(config)
    if not settle(config, dropout) and dropout is not None:
        setting = "model.backbone_dropout" if key == "model.backbone" else f"{key.rpartition('.')[0]}.dropout"
        raise BackboneError(f"{setting}={dropout}, but the config of {name!r} has no dropout: leave it out")
    with refusing(name, place, key), quietly():
        with torch.device("meta"):
            whole = auto.from_config(copy.deepcopy(config))
        prefix, outline = find(whole, kind, name)
        if not weights:
            return Part(type(outline)(outline.config), outline, config, prefix, frozenset(), place)
        check_weights(name)
        whole, report = auto.from_pretrained(
            place, config=config, dtype=torch.float32, weights_only=True, output_loading_info=True
        )
    dot = f"{prefix}." if prefix else ""
    missing = frozenset(key.removeprefix(dot) for key in report["missing_keys"] if key.startswith(dot))
    return Part(whole.get_submodule(prefix), outline, config, prefix, missing, place)


def load_writing(name: str, *, key: str, weights: bool = True, dropout: float | None = None) -> Part:
    """The whole of a checkpoint that writes text, with its output layer; arguments as of `load`.

    Raises:
        BackboneError: see `load`; also where the checkpoint is an encoder, which does not write.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    place, config = locate(name), config_of(name, key)
    if not (decodes(config) or writes_behind_encoder(config)) and multimodal(config):
        raise BackboneError(
            f"{name!r} ({config.model_type}) is a multimodal model, which writes as a whole: set model.join=native"
        )
    if not (decodes(config) or writes_behind_encoder(config)):
        raise BackboneError(
            f"{name!r} ({config.model_type}) only reads: the task generate wants a decoder (as GPT-2, Llama and Qwen "
            f"are) or an encoder-decoder (as T5 and BART are): give another {key}"
        )
    settle(config, dropout)
    auto = AutoModelForCausalLM if decodes(config) else AutoModelForSeq2SeqLM
    return _whole(auto, name, place, config, key, weights)


def load_multimodal(name: str, *, key: str, weights: bool = True, dropout: float | None = None) -> Part:
    """The whole of a checkpoint that reads text with pictures or sounds and writes; arguments as of `load`.

    Raises:
        BackboneError: see `load`; also where the checkpoint is no such model.
    """
    from transformers import AutoModelForMultimodalLM

    place, config = locate(name), config_of(name, key)
    if not multimodal(config):
        raise BackboneError(
            f"model.join=native, but {name!r} ({config.model_type}) is no multimodal model of Transformers that reads "
            f"text (as Llava, Qwen-VL, Qwen-Audio and Florence-2 do): give one as {key}, or set model.join=input with "
            "towers of its own"
        )
    settle(config, dropout)
    return _whole(AutoModelForMultimodalLM, name, place, config, key, weights)


def _auto_class(config: Any) -> Any:
    """Transformers' class that makes the whole of a checkpoint: its bare model, or, where a family has none (pairs made
    of two checkpoints), the one with an output layer."""
    import transformers
    from transformers.models.auto import modeling_auto

    for name, known in (
        ("AutoModel", modeling_auto.MODEL_MAPPING),
        ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        ("AutoModelForSpeechSeq2Seq", modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING),
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in known:
            return getattr(transformers, name)
    return transformers.AutoModel  # it says what it does not know


def _whole(auto: Any, name: str, place: str, config: Any, key: str, weights: bool) -> Part:
    """A checkpoint as an auto class makes it."""
    with refusing(name, place, key), quietly():
        with torch.device("meta"):
            outline = auto.from_config(copy.deepcopy(config))
        if not weights:
            return Part(type(outline)(outline.config), outline, config, "", frozenset(), place)
        check_weights(name)
        whole, report = auto.from_pretrained(
            place, config=config, dtype=torch.float32, weights_only=True, output_loading_info=True
        )
    return Part(whole, outline, config, "", frozenset(report["missing_keys"]), place)


def decodes(config: Any) -> bool:
    """Whether a checkpoint of this config is a decoder alone: Transformers knows it as a causal language model, and not
    as one that fills masked words."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    if config.is_encoder_decoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    return kind not in MODEL_FOR_MASKED_LM_MAPPING or bool(getattr(config, "is_decoder", False))


def multimodal(config: Any) -> bool:
    """Whether a checkpoint of this config reads text with pictures or sounds, and writes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    return type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def writes_behind_encoder(config: Any) -> bool:
    """Whether a checkpoint of this config is an encoder with a decoder that writes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    return bool(config.is_encoder_decoder) and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def config_of(name: str, key: str) -> Any:
    """The config of a checkpoint, as Transformers reads it.

    Raises:
        BackboneError: see `locate`; also where it cannot be read.
    """
    from transformers import AutoConfig

    place = locate(name)
    with refusing(name, place, key):
        return AutoConfig.from_pretrained(place)


def check_weights(name: str) -> None:
    """
    Raises:
        BackboneError: a folder without weights.
    """
    place = Path(locate(name))
    if place.is_dir() and not any(any(place.glob(pattern)) for pattern in WEIGHT_FILES):
        raise BackboneError(
            f"the model folder {place} has no weights: {' or '.join(WEIGHT_FILES)} is wanted "
            "(model.save_pretrained writes it)"
        )


def takes(model: nn.Module) -> frozenset[str]:
    """The names of what a model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def unread(model: nn.Module, out: Tensor) -> set[str]:
    """Names of the parameters that `out`, which `model` computed, does not depend on or that stand still: a pooler, a
    token for masked places, fixed positions. Left among the parameters they would never get a gradient."""
    found, seen, open_ = set(), set(), [out.grad_fn]
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_ += [following for following, _ in node.next_functions]
    return {name for name, parameter in model.named_parameters() if id(parameter) not in found}


def hold(model: nn.Module, names: Iterable[str]) -> None:
    """Makes buffers of parameters: they travel with the weights, and are never trained, counted or decayed."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        value = module._parameters.pop(leaf)
        assert value is not None
        module.register_buffer(leaf, value.detach())


def still(model: nn.Module) -> None:
    """Leaves batch norms with their pretrained statistics: those of a batch would make a sample's answer depend on its
    neighbours, and differ among the ranks of a distributed run."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@contextlib.contextmanager
def refusing(name: str, place: str, key: str) -> Iterator[None]:
    """Turns what Transformers says of a checkpoint it cannot use into a `BackboneError`."""
    try:
        yield
    except BackboneError:
        raise
    except _REFUSALS as error:
        raise BackboneError(_unloadable(name, place, key, error)) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Transformers' progress bar, and its report of weights that are missing: `Part.require` asks for those
    that are read."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def find(whole: Any, kind: Kind, name: str, *, pairs: bool = False) -> tuple[str, Any]:
    """The outermost Transformers model inside `whole` that takes the wanted input and no other.

    Args:
        pairs: whether it may be an encoder with its decoder.
    """
    from transformers import PreTrainedModel

    foreign = {argument for other, arguments in ARGUMENTS.items() if other != kind for argument in arguments}
    foreign |= set() if pairs else {"decoder_input_ids"}
    for place, module in whole.named_modules():
        if isinstance(module, PreTrainedModel):
            accepted = takes(module)
            if accepted.intersection(ARGUMENTS[kind]) and not accepted & foreign:
                return place, module
    raise BackboneError(
        f"{name!r} is no {_WANTED[kind]} model: {type(whole).__name__} takes {', '.join(sorted(takes(whole))[:6])}, "
        f"but {' or '.join(ARGUMENTS[kind])} is wanted"
    )


def settle(config: Any, dropout: float | None) -> int:
    """No layer is skipped at random, since all ranks of a distributed run compute the same ones, and nothing is masked
    by the model itself: augmentation is a function of (seed, epoch, sample). Sets dropout where it is given: numbers
    whose name says so (hidden_dropout_prob, dropout_rate, resid_pdrop, ...); returns how many there are."""
    count = 0
    for field, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            count += settle(value, dropout)
        elif field.endswith("layerdrop"):
            setattr(config, field, 0.0)
        elif field in ("apply_spec_augment", "mask_time_prob"):  # some that mask do not name the first: it holds then
            config.apply_spec_augment = False
        elif _DROPOUT.search(field) and type(value) in (int, float):
            count += 1
            if dropout is not None:
                setattr(config, field, dropout)
    return count


def _checked(path: Path, name: str) -> str:
    if not path.is_dir():
        raise BackboneError(f"the model folder {path} does not exist (given as {name!r})")
    if not (path / "config.json").exists():
        inside = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise BackboneError(f"the model folder {path} has no config.json (it holds {inside})")
    return str(path)


def _unloadable(name: str, place: str, key: str, error: BaseException) -> str:
    if Path(place).is_dir():
        # Of a kind that it does not know Transformers lists all that it does, some hundred.
        said = str(error).split("\nModel type should be one of")[0]
        return f"the model folder {place} cannot be loaded ({key}): {said}"
    said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"{name!r} is no folder below {storage.root()}, and as a hub id it cannot be fetched: "
        f"{said}. Where the hub is out of reach, download the model elsewhere and "
        f"give its folder: {key}=/path/to/folder"
    )
