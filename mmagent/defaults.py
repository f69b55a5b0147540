"""What a recipe leaves to the data set: towers that nothing would come to, where they join, what trains, for how long,
and how often to validate. Settled once, before a run begins; what was settled stands in the run's config."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from mmagent import storage, text
from mmagent.config import LONGEST, Config, ImageTowerConfig, override
from mmagent.media import Limits, MediaError, check_image
from mmagent.shards import Dataset
from mmagent.targets import TaskInfo, kind

SMALL = 200_000_000  # parameters of a language model that trains as a whole on one machine
_LORA = "lora:16"
_OUTSIDE = ("head", "connector", "image_tower", "audio_tower")  # strategies that leave the language model as it is
_UNLABELLED_EPOCHS = 3
_MEASURED = 256  # pictures whose shape is looked at
_SQUARE = 1.5  # a longer side to a shorter one that a square does no harm to
_OF_WORDS = ("tag", "relate", "extract", "match", "generate")  # the answer is about single words, not the gist


class _Passes(NamedTuple):
    """How long what learns wants to be shown samples."""

    samples: int  # in all
    fewest: int
    most: int


_SCRATCH = _Passes(samples=200_000, fewest=4, most=40)
_PRETRAINED = _Passes(samples=64_000, fewest=3, most=6)


def settle(config: Config, dataset: Dataset) -> tuple[Config, list[str]]:
    """The config of a run on a data set, and a line for each thing that the recipe did not say.

    Raises:
        BackboneError: a language model whose config cannot be read.
    """
    found: dict[str, Any] = {}
    notes = []
    there = modalities(dataset)
    towers = []
    for name, tower, words in (("image", config.model.image, "pictures"), ("audio", config.model.audio, "sound")):
        if tower is None:
            continue
        if config.model.join == "native":
            found[f"model.{name}"] = None
        elif name in there:
            towers.append(tower)
        else:
            found[f"model.{name}"] = None
            notes.append(f"no {words} in {dataset.name}: model.{name}=null")
    strategy = config.freeze.strategy
    if strategy == "auto":
        strategy, why = _strategy(config, dataset, towers=bool(towers))
        found["freeze.strategy"] = strategy
        notes.append(f"freeze.strategy={strategy}: {why}")
    if config.model.image is not None and config.model.image.aspect == "auto" and found.get("model.image", 1):
        found["model.image.aspect"], why = _aspect(config.model.image, dataset)
        notes += [why] if why else []
    if config.model.join == "auto":
        found["model.join"], why = _join(dataset, towers=bool(towers), learns=strategy not in _OUTSIDE)
        notes.append(f"model.join={found['model.join']}: {why}")
    if config.model.match == "auto" and any(kind(task) == "match" for task in dataset.tasks):
        pairs = _pairs(dataset)
        found["model.match"] = "dual" if pairs else "cross"
        if pairs:
            notes.append("model.match=dual: training rows bring one candidate each")
    if config.train.epochs == "auto":
        scratch = any(tower.checkpoint is None for tower in towers)
        found["train.epochs"], why = _epochs(round(dataset.rows("train") * config.data.share), scratch=scratch)
        notes.append(f"train.epochs={found['train.epochs']:g}: {why}")
    if config.train.eval_every_epochs is not None:
        epoch = dataset.rows("train") * config.data.share / config.global_batch
        steps = max(config.train.eval_every_steps, round(config.train.eval_every_epochs * epoch))
        found |= {"train.eval_every_steps": steps, "train.eval_every_epochs": None}
    return (override(config, found) if found else config), notes


def described(config: Config, dataset: Dataset) -> dict[str, TaskInfo]:
    """The tasks of a data set as a settled config trains them."""
    dual = config.model.match == "dual"
    return {name: replace(info, dual=dual and info.kind == "match") for name, info in dataset.tasks.items()}


def settle_unlabelled(config: Config, *, aligned: bool) -> Config:
    """The config of a run without labels: of towers (aligned) or of the language model itself."""
    found: dict[str, Any] = {}
    if config.freeze.strategy == "auto":
        found["freeze.strategy"] = "connector" if aligned else "all"
    if config.model.join == "auto":
        found["model.join"] = "output"
    if config.model.image is not None and config.model.image.aspect == "auto":
        found["model.image.aspect"] = 1.0
    if config.train.epochs == "auto":
        found["train.epochs"] = _UNLABELLED_EPOCHS
    return override(config, found) if found else config


def _join(dataset: Dataset, *, towers: bool, learns: bool) -> tuple[str, str]:
    """Where towers join, and why. Layers from scratch between a language model that learns and the head gain nothing;
    behind a frozen one they do, and its states can be kept."""
    if any(kind(task) == "generate" for task in dataset.tasks):
        return "input", "the language model writes"
    if not towers and learns:
        return "input", "the head reads the language model's own states"
    return "output", "fusion layers learn over the language model's states"


def _aspect(tower: ImageTowerConfig, dataset: Dataset) -> tuple[float, str]:
    """The shape of what a tower from scratch sees, and a line about it where it is no square: the middle one of the
    pictures'. What is squeezed to a fraction of its width loses what stands side by side."""
    if tower.checkpoint is not None or tower.start is not None:
        return 1.0, ""
    shapes = sorted(itertools.islice(_shapes(dataset), _MEASURED))
    middle = shapes[len(shapes) // 2] if shapes else 1.0
    if 1 / _SQUARE < middle < _SQUARE:
        return 1.0, ""
    aspect = round(min(max(middle, 1 / LONGEST), LONGEST), 2)
    return aspect, f"model.image.aspect={aspect:g}: width to height of the middle one of {len(shapes):,} pictures"


def _shapes(dataset: Dataset) -> Iterator[float]:
    """Width to height of the training pictures, by their headers; a candidate's are as good as a message's."""
    limits = Limits()
    for table in dataset.read("train", columns=["images", "candidates"]):
        for row in table.to_pylist():
            for image in (*(row["images"] or ()), *(each["image"] for each in row["candidates"] or ())):
                if image and image["bytes"]:
                    with contextlib.suppress(MediaError):  # counted where it is decoded
                        header = check_image(image["bytes"], limits)
                        yield header.width / header.height


def _pairs(dataset: Dataset) -> bool:
    """Whether there are rows with candidates in training, and none with several."""
    most = 0
    for file in dataset.shard_files("train"):
        column = pq.ParquetFile(storage.source(file)).read(columns=["candidates.list.element.content"])["candidates"]
        most = max(most, pc.max(pc.list_value_length(column)).as_py() or 0)
    return most == 1


def _epochs(rows: int, *, scratch: bool) -> tuple[float, str]:
    """How many passes, and why: what begins without knowledge wants more samples, few rows want more passes."""
    samples, fewest, most = _SCRATCH if scratch else _PRETRAINED
    why = "towers learn from scratch" if scratch else "what learns was pretrained"
    return round(min(most, max(fewest, samples / max(1, rows))), 1), f"{rows:,} rows, {why}"


def modalities(dataset: Dataset) -> set[str]:
    """What some row of training holds: text, image, audio; also where only candidates hold it."""
    counted: Mapping[str, int] = dataset.info["splits"]["train"].get("modalities") or {}
    if not counted:  # made by hand: nothing is known
        return {"text", "image", "audio"}
    return {name for key in counted for name in key.split("+")}


def _strategy(config: Config, dataset: Dataset, *, towers: bool) -> tuple[str, str]:
    """What trains, and why: a frozen language model's states can be kept, which makes training with towers fast; where
    the answer lies in the words, they have to learn."""
    words = sorted({kind(task) for task in dataset.tasks} & set(_OF_WORDS))
    if towers and not words and config.model.join not in ("input", "native"):
        return "connector", "towers learn, the language model's states are kept"
    size = _size(config.model.backbone)
    why = f"{' and '.join(words)} ask for single words" if words else "all there is to learn from is text"
    if config.model.join == "native":
        why = "the model's own towers join at its language model"
    if config.model.join == "input":
        why = "towers join at the language model's input"
    if size <= SMALL:
        return "all", f"{why}; the language model has {size / 1e6:,.0f}M parameters"
    return _LORA, f"{why}; the language model has {size / 1e6:,.0f}M parameters, too many to train them all"


def _size(backbone: str) -> int:
    with torch.device("meta"):
        encoder = text.load_encoder(backbone, weights=False)
    return sum(parameter.numel() for parameter in encoder.parameters())
