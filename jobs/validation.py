"""What a model says of the validation rows: how good it is, and what makes its confidence mean what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs.engine import Engine, moved
from jobs.workers import Group
from mmagent import freeze, metrics
from mmagent.batch import Sample
from mmagent.calibration import Calibration
from mmagent.model import Batch
from mmagent.predictor import modalities_of
from mmagent.record import Record
from mmagent.tasks import Outcome, Task

if TYPE_CHECKING:
    from jobs.supervised import Batches


@dataclass(frozen=True, slots=True)
class Answered:
    """What the model says of a validation row, before calibration."""

    task: str
    raw: Any  # of `Task.raw`
    record: Record  # without its media
    modalities: str


@torch.no_grad()
def answers(
    engine: Engine, batches: Batches, samples: list[Sample], group: Group
) -> tuple[list[Answered], tuple[float, float]]:
    """All ranks' answers to their validation samples, on every rank; and the summed loss, and the weight it is over.

    Every rank makes the same number of forward passes: ZeRO-3 gathers weights in each.
    """
    engine.model.eval()
    size, tasks = batches.config.train.micro_batch * 2, batches.inputs.tasks
    passes = int(max(group.gather(-(-len(samples) // size))))
    mine: list[Answered] = []
    loss = weight = 0.0
    for at in range(0, passes * size, size):
        part = samples[at : at + size]
        batch = moved(batches.make(part or [batches.blank]), engine.device)
        out = engine.forward(batch)
        for name, task in tasks.items():
            loss += float(task.loss(out[name], batch, 1, 0.0))
        weight += sum(sample.weight for sample in part)
        mine += _answered(tasks, out, batch, part)
    freeze.set_modes(engine.model)
    total, over = group.sum([loss, weight])
    return [item for part in group.gather(mine) for item in part], (total, over)


def _answered(tasks: Mapping[str, Task], out: Batch, batch: Batch, samples: list[Sample]) -> list[Answered]:
    found = []
    arrays = {name: task.outputs(out[name], batch).float().cpu().numpy() for name, task in tasks.items()}
    rows = batch["sample_row"].cpu().numpy()
    for index, sample in enumerate(samples):
        if sample.task in tasks:
            raw = tasks[sample.task].raw(arrays[sample.task][rows == index], sample.views)
            bare = replace(sample.record, images=(), audios=())
            found.append(Answered(sample.task, raw, bare, modalities_of(sample)))
    return found


def calibrations(tasks: Mapping[str, Task], answered: Sequence[Answered]) -> dict[str, Calibration]:
    """What makes each task's confidence mean what it says."""
    found = {}
    for name, task in tasks.items():
        known = [item for item in answered if item.task == name and task.gold(item.record) is not None]
        parts = zip(*((item.raw, item.record, item.modalities) for item in known), strict=True)
        found[name] = task.calibrate(*parts) if known else Calibration()
        if known:
            found[name] = found[name].model_copy(update={"curve": _curve(task, known, found[name])})
    return found


def _curve(task: Task, known: Sequence[Answered], fitted: Calibration) -> tuple[tuple[float, float, float], ...]:
    """Of `Calibration.curve`, for a task's answers whose right one is known."""
    decided = [(item, task.decide(item.raw, item.record, fitted, item.modalities)) for item in known]
    sure = np.array([decision.confidence for _, decision in decided])
    right = np.array([task.right(Outcome(task.gold(item.record), decision)) for item, decision in decided])
    points = metrics.coverage(metrics.Marked(sure, right))
    return tuple((row["confidence"], row["coverage"], row["accuracy"]) for row in points)


def validate(engine: Engine, batches: Batches, samples: list[Sample], group: Group) -> tuple[float, dict[str, float]]:
    """The score on the validation samples (the mean over tasks of each one's own), with the loss, all metrics, and the
    score for each kind of input."""
    answered, (loss, weight) = answers(engine, batches, samples, group)
    tasks, neutral = batches.inputs.tasks, Calibration()
    metrics, scores = {"loss": loss / max(weight, 1e-9)}, []
    for name, task in tasks.items():
        by_kind: dict[str, list[Outcome]] = {}
        for item in answered:
            if item.task == name and (gold := task.gold(item.record)) is not None:
                decision = task.decide(item.raw, item.record, neutral, item.modalities)
                by_kind.setdefault(item.modalities, []).append(Outcome(gold, decision))
        if not by_kind:
            continue
        before = f"{name}/" if len(tasks) > 1 else ""
        found = task.measure([outcome for part in by_kind.values() for outcome in part])
        scores.append(float(found[task.score]["value"] or 0.0))
        metrics |= {f"{before}{key}": float(number["value"] or 0.0) for key, number in found.items()}
        for kind in sorted(by_kind):
            part = task.measure(by_kind[kind])
            if task.score in part:
                metrics[f"{before}{task.score}/{kind}"] = float(part[task.score]["value"] or 0.0)
    return sum(scores) / max(1, len(scores)), metrics
