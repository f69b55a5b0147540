"""From the best checkpoint to a bundle: weights, calibration, and golden examples that a deployment must reproduce."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from mmagent import bundle, calibration, text
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.text import TextEncoder

if TYPE_CHECKING:
    from jobs.loop import Plan

_GOLDEN = 8


def export(
    path: Path,
    plan: Plan,
    weights: dict[str, Tensor],
    encoder: TextEncoder,
    tokenizer: Any,
    answers: tuple[np.ndarray, np.ndarray, np.ndarray],
    golden_source: Sequence[Path],
    chosen: dict[str, Any],
) -> None:
    """Writes the bundle of a run.

    Args:
        weights: of the whole module, whatever LoRA learnt merged; the language model's own are in it where it was part
            of the module.
        encoder: the language model, which is exported as it is where its weights are none of the module's.
        answers: to the validation rows: logits (n, labels), labels (n,), modalities (n,).
        golden_source: shards of the validation split.
        chosen: step and score of the checkpoint.
    """
    trained = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    if trained:
        # A new one: the trained one may hold adapters, or a rank's share of each weight.
        encoder = text.load_encoder(plan.config.model.backbone, weights=False)
        encoder.load_state_dict(trained)
    logits, labels, kinds = answers
    fitted = calibration.fit(logits, labels, kinds.tolist())
    parts = {part.name: {"trained": part.trained, "total": part.total} for part in plan.parts}
    origin = {"run": plan.folder.name, "data": plan.data, "checkpoint": chosen, "parts": parts}
    bundle.save(
        path,
        name=plan.name,
        config=plan.config,
        labels=plan.labels,
        state={key: value for key, value in weights.items() if not key.startswith("backbone.")},
        backbone=encoder,
        tokenizer=tokenizer,
        calibration=fitted,
        origin=origin,
    )
    golden = _golden(Predictor.load(path, device="cpu"), golden_source)
    bundle.add(path, {"golden.jsonl": "".join(json.dumps(row) + "\n" for row in golden)})


def _golden(predictor: Predictor, shards: Sequence[Path]) -> list[dict[str, Any]]:
    """Validation rows of every combination of modalities in turn, with the answers of the exported bundle."""
    by_kind: dict[str, list[Record]] = {}
    group = pq.ParquetFile(shards[0]).read_row_group(0).to_pylist() if shards else []
    for row in group:
        record = Record.from_row(row)
        by_kind.setdefault(record.modalities, []).append(record)
    share = max(1, _GOLDEN // max(1, len(by_kind)))
    records = [record for kind in sorted(by_kind) for record in by_kind[kind][:share]]
    out = []
    for record, answer in zip(records, predictor.predict(records), strict=True):
        out.append(
            {
                "id": record.id,
                "messages": [{"role": message.role, "content": message.content} for message in record.messages],
                "images": [{"bytes": base64.b64encode(media.read()).decode()} for media in record.images],
                "audios": [{"bytes": base64.b64encode(media.read()).decode()} for media in record.audios],
                "probabilities": dict(answer.probabilities),
            }
        )
    return out
