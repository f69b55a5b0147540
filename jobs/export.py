"""From the best checkpoint to a bundle: weights, calibration, and golden examples that a deployment must reproduce."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from jobs import replay
from mmagent import bundle, familiar, storage
from mmagent.assembly import load_language
from mmagent.batch import PartError
from mmagent.calibration import Calibration
from mmagent.familiar import Familiar
from mmagent.predictor import Predictor, modalities_of
from mmagent.record import Record
from mmagent.shards import Dataset, DatasetError
from mmagent.text import TextEncoder

if TYPE_CHECKING:
    from jobs.loop import Plan

_GOLDEN = 8
_FAMILIAR, _PASS = 512, 32  # validation rows; of one forward pass


def export(
    path: Path,
    plan: Plan,
    weights: dict[str, Tensor],
    encoder: TextEncoder,
    tokenizer: Any,
    fitted: Mapping[str, Calibration],
    chosen: dict[str, Any],
) -> None:
    """Writes the bundle of a run.

    Args:
        weights: of the whole module, whatever LoRA learnt merged; the language model's own are in it where it was part
            of the module.
        encoder: the language model, which is exported as it is where its weights are none of the module's.
        fitted: each task's calibration.
        chosen: step and score of the checkpoint.
    """
    trained = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    if trained:
        # A new one: the trained one may hold adapters, or a rank's share of each weight.
        encoder = load_language(plan.config.model, plan.tasks, weights=False)
        encoder.load(trained)
    parts = {part.name: {"trained": part.trained, "total": part.total} for part in plan.parts}
    origin = {"run": plan.folder.name, "data": plan.data, "checkpoint": chosen, "parts": parts}
    bundle.save(
        path,
        name=plan.name,
        config=plan.config,
        tasks=plan.tasks,
        task=plan.task,
        state={key: value for key, value in weights.items() if not key.startswith("backbone.")},
        backbone=encoder,
        tokenizer=tokenizer,
        calibration=fitted,
        origin=origin,
    )
    del weights, trained, encoder  # before the bundle is read again: nothing is held twice
    predictor = Predictor.load(path, device="cpu")
    golden = _golden(predictor, plan.golden_source)
    files: dict[str, str | bytes] = {"golden.jsonl": "".join(json.dumps(row) + "\n" for row in golden)}
    if known := _familiar(predictor, plan.golden_source, plan.config.seed):
        files[familiar.FILE] = familiar.packed(known)
    if plan.config.data.memory_rows and (learned := _learned(plan)) is not None:
        files[replay.MEMORY] = replay.remembered([learned], plan.config.data.memory_rows, plan.config.seed)
    bundle.add(path, files)


def _learned(plan: Plan) -> Dataset | None:
    """The data set of a run, with the labels that were drawn; none where it has none of ours."""
    drawn = plan.folder / "drawn"
    try:
        return Dataset.open(drawn if drawn.is_dir() else storage.folder("data", plan.data))
    except DatasetError:
        return None


def _golden(predictor: Predictor, shards: Sequence[Path]) -> list[dict[str, Any]]:
    """Validation rows of every task and combination of modalities in turn, with the answers of the exported bundle."""
    by_kind: dict[tuple[str, str], list[Record]] = {}
    group = pq.ParquetFile(storage.source(shards[0])).read_row_group(0).to_pylist() if shards else []
    for row in group:
        record = Record.from_row(row)
        with contextlib.suppress(PartError):  # a row that was set aside in training is no example
            predictor.prepare(record)
            by_kind.setdefault((record.task, record.modalities), []).append(record)
    share = max(1, _GOLDEN // max(1, len(by_kind)))
    records = [record for kind in sorted(by_kind) for record in by_kind[kind][:share]]
    return [
        {"record": jsonable(record), "answer": answer.to_dict(timings=False)}
        for record, answer in zip(records, predictor.predict(records), strict=True)
    ]


def _familiar(predictor: Predictor, shards: Sequence[Path], seed: int) -> dict[str, Familiar]:
    """What validation rows look like to the bundle's encoders, by kind of input."""
    samples = []
    for row in _rows(shards, _FAMILIAR):
        with contextlib.suppress(PartError):
            samples.append(predictor.prepare(Record.from_row(row)))
    found: dict[str, list[tuple[Any, str]]] = {}
    for at in range(0, len(samples), _PASS):
        part = samples[at : at + _PASS]
        for sample, states in zip(part, predictor.states(part), strict=True):
            for kind, vector in states.items():
                found.setdefault(kind, []).append((vector, modalities_of(sample)))
    made = {
        kind: familiar.learned(np.stack([vector for vector, _ in each]), [mode for _, mode in each], seed)
        for kind, each in found.items()
    }
    return {kind: each for kind, each in made.items() if each is not None}


def _rows(shards: Sequence[Path], count: int) -> Iterator[dict[str, Any]]:
    """The first rows of shards, as many from each."""
    for file in shards:
        left = max(1, count // len(shards))
        for part in pq.ParquetFile(storage.source(file)).iter_batches(batch_size=64):
            yield from part.to_pylist()[:left]
            left -= part.num_rows
            if left <= 0:
                break


def jsonable(record: Record) -> dict[str, Any]:
    """The record's row with its media as base64, as `mmagent.rows.parse` reads it."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return base64.b64encode(value).decode()
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    row = record.to_row() | {"meta": dict(record.meta)}
    return {key: plain(value) for key, value in row.items() if value not in (None, [], {}, "")}
