"""What trains: a named strategy applied to a model, the learning rate of each part, and the table that shows both.

Parts are the model's children: the language model (backbone), the towers, the heads; what else there is (fusion layers,
projectors) is the join. What a strategy trains stands on `FreezeConfig.strategy`. All but `head` train the join, the
heads and what starts from scratch: a frozen random part would be meaningless (`towers`, which asks for it, apart).
A part that is frozen computes as in evaluation, without dropout, and its batch statistics stand still.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmagent import lora
from mmagent.alignment import Alignment
from mmagent.assembly import Model
from mmagent.config import Config, FreezeConfig, TowerConfig
from mmagent.features import Kind
from mmagent.language import LanguageModel
from mmagent.native import Native
from mmagent.text import TextEncoder

Trained = Model | LanguageModel | Alignment  # what a run teaches
HEADS = ("heads", "image_heads")
TOWERS = ("image_tower", "audio_tower")


@dataclass(frozen=True, slots=True)
class Part:
    """A row of the table of parts."""

    name: str
    trained: int  # parameters that learn at some time of the run
    total: int


def needs_backbone(strategy: str) -> bool:
    """Whether the language model trains, and so must be inside the module; else its states may come from memory."""
    return strategy not in ("head", "connector", *TOWERS)


def storable(config: Config) -> tuple[Kind, ...]:
    """The frozen parts of a config's model that compute the same of a sample in every epoch: the language model where
    it stands outside the module, pretrained towers where nothing augments what they see."""
    model, change = config.model, config.augment
    found: list[Kind] = []
    strategy = config.freeze.strategy.partition(":")[0]
    if model.join == "output" and not needs_backbone(config.freeze.strategy) and not change.word_drop:
        found.append("text")
    changed: dict[str, tuple[float, ...]] = {
        "image": (change.image_crop, change.image_colour, change.image_flip),
        "audio": (change.audio_tempo, change.audio_pitch, change.audio_noise, change.audio_masks),
    }
    towers: tuple[tuple[Kind, TowerConfig | None], ...] = (("image", model.image), ("audio", model.audio))
    for kind, tower in towers:
        part = f"{kind}_tower"
        learns = strategy in ("all", part) or (strategy == "lora" and part in config.freeze.lora_parts)
        pretrained_here = tower is not None and tower.checkpoint and model.join != "native"
        if pretrained_here and not learns and not any(changed[kind]):
            found.append(kind)
    return tuple(found)


def parts_of(model: Trained) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The named parameters of each part, a weight of two parts (tied) the first one's: of the model's children, and of
    a native model those that stand inside it, named as the children of other models are."""
    out: dict[str, list[tuple[str, nn.Parameter]]] = {}
    known: set[int] = set()
    for name, child in model.named_children():
        inner = child.parts() if isinstance(child, Native) else {name: list(child.named_parameters())}
        for part, own in inner.items():
            out.setdefault(part, []).extend(pair for pair in own if id(pair[1]) not in known)
        known.update(id(parameter) for own in inner.values() for _, parameter in own)
    return out


def apply(model: Trained, config: FreezeConfig) -> None:
    """Sets `requires_grad` of every parameter that trains at some time of the run, and adds the products of `lora:R`.

    Raises:
        ValueError: the strategy asks for a part, layers or biases that the model has not.
    """
    strategy, _, argument = config.strategy.partition(":")
    model.requires_grad_(strategy != "head")
    for name, part in model.named_children():
        if name in HEADS:
            part.requires_grad_(True)
        elif name in TOWERS and strategy == "towers":
            part.requires_grad_(False)
        elif name in TOWERS and strategy not in ("all", name):
            for pretrained in lora.pretrained(part):
                pretrained.requires_grad_(False)
    if strategy in TOWERS and not parts_of(model).get(strategy):
        told = f"give the section model.{strategy[:5]}"
        told = "its checkpoint takes no such media" if isinstance(model.backbone, Native) else told
        raise ValueError(f"freeze.strategy={strategy}, but the model has none: {told}")
    if isinstance(model.backbone, Native):
        for name, own in model.backbone.parts().items():
            for _, parameter in own:
                parameter.requires_grad_(strategy != "head" and (name not in TOWERS or strategy in ("all", name)))
    if model.backbone is not None:
        _open_backbone(model.backbone, strategy, argument)
    if strategy == "lora":
        for name in config.lora_parts:
            lora.add(_module(model, name), name, int(argument), config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"freeze.strategy={config.strategy} leaves nothing of this model to train: what writes is the "
            "language model itself; choose all, top:K or lora:R"
        )
    set_modes(model)


