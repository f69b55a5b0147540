"""What is written of an evaluation for people: its page, and the model card of the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs import baselines, diagnosis
from mmagent import bundle as bundles
from mmagent import card, evaluation, examples, predictions, report, storage, text
from mmagent import licence as licences
from mmagent.bundle import Bundle
from mmagent.examples import Example
from mmagent.markup import tag
from mmagent.panels import panel
from mmagent.shards import Dataset
from mmagent.tasks import make_all

SLICES = ("form", "voice", "family", "modalities")  # those that no row has make no slice


def write_report(
    result: Mapping[str, Any],
    found: Bundle,
    dataset: Dataset,
    table: pa.Table,
    out: Path,
    *,
    slices: Sequence[str] = SLICES,
    seed: int = 0,
    curves: Sequence[Mapping[str, Any]] = (),
    more: Sequence[report.Section] = (),
) -> None:
    """Writes report.html into `out`.

    Args:
        result, table: what evaluation.json and predictions.parquet hold.
        curves: the lines of the run's ``metrics.jsonl``.
        more: sections behind the first one.
    """
    named = result.get("matched", {})
    shown = _examples(table, dataset, result["split"], found, named, first_slice(table, slices), seed)
    told = [*more, *_checked(dataset)]
    page = report.render(result, curves=curves, examples=shown, limits=found.config.data.media, more=told)
    storage.publish(out / "report.html", page)


def describe(bundle: str | Path, dataset: Dataset, result: Mapping[str, Any]) -> None:
    """Writes the result and the model card into a bundle.

    Args:
        dataset: what the bundle was trained on.
        result: of `evaluate`, on a split that training never saw.
    """
    found = bundles.load(bundle)
    backbone = Path(text.locate(found.config.model.backbone))
    words = card.render(
        found.manifest, found.config, tasks=found.tasks, evaluation=result, dataset=dataset.info,
        licence=licences.read(backbone), where=found.name,
    )  # fmt: skip
    measured: dict[str, Any] = {key: result[key] for key in ("data", "split")}
    kept = ("task", "main", "n", "metrics", "slices")
    for name, block in evaluation.blocks(result).items():
        part = {key: block[key] for key in kept}
        measured |= part if name == result["task"] else {}
        measured.setdefault("tasks", {})[name] = part
    bundles.add(found.path, {"metrics.json": json.dumps(measured, indent=1) + "\n", "README.md": words})


def _checked(dataset: Dataset) -> list[report.Section]:
    """What the last check of the data set warned of, where there was one."""
    found = diagnosis.read(dataset)
    if found is None:
        return []
    lines = found["warnings"] or ["nothing that would matter"]
    words = f"What jobs.prepare --check found in {dataset.name}:"
    return [("data", "Data", panel(tag("p", words), tag("ul", [tag("li", line) for line in lines])))]


def read_curves(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; none where there is no such file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def first_slice(table: pa.Table, slices: Sequence[str]) -> str | None:
    """The first slice column that divides the rows: examples and the probe's questions are drawn from each value."""
    for name in slices:
        if 1 < pc.count_distinct(table[predictions.slice_column(name)]).as_py() <= predictions.MAX_SLICES:
            return name
    return None


def _examples(
    table: pa.Table,
    dataset: Dataset,
    split: str,
    found: Bundle,
    matched: Mapping[str, str],
    column: str | None,
    seed: int,
) -> dict[str, list[Example]]:
    tasks = make_all(found.tasks)
    asked = table.filter(pc.equal(table["without"], ""))
    chosen: dict[str, str] = {}
    for name in tasks:
        chosen |= examples.choose(asked.filter(pc.equal(asked["task"], name)), column, seed=seed)
    picked = asked.filter(pc.is_in(asked["id"], value_set=pa.array(list(chosen), pa.string())))
    answers = {row["id"]: row for row in picked.to_pylist()}
    out: dict[str, list[Example]] = {name: [] for name in tasks}
    for each in baselines.pick(dataset, split, list(chosen)):
        record = replace(each, task=matched.get(each.task, each.task))
        example = examples.shown(record, answers[record.id], tasks[record.task], chosen[record.id])
        out[record.task].append(example)
    return {name: sorted(shown, key=lambda each: (each.group, each.record.id)) for name, shown in out.items()}
