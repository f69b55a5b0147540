"""What a run teaches by pairs: towers the states of the language model; it leaves towers and a backbone folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from jobs.engine import Engine, moved, pinned
from jobs.language import leave
from jobs.loop import Plan, Step
from jobs.workers import Group
from mmagent import alignment, freeze, lora, text, towers
from mmagent.alignment import KINDS, Alignment
from mmagent.augment import Words, augment
from mmagent.batch import Inputs, PartError, Sample
from mmagent.buckets import cuts
from mmagent.config import Config
from mmagent.frozen import FrozenStates
from mmagent.model import Batch
from mmagent.order import sample_rng
from mmagent.reading import View
from mmagent.record import Message, Record
from mmagent.text import TextEncoder

_TOWERS = {"image": ("image_tower", "image"), "audio": ("audio_tower", "speech")}  # kind -> the module's two parts


class Pairs(Inputs):
    """Reads pairs, which have words and no task."""

    def _views(self, record: Record, read: View | None) -> tuple[View, ...]:
        return (read or self.reader.whole(record),)

    def _offered(self, record: Record) -> tuple[Mapping[str, Any], ...]:
        return ()


def model_of(config: Config, encoder: TextEncoder, *, weights: bool = True) -> Alignment:
    """The module that learns.

    Raises:
        ValueError: the config makes no model, or has no towers.
    """
    if config.model.image is None and config.model.audio is None:
        raise ValueError("pretrain.objective=align teaches towers: give the section model.image or model.audio")
    torch.manual_seed(config.seed)
    inside = freeze.needs_backbone(config.freeze.strategy) or config.train.cache == "none"
    model = Alignment(
        config.model, encoder.width, encoder if inside else None, config.pretrain.temperature, weights=weights
    )
    freeze.apply(model, config.freeze)
    if config.train.gradient_checkpointing:
        freeze.compute_again(model)
    return model


class Aligned:
    """Teaches towers by pairs."""

    main = "recall_at_1"
    last_error = ""

    def __init__(self, plan: Plan) -> None:
        config = plan.config
        self._plan, self._config = plan, config
        self._encoder = text.load_encoder(config.model.backbone, dropout=config.model.backbone_dropout)
        self._tokenizer = text.load_tokenizer(config.model.backbone)
        self._inputs = Pairs(config.model, config.data, self._tokenizer, {})
        self._words = Words.of(self._tokenizer)
        self._blank = Sample(
            Record("", (Message("user", ""),)), (View(self._inputs.tokenize([""])[0]),), False, (), (), 0.0
        )
        self.model = model_of(config, self._encoder)

    def begin(self, device: torch.device) -> None:
        self._device = device
        self._frozen = FrozenStates(self._encoder, device=device, exact=True) if self.model.backbone is None else None

    @property
    def notes(self) -> list[str]:
        return self._encoder.unpacked()

    def rows(self, tables: Iterator[pa.Table]) -> list[Sample]:
        found = (self._sample(row, None)[0] for table in tables for row in table.to_pylist())
        return [sample for sample in found if sample.weight > 0]

    def steps(self, tables: Iterator[pa.Table]) -> Iterator[Step]:
        for table in tables:
            read = [self._sample(row, row["epoch"]) for row in table.to_pylist()]
            samples = [sample for sample, _ in read]
            made = [self._make(samples[part]) for part in cuts(table["micro"].to_numpy())]
            yield Step(made, sum(bad for _, bad in read), sum(sample.cut > 0 for sample in samples))

    def loss(self, out: Batch, batch: Batch) -> Tensor:
        return alignment.loss(out, batch, self._config.train.micro_batch)

    def hits(self, out: Batch, batch: Batch) -> tuple[Tensor, Tensor]:
        return alignment.hits(out, batch)

    @torch.no_grad()
    def validate(self, engine: Engine, rows: list[Sample], group: Group) -> tuple[float, dict[str, float]]:
        """Recall at 1 over all validation pairs, from media to words and back, its mean over both and over kinds: the
        score; the loss is of the contrast among all of them."""
        engine.model.eval()
        size = self._config.train.micro_batch * 2
        passes = int(max(group.gather(-(-len(rows) // size))))
        mine: dict[str, list[tuple[Tensor, Tensor, list[bytes]]]] = {kind: [] for kind in KINDS}
        scale = 1.0
        for at in range(0, passes * size, size):
            part = rows[at : at + size] or [self._blank]
            batch = moved(self._make(part), engine.device)
            out = engine.forward(batch)
            scale = float(out["scale"])
            for kind in KINDS:
                if kind in out and (pairs := alignment.of_kind(out, batch, kind)) is not None:
                    keys = [part[row].views[0].ids.tobytes() for row in pairs.row.tolist()]
                    mine[kind].append((pairs.media.float().cpu(), pairs.words.float().cpu(), keys))
        freeze.set_modes(engine.model)
        everyone = group.gather(mine)
        found: dict[str, float] = {}
        for kind in KINDS:
            if parts := [made for each in everyone for made in each[kind]]:
                media, words = (torch.cat([made[index] for made in parts]) for index in (0, 1))
                keys = [key for made in parts for key in made[2]]
                found |= {f"{name}/{kind}": value for name, value in _measured(media, words, keys, scale).items()}
        names = {name.partition("/")[0] for name in found}
        means = {name: _mean([value for key, value in found.items() if key.startswith(f"{name}/")]) for name in names}
        metrics = {"loss": 0.0, "recall_at_1": 0.0} | means | found
        return metrics["recall_at_1"], metrics

    def export(self, engine: Engine, rows: list[Sample], group: Group, chosen: dict[str, Any]) -> None:
        _, found = self.validate(engine, rows, group)
        weights = engine.state(self._plan.folder)
        if group.rank != 0:
            return
        weights = lora.merged(self.model, weights)
        config, encoder = self._config, self._encoder
        for kind, parts in _TOWERS.items():
            section = getattr(config.model, kind)
            if section is not None:
                names = dict(zip((towers.TOWER, towers.PROJECTION), parts, strict=True))
                kept = {name: _below(weights, part) for name, part in names.items()}
                towers.keep(section, self._plan.folder / "towers" / kind, kept)
        if self.model.backbone is not None:
            encoder = text.load_encoder(config.model.backbone, weights=False)
            encoder.load(_below(weights, "backbone"))
        about = {"objective": "align", "validation": found, "checkpoint": chosen}
        assert self._plan.bundle is not None
        leave(self._plan, self._plan.bundle, encoder.save, self._tokenizer, about)

    def _sample(self, row: dict[str, Any], epoch: int | None) -> tuple[Sample, bool]:
        blank = replace(self._blank, record=replace(self._blank.record, id=row["id"]))
        try:
            sample = self._inputs.sample(
                Record.from_row(row), View(np.asarray(row["ids"], dtype=np.int64), cut=row["cut"])
            )
        except PartError as error:
            self.last_error = f"row {row['id']!r}: {error}"
            return blank, True
        if epoch is None:
            return sample, False
        rng = sample_rng(self._config.seed, epoch, sample.id)
        return augment(sample, self._config.augment, self._words, rng), False

    @torch.no_grad()
    def _make(self, samples: list[Sample]) -> Batch:
        batch = self._inputs.batch(samples)
        if self._frozen is not None:
            batch["text_states"] = self._frozen(batch["ids"], batch["mask"])
        return pinned(batch, self._device)


def _measured(media: Tensor, words: Tensor, keys: list[bytes], scale: float) -> dict[str, float]:
    """Of all pairs of a kind; words that are the same are each other's."""
    alike = alignment.likeness(media, words)
    place = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    names = torch.tensor([place[key] for key in keys])
    same = names[:, None] == names[None]
    there, back = (same[torch.arange(len(keys)), each.argmax(1)].float().mean() for each in (alike, alike.T))
    own = (alike * scale).masked_fill(~same, torch.finfo(torch.float32).min)
    loss = ((alike * scale).logsumexp(1) - own.logsumexp(1)).mean()
    return {"recall_at_1": float(there + back) / 2, "loss": float(loss)}


def _below(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{part}."): value for key, value in weights.items() if key.startswith(f"{part}.")}


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