def _open_backbone(backbone: TextEncoder, strategy: str, argument: str) -> None:
    for _, parameter in backbone.own():
        parameter.requires_grad_(strategy in ("all", "towers", "gradual"))
    if strategy == "top":
        depth, blocks = int(argument), backbone.blocks()
        if depth > len(blocks):
            raise ValueError(f"freeze.strategy=top:{depth}, but the language model has {len(blocks)} layers")
        for block in blocks[-depth:]:
            block.requires_grad_(True)
    if strategy == "bias":
        biases = [parameter for name, parameter in backbone.own() if _is_bias(name)]
        if not biases:
            raise ValueError(
                "freeze.strategy=bias, but this language model has no biases: lora:8 learns as few numbers"
            )
        for parameter in biases:
            parameter.requires_grad_(True)


def _module(model: Trained, part: str) -> nn.Module | None:
    """A part that holds something pretrained, where the model has it."""
    if not isinstance(model.backbone, Native):
        found: nn.Module | None = getattr(model, part)
        return found
    if part == "backbone":
        return model.backbone.language
    return next((tower for name, tower in model.backbone.towers() if name == part), None)


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def set_modes(model: nn.Module) -> None:
    """Training mode where something below a module learns, evaluation mode where all of it is frozen; what has no
    parameters (dropout) goes with what it stands in."""

    def walk(module: nn.Module, mode: bool) -> None:
        learns = [parameter.requires_grad for parameter in module.parameters()]
        module.training = any(learns) if learns else mode
        for child in module.children():
            walk(child, module.training)

    walk(model, True)


def compute_again(model: Trained) -> None:
    """Has the trained layers of pretrained models compute their states again in the backward pass, in place of keeping
    them (gradient checkpointing, arXiv:1604.06174).

    Raises:
        ValueError: the language model cannot, by Transformers' word.
    """
    for name in ("backbone", *TOWERS):
        part = getattr(model, name)
        for pretrained in lora.pretrained(part)[:1] if part is not None else ():
            with warnings.catch_warnings():  # Transformers 5.23 has a second name for it, earlier ones have not
                warnings.simplefilter("ignore", FutureWarning)
                pretrained.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def stage(model: Trained, config: FreezeConfig, step: int, total: int) -> int:
    """How far a gradual run has opened the language model at a step: not at all (0), its last layer (1), and so on to
    everything (layers + 1), evenly over the first `gradual_share` of the run (ULMFiT, arXiv:1801.06146, opens one
    layer an epoch). 0 for every other strategy."""
    if config.strategy != "gradual" or model.backbone is None:
        return 0
    stages = len(model.backbone.blocks()) + 1
    return min(stages, int(step / (config.gradual_share * total) * stages))


def thaw(model: Trained, config: FreezeConfig, stage: int) -> None:
    """Opens what a gradual run trains at a stage and closes the rest; any other strategy is as `apply` left it."""
    if config.strategy == "gradual" and model.backbone is not None:
        opens = _stages(model.backbone)
        for _, parameter in model.backbone.own():
            parameter.requires_grad_(opens[id(parameter)] <= stage)
    set_modes(model)


def _stages(backbone: TextEncoder) -> dict[int, int]:
    """When a gradual run opens each parameter, by its identity: layers from the last, then all that is none."""
    blocks = backbone.blocks()
    out = {id(parameter): len(blocks) + 1 for _, parameter in backbone.own()}
    for place, block in enumerate(reversed(blocks), start=1):
        out |= dict.fromkeys(map(id, block.parameters()), place)
    return out


def _layers_above(backbone: TextEncoder) -> dict[int, int]:
    """How many layers stand above each parameter, by its identity: what is made before the first layer lies below it
    (embeddings), what is made after the last one above (a closing norm)."""
    blocks = backbone.blocks()
    layer = {id(parameter): index for index, block in enumerate(blocks) for parameter in block.parameters()}
    out: dict[int, int] = {}
    reached = False
    for _, parameter in backbone.own():
        reached = reached or id(parameter) in layer
        outside = 0 if reached else len(blocks)
        out[id(parameter)] = len(blocks) - 1 - layer[id(parameter)] if id(parameter) in layer else outside
    return out


