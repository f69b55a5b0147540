"""A search space: dotted keys of a recipe, the values that each may take, and where some of them exist at all.

    trials: 16
    set: {data.share: 0.1}                        # the same in every trial
    space:
      optim.lr: {loguniform: [3.0e-4, 5.0e-3]}
      model.dropout: {uniform: [0.0, 0.3]}
      train.micro_batch: {choice: [16, 32]}
      freeze.strategy: {choice: [connector, all, {top: {integer: [1, 4]}}, {lora: {choice: [4, 8, 16]}}]}
      freeze.lora_dropout: {uniform: [0.0, 0.1], when: {freeze.strategy: lora}}

A choice may bring a number of its own (``top:3``, ``lora:8``); ``when`` names what another key must be for this one to
exist. What does not exist in a sample is left as the recipe has it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmagent import config as configs
from mmagent.config import Config, ConfigError

KINDS = ("loguniform", "uniform", "integer", "choice")
MUTABLE = ("loguniform", "uniform")  # what may change while a trial trains, where it is a setting of training
_WHILE_TRAINING = ("optim.", "augment.", "model.dropout", "model.backbone_dropout", "freeze.lora_dropout")
Sample = dict[str, Any]  # dotted keys to what a trial has in place of the recipe's


class Space(BaseModel):
    """The file of a search space."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(16, gt=0, description="how many, the recipe's own values among them")
    method: Literal["random", "tpe", "population"] = Field(
        "random",
        description="where a sample comes from. random: spread evenly over the space. tpe: from where earlier trials "
        "did well (Optuna; arXiv:1907.10902). population: all trials learn on, and those behind take over what those "
        "ahead have learned, with other values of learning rates, dropout and the like (arXiv:1711.09846)",
    )
    scheduler: Literal["halving", "asha", "hyperband", "none"] = Field(
        "halving",
        description="which trials end early. halving: at each stage all are waited for, and the best one of "
        "`reduction` goes on, two at least (arXiv:1502.07943). asha: who is behind those that came as far, without "
        "waiting, for many trials at a time (arXiv:1810.05934). hyperband: brackets of halving that begin at different "
        "stages (arXiv:1603.06560). none: every trial runs to its end",
    )
    unit: Literal["steps", "seconds"] = Field("steps", description="of grace and most: optimizer steps, or seconds of "
                                              "training")  # fmt: skip
    grace: float | None = Field(
        None,
        gt=0,
        description="before a trial may be stopped, or a population changed; none: most / reduction², "
        "most / 16 of a population",
    )
    most: float | None = Field(None, gt=0, description="of a trial; none: the recipe's steps. Wanted with seconds")
    reduction: int = Field(4, ge=2, description="one of this many trials goes on at each stage")
    concurrent: int | None = Field(None, gt=0, description="trials at a time; none: as many as the cluster's CPUs hold")
    seeds: int = Field(
        3, ge=1, description="runs of the recipe's own values, whose deviation the winner has to exceed; 1: any gain"
    )
    metric: str | None = Field(
        None, description="of validation, what trials are compared by; none: the score that checkpoints are chosen by"
    )
    cost: Literal["trained_parameters", "seconds", "latency_ms"] | None = Field(
        None, description="told beside quality: the report shows who is best at each cost"
    )
    set: dict[str, Any] = Field({}, description="dotted keys replaced in every trial")
    space: dict[str, Any] = Field(description="dotted keys to distributions", min_length=1)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that is drawn. `key` is a recipe's, or ``freeze.strategy:top`` for the number behind a choice."""

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    options: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # other keys, and what they may be for this one to exist

    def at(self, share: float) -> Any:
        """The value at a share, 0 to 1, of the distribution."""
        share = min(max(share, 0.0), 1.0 - 1e-12)
        if self.kind == "choice":
            return self.options[int(share * len(self.options))]
        if self.kind == "integer":
            return int(self.low) + int(share * (int(self.high) - int(self.low) + 1))
        if self.kind == "loguniform":
            return rounded(math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low))))
        return rounded(self.low + share * (self.high - self.low))

    def share(self, value: Any) -> float | None:
        """Where a value lies in the distribution, 0 to 1; none where it lies in no way inside."""
        if self.kind == "choice":
            place = self.options.index(value) if value in self.options else None
            return None if place is None else (place + 0.5) / len(self.options)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        low, high, at = self.low, self.high, float(value)
        if self.kind == "loguniform":
            if at <= 0:
                return None
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low) if high > low and low <= at <= high else 0.5 if at == low == high else None

    def exists(self, raw: Mapping[str, Any]) -> bool:
        return all(raw.get(key) in wanted for key, wanted in self.when)


