"""What a run teaches by plain text: a language model its hidden words, or the next; it leaves a backbone folder."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from jobs.engine import Engine, moved, pinned
from jobs.loop import Plan, Step
from jobs.workers import Group
from mmagent import freeze, language, lora, storage, text
from mmagent.buckets import cuts
from mmagent.config import Config
from mmagent.language import LanguageModel
from mmagent.masking import Masking, following
from mmagent.model import Batch
from mmagent.order import sample_rng
from mmagent.tasks.task import IGNORED

SEAL = "pretrained.json"  # written last, into the backbone folder

Row = tuple[str, np.ndarray, float]  # id, token ids (tokens,), weight


def model_of(config: Config, *, weights: bool = True) -> LanguageModel:
    """The module that learns.

    Raises:
        BackboneError: see `mmagent.language`.
        ValueError: a strategy that the model has no parts for.
    """
    torch.manual_seed(config.seed)
    objective = objective_of(config)
    name, dropout = config.model.backbone, config.model.backbone_dropout
    model = language.load(name, objective, weights=weights, dropout=dropout)
    freeze.apply(model, config.freeze)
    if config.train.gradient_checkpointing:
        freeze.compute_again(model)
    return model


def objective_of(config: Config) -> language.Objective:
    """What is learned, where the config leaves it open."""
    if config.pretrain.objective in ("masked", "next"):
        return config.pretrain.objective
    return language.objective_of(config.model.backbone, text.load_tokenizer(config.model.backbone))


class Language:
    """Teaches a language model by plain text."""

    main = "perplexity"
    last_error = ""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._config = plan, plan.config
        self._tokenizer = text.load_tokenizer(plan.config.model.backbone)
        self._objective = objective_of(plan.config)
        self._masking = (
            Masking.of(self._tokenizer, plan.config.pretrain.mask_share) if self._objective == "masked" else None
        )
        self.model = model_of(plan.config)

    def begin(self, device: torch.device) -> None:
        self._device = device

    @property
    def notes(self) -> list[str]:
        return self.model.backbone.unpacked()

    def rows(self, tables: Iterator[pa.Table]) -> list[Row]:
        return [row for table in tables for row in _rows(table) if row[2] > 0]

    def steps(self, tables: Iterator[pa.Table]) -> Iterator[Step]:
        for table in tables:
            rows, epoch = _rows(table), table["epoch"][0].as_py()
            yield Step([self.make(rows[part], epoch) for part in cuts(table["micro"].to_numpy())])

    def make(self, rows: list[Row], epoch: int) -> Batch:
        """The tensors of a micro-batch, ready to go to the device: ids, mask, targets (rows, tokens), weight (rows,).
        What is hidden in a text is a function of (seed, epoch, text)."""
        pairs = [self._asked(id, ids, epoch) for id, ids, _ in rows]
        shape = (len(rows), max(len(ids) for ids, _ in pairs))
        ids, mask = np.full(shape, self._tokenizer.pad_token_id, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        for row, (shown, asked) in enumerate(pairs):
            ids[row, : len(shown)], mask[row, : len(shown)], targets[row, : len(shown)] = shown, 1, asked
        batch = {name: torch.from_numpy(value) for name, value in (("ids", ids), ("mask", mask), ("targets", targets))}
        batch["weight"] = torch.tensor([weight for *_, weight in rows])
        return pinned(batch, self._device)

    def loss(self, out: Batch, batch: Batch) -> Tensor:
        return language.loss(out["logits"], batch, self._config.train.micro_batch)

    def hits(self, out: Batch, batch: Batch) -> tuple[Tensor, Tensor]:
        return language.hits(out["logits"], batch)

    @torch.no_grad()
    def validate(self, engine: Engine, rows: list[Row], group: Group) -> tuple[float, dict[str, float]]:
        """Minus the mean loss of a word that is asked for; with its exponential, the perplexity."""
        engine.model.eval()
        size = self._config.train.micro_batch * 2
        passes = int(max(group.gather(-(-len(rows) // size))))
        blank: Row = ("", np.array([self._tokenizer.pad_token_id]), 0.0)
        sums = [0.0, 0.0, 0.0]
        for at in range(0, passes * size, size):
            batch = moved(self.make(rows[at : at + size] or [blank], 0), engine.device)
            logits = engine.forward(batch)["logits"]
            right, asked = language.hits(logits, batch)
            each = batch | {"weight": (batch["targets"] != IGNORED).sum(1) * (batch["weight"] > 0)}
            sums = [sums[0] + float(language.loss(logits, each, 1)), sums[1] + float(right), sums[2] + float(asked)]
        freeze.set_modes(engine.model)
        loss, right_total, total = group.sum(sums)
        mean = loss / max(total, 1.0)
        found = {"loss": mean, "perplexity": math.exp(min(mean, 80.0)), "accuracy": right_total / max(total, 1.0)}
        return -mean, found

    def export(self, engine: Engine, rows: list[Row], group: Group, chosen: dict[str, Any]) -> None:
        _, found = self.validate(engine, rows, group)
        weights = engine.state(self._plan.folder)
        if group.rank == 0:
            model = language.load(self._config.model.backbone, self._objective, weights=False)
            model.load(lora.merged(self.model, weights))
            assert self._plan.bundle is not None
            about = {"objective": self._objective, "validation": found}
            leave(self._plan, self._plan.bundle, model.save, self._tokenizer, about | {"checkpoint": chosen})

    def _asked(self, id: str, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._masking is None:
            return ids, following(ids)
        return self._masking(ids, sample_rng(self._config.seed, epoch, id))


def leave(plan: Plan, folder: Path, save: Any, tokenizer: Any, about: Mapping[str, Any]) -> None:
    """Writes a backbone folder beside its place and renames it there; its seal says what it was made of."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        save(draft)
        tokenizer.save_pretrained(draft)
        made = {"run": plan.name, "from": plan.config.model.backbone, "data": plan.data, **about}
        storage.publish_json(draft / SEAL, made)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _rows(table: pa.Table) -> list[Row]:
    columns = (table["id"].to_pylist(), table["ids"].to_pylist(), table["weight"].to_pylist())
    return [(id, np.asarray(ids, np.int64), float(weight)) for id, ids, weight in zip(*columns, strict=True)]