def table(model: Trained, encoder: TextEncoder | None = None) -> tuple[Part, ...]:
    """Trained and total parameters of each part, after `apply`.

    Args:
        encoder: the language model, where it stands outside the module.
    """
    outside = (
        [] if model.backbone is not None or encoder is None else [Part("backbone", 0, _count(encoder.parameters()))]
    )
    rows = []
    for name, named in parts_of(model).items():
        own = [parameter for _, parameter in named]
        rows.append(Part(name, _count(each for each in own if each.requires_grad), _count(own)))
    return (*outside, *(row for row in rows if row.total))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def show(parts: tuple[Part, ...]) -> str:
    """The table of parts for a terminal."""
    total = Part("total", sum(part.trained for part in parts), sum(part.total for part in parts))
    lines = [f"{'part':<12} {'trained':>13} {'of':>13}"]
    for part in (*parts, total):
        share = part.trained / part.total if part.total else 0.0
        lines.append(f"{part.name:<12} {part.trained:>13,} {part.total:>13,} {share:>7.2%}")
    return "\n".join(lines)


_WIDTH = 384  # of a language model that learns at a fifth of the head's rate


def _by_width(model: Trained, config: Config) -> float:
    """Wider matrices want smaller steps (as the rates that BERT's and larger models' papers give: arXiv:1810.04805,
    appendix A.3, arXiv:1907.11692, table 10); products of small rank and biases do not."""
    small = config.freeze.strategy.startswith("lora") or config.freeze.strategy == "bias"
    if small or model.backbone is None:
        return 1.0
    return min(1.0, _WIDTH / model.backbone.width) ** 2


_BEGUN = 1 / 10  # of the head's rate: what a tower learned before is not to be learned again


def _begun(model: Trained, config: Config) -> set[int]:
    """The parameters of towers that begin from learned weights, by identity; products of small rank do not."""
    out: set[int] = set()
    own = parts_of(model)
    for name, section in zip(TOWERS, (config.model.image, config.model.audio), strict=True):
        part = getattr(model, name, None)
        inside = set() if part is None else {id(p) for each in lora.pretrained(part) for p in each.parameters()}
        whole = isinstance(model.backbone, Native) or (section is not None and section.start is not None)
        out |= {id(p) for key, p in own.get(name, []) if (whole or id(p) in inside) and ".lora_" not in key}
    return out


def groups(model: Trained, config: Config) -> list[dict[str, Any]]:
    """The trained parameters as optimizer groups: for each part (backbone, towers, rest) its learning rate, lower by
    `optim.layer_decay` with each layer of the language model below the last, and weight decay on matrices only.
    Embeddings are matrices and decay, as in Transformers' Trainer. Where `optim.lr_towers` is not given, what a tower
    learned before learns on at a tenth of the rate, what is fresh in it at the whole.

    A group's `stage` is when a gradual run opens it (see `stage`); 0: from the start.
    """
    optim = config.optim
    rates = {
        "backbone": optim.lr_backbone or optim.lr / 5 * _by_width(model, config),
        "towers": optim.lr_towers or optim.lr,
        "rest": optim.lr,
    }
    begun = set() if optim.lr_towers else _begun(model, config)
    above = _layers_above(model.backbone) if model.backbone is not None else {}
    opens = _stages(model.backbone) if model.backbone is not None and config.freeze.strategy == "gradual" else {}
    members: dict[tuple[str, float, int, bool], list[nn.Parameter]] = {}
    for first, parameter in ((name, each) for name, own in parts_of(model).items() for _, each in own):
        if parameter.requires_grad:
            part = "backbone" if first == "backbone" else "towers" if first in TOWERS else "rest"
            rate = rates[part] * optim.layer_decay ** above.get(id(parameter), 0)
            rate *= _BEGUN if id(parameter) in begun else 1
            key = (part, rate, opens.get(id(parameter), 0), parameter.ndim > 1)
            members.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "name": part,
            "peak_lr": rate,
            "lr": rate,
            "stage": stage,
            "weight_decay": optim.weight_decay if matrix else 0.0,
        }
        for (part, rate, stage, matrix), parameters in members.items()
    ]