def rounded(value: float) -> float:
    """Four digits: what is told is what was trained."""
    return float(f"{value:.4g}")


def load(file: Path) -> Space:
    """Reads a space.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, with the nearest right one, or a distribution that is none.
    """
    try:
        space = Space.model_validate(yaml.safe_load(Path(file).read_text()))
        dimensions(space)
    except OSError as error:
        raise ConfigError(f"cannot read the search space {file}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the search space {file} is not YAML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"the search space {file}: {_explain(error.errors()[0])}") from error
    except ConfigError as error:
        raise ConfigError(f"the search space {file}: {error}") from error
    return space


def dimensions(space: Space) -> tuple[Dimension, ...]:
    """What is drawn, in the order in which one may depend on another.

    Raises:
        ConfigError: an unknown key, a distribution that is none, or a condition on what is not drawn before.
    """
    known = configs.keys()
    for key in (*space.set, *space.space):
        if key not in known:
            raise ConfigError(configs.unknown(key))
    if both := sorted(space.set.keys() & space.space.keys()):
        raise ConfigError(f"{both[0]} stands under set, the same in every trial, and under space: leave one out")
    found = [each for key, spec in space.space.items() for each in _dimensions(key, spec)]
    drawn = {each.key: each for each in found}
    ordered: list[Dimension] = []
    for each in sorted(found, key=lambda each: len(each.when)):
        for key, wanted in each.when:
            if key not in drawn:
                raise ConfigError(f"{each.key}: when names {key!r}, which is not drawn: {', '.join(drawn)} are")
            if drawn[key].when and ":" not in each.key:
                raise ConfigError(f"{each.key}: when names {key!r}, which depends on another key itself")
            for value in wanted:
                if drawn[key].kind == "choice" and value not in drawn[key].options:
                    options = ", ".join(map(str, drawn[key].options))
                    raise ConfigError(f"{each.key}: when wants {key}={value}, but there are {options}")
        ordered.append(each)
    return tuple(ordered)


def _dimensions(key: str, spec: Any) -> Iterator[Dimension]:
    spec = dict(spec) if isinstance(spec, Mapping) else spec
    when = spec.pop("when", {}) if isinstance(spec, dict) else {}
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        raise ConfigError(f"{key}: got {spec!r}, but one of {{{', '.join(KINDS)}: [...]}} is wanted, and perhaps when")
    if not isinstance(when, Mapping):
        raise ConfigError(f"{key}: when is a map of other keys to what they must be, but got {when!r}")
    conditions = tuple((name, tuple(v) if isinstance(v, list) else (v,)) for name, v in when.items())
    kind, values = next(iter(spec.items()))
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{key}: {kind} takes a list, but got {values!r}")
    if kind == "choice":
        options: list[Any] = []
        for option in values:
            if isinstance(option, Mapping):
                if len(option) != 1:
                    raise ConfigError(f"{key}: a choice with a number of its own is {{top: {{integer: [1, 4]}}}}, "
                                      f"but got {option!r}")  # fmt: skip
                ((name, inner),) = option.items()
                yield from _dimensions(f"{key}:{name}", _within(key, inner, conditions, name))
                options.append(name)
            else:
                options.append(option)
        if len(set(map(repr, options))) < len(options):
            raise ConfigError(f"{key}: choice names something twice: {options}")
        yield Dimension(key, kind, options=tuple(options), when=conditions)
        return
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {kind} takes [low, high] of numbers, but got {values!r}") from error
    if not (math.isfinite(low) and math.isfinite(high)) or not low < high or (kind == "loguniform" and low <= 0):
        above = ", both above 0" if kind == "loguniform" else ""
        raise ConfigError(f"{key}: {kind} wants low < high{above}, but got {values!r}")
    if kind == "integer" and (low != int(low) or high != int(high)):
        raise ConfigError(f"{key}: integer wants whole numbers, both taken in, but got {values!r}")
    yield Dimension(key, kind, low=low, high=high, when=conditions)


def _within(key: str, inner: Any, conditions: Sequence[tuple[str, tuple[Any, ...]]], name: str) -> Any:
    if not isinstance(inner, Mapping) or "when" in inner:
        raise ConfigError(f"{key}: {name} wants a distribution, e.g. {{integer: [1, 4]}}, but got {inner!r}")
    return {**inner, "when": {**{k: list(v) for k, v in conditions}, key: [name]}}


def sample(raw: Mapping[str, Any], dims: Sequence[Dimension]) -> Sample:
    """What a trial replaces, of what was drawn: only what exists, numbers joined to their choice."""
    present = {each.key: raw[each.key] for each in dims if each.key in raw and each.exists(raw)}
    out: Sample = {key: value for key, value in present.items() if ":" not in key}
    for key, value in present.items():
        if ":" in key:
            owner, _, name = key.partition(":")
            out[owner] = f"{name}:{value}"
    return out


def raw(sample: Mapping[str, Any], dims: Sequence[Dimension]) -> dict[str, Any]:
    """The other way: what would have to be drawn for a sample."""
    behind = {each.key for each in dims if ":" in each.key}
    out: dict[str, Any] = {}
    for key, value in sample.items():
        name, colon, number = str(value).partition(":")
        if colon and f"{key}:{name}" in behind:
            out[key] = name
            out[f"{key}:{name}"] = yaml.safe_load(number)
        else:
            out[key] = value
    return out


def own(config: Config, dims: Sequence[Dimension]) -> Sample:
    """The recipe's own values of all that is drawn."""
    return {each.key: configs.value(config, each.key) for each in dims if ":" not in each.key}


def spread(dims: Sequence[Dimension], count: int, seed: int) -> list[Sample]:
    """Samples that cover each dimension evenly (a Latin hypercube: McKay et al. 1979), by a seed. Every choice has its
    turn, however few they are."""
    from scipy.stats import qmc

    if count < 1:
        return []
    shares = qmc.LatinHypercube(d=len(dims), rng=np.random.default_rng([seed, 5])).random(count)
    return [sample({each.key: each.at(share) for each, share in zip(dims, row, strict=True)}, dims) for row in shares]


def mutable(dims: Sequence[Dimension]) -> list[Dimension]:
    """What a population may change while a trial trains: settings of training, in no way of the model's shape."""
    return [
        each for each in dims if each.kind in MUTABLE and not each.when and each.key.startswith(_WHILE_TRAINING)
    ]  # fmt: skip


def corners(dims: Sequence[Dimension]) -> list[Sample]:
    """Samples of one dimension each, at its ends and at every choice: what must be able to run."""
    out: list[Sample] = []
    for each in dims:
        values = each.options if each.kind == "choice" else (each.at(0.0), each.at(1.0))
        for value in values:
            given = {key: wanted[0] for key, wanted in each.when} | {each.key: value}
            needed = [d for d in dims if ":" in d.key and d.key not in given and d.exists(given)]
            out.append(sample(given | {d.key: d.at(0.0) for d in needed}, dims))
    return [each for index, each in enumerate(out) if each not in out[:index]]


def short(sample: Mapping[str, Any]) -> str:
    """A sample in one line."""
    return "  ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in sample.items()
    )


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Space.model_fields, n=1, cutoff=0.0)[0]
        return f"unknown key {key!r}: did you mean {near!r}? There are {', '.join(Space.model_fields)}"
    if item["type"] == "missing":
        example = "{optim.lr: {loguniform: [1.0e-4, 1.0e-2]}}"
        return f"{key} is missing: {Space.model_fields[key].description}, e.g. {example}"
    if not key:
        return f"it holds {type(item['input']).__name__}, but a map with trials and space is wanted (see --help)"
    return f"{key}: got {item['input']!r:.80}, but {item['msg']}"
