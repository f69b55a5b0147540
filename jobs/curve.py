"""A learning curve: a run for each number of labels and each seed, and what they reach.

    python -m jobs.train --config RECIPE --name NAME "data.labels_per_class=[5,10,50]" train.seeds=3

runs/NAME/{config.yaml, curve.json, evaluation.json, report.html, bundle/, points/nN_seedS/ (a run folder each)}

A run draws its rows by its own seed (`jobs.draw`), and is asked the test split; where there is none, or --no-evaluate
is given, its best score on validation counts. Runs that are done are not made again: the same command goes on where it
stopped, also with more numbers or seeds. The bundle is that of the largest number's first seed; the others' are not
kept. ``curve.json``: {"data", "split", "points": [...], "tasks": {TASK: {"metric", "points": [{"labels_per_class",
"rows", "mean", "deviation", "values"}]}}, "bundle": {"run", "labels_per_class", "seed"}}.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from jobs import run, watch
from jobs.draw import TRAIN
from jobs.page import read_curves, write_report
from mmagent import bundle as bundles
from mmagent import config as configs
from mmagent import few_labels, storage
from mmagent.config import Config
from mmagent.evaluation import blocks
from mmagent.shards import Dataset
from mmagent.tasks import make

_POINT_FILE = "point.json"  # of a run that is done
_NOT_KEPT = ("bundle", "checkpoints", "drawn", "ray")


def complete(config: Config, folder: Path, *, test: bool = True) -> bool:
    """Runs what is not done yet, then writes the curve; whether it came to its end.

    Raises:
        RunError: the name belongs to a run, or to a curve of another config; and see `jobs.watch.complete`.
    """
    numbers, seeds = _asked(config)
    _hold(config, folder)
    runs = [(labels, seed) for labels in numbers for seed in seeds]
    kept = (numbers[-1], seeds[0])
    points: list[dict[str, Any]] = []
    for index, (labels, seed) in enumerate(runs, 1):
        place = folder / "points" / f"n{labels}_seed{seed}"
        print(f"\n[{index} of {len(runs)}] {labels} labels of each class, seed {seed}", flush=True)
        if not _done(place, folder if (labels, seed) == kept else None):
            own = {"data.labels_per_class": labels, "seed": seed, "train.seeds": 1}
            if not watch.complete(configs.override(config, own), place, name=folder.name, test=test):
                return False
            _finish(place, labels, seed, folder if (labels, seed) == kept else None)
        points.append(json.loads((place / _POINT_FILE).read_text()))
        _publish(folder, config, points)
    print(f"\n{few_labels.text(few_labels.curve(points))}")
    if any(point["split"] != points[0]["split"] for point in points):
        print("note: some of these values are of the validation split: those runs were not asked the test split")
    _report(folder, folder / "points" / f"n{kept[0]}_seed{kept[1]}", points, seed=config.seed)
    print(f"bundle  {folder / 'bundle'}: of {kept[0]} labels of each class, seed {kept[1]}; the others are not kept")
    return True


def _asked(config: Config) -> tuple[list[int], list[int]]:
    wanted = config.data.labels_per_class
    assert isinstance(wanted, tuple)
    return sorted(set(wanted)), list(range(config.seed, config.seed + config.train.seeds))


def _hold(config: Config, folder: Path) -> None:
    """Ties the name to the config; the numbers and how many seeds may change."""
    file = folder / run.CONFIG_FILE
    if (folder / "checkpoints").exists():
        raise run.RunError(f"{folder.name!r} is a run, not a learning curve: give another --name")
    if file.exists() and (folder / "points").exists():
        free = {"data.labels_per_class": None, "train.seeds": 1}
        before = configs.override(configs.resolve(yaml.safe_load(file.read_text()), {}), free)
        changed = run.differences(before, configs.override(config, {**free, "track": before.track.model_dump()}))
        if changed:
            raise run.RunError(
                f"the learning curve {folder.name!r} began with another config ({', '.join(changed)}): give another "
                "--name, or the same config to go on"
            )
    storage.publish(file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _done(place: Path, home: Path | None) -> bool:
    """Whether a run is done; `home`: the curve's folder, where its bundle must be this run's."""
    if not (place / _POINT_FILE).exists():
        return False
    if home is None or _bundled(home) == place.name:
        return True
    for file in (_POINT_FILE, "evaluation.json"):  # the bundle of another run is kept: this one's is made again
        (place / file).unlink(missing_ok=True)
    return False


def _bundled(folder: Path) -> str | None:
    """The run that a curve's bundle is of."""
    manifest = folder / "bundle" / bundles.MANIFEST
    return str(json.loads(manifest.read_text())["run"]) if manifest.is_file() else None


def _finish(place: Path, labels: int, seed: int, home: Path | None) -> None:
    """Notes what a run reached, and clears away what nobody reads again; its bundle goes to `home`, where given."""
    dataset = Dataset.open(place / "drawn")
    point = {"labels_per_class": labels, "seed": seed, "rows": dataset.rows(TRAIN), **_reached(place)}
    if home is not None:
        shutil.rmtree(home / "bundle", ignore_errors=True)
        os.replace(place / "bundle", home / "bundle")
    storage.publish_json(place / _POINT_FILE, point)
    if home is None:
        for name in _NOT_KEPT:
            shutil.rmtree(place / name, ignore_errors=True)


def _reached(place: Path) -> dict[str, Any]:
    file = place / "evaluation.json"
    if file.exists():
        result = json.loads(file.read_text())
        found = {
            task: {"metric": block["main"], "value": block["metrics"][block["main"]]["value"]}
            for task, block in blocks(result).items()
        }
        return {"split": result["split"], "tasks": found}
    bundle = bundles.load(place / "bundle")
    metric = make(bundle.tasks[bundle.task]).score if len(bundle.tasks) == 1 else "score"
    value = bundle.manifest["checkpoint"]["score"]
    return {"split": "validation", "tasks": {bundle.task: {"metric": metric, "value": value}}}


def _publish(folder: Path, config: Config, points: Sequence[dict[str, Any]]) -> None:
    run_name = _bundled(folder)
    of = next((point for point in points if run_name == f"n{point['labels_per_class']}_seed{point['seed']}"), None)
    bundle = of and {"run": run_name, "labels_per_class": of["labels_per_class"], "seed": of["seed"]}
    curves = few_labels.curve(points)
    result = {
        "data": config.data.name,
        "split": points[0]["split"],
        "points": points,
        "tasks": curves,
        "bundle": bundle,
    }
    storage.publish_json(folder / "curve.json", result)


def _report(folder: Path, place: Path, points: Sequence[dict[str, Any]], *, seed: int) -> None:
    """The evaluation of the kept run as the curve's own, with the curve in its report."""
    file = place / "evaluation.json"
    if not file.exists():
        return
    result = json.loads(file.read_text())
    part = few_labels.section(few_labels.curve(points), points[0]["split"])
    storage.publish_json(folder / "evaluation.json", result)
    found, table = bundles.load(folder / "bundle"), pq.read_table(place / "predictions.parquet")
    write_report(
        result, found, Dataset.open(place / "drawn"), table, folder, seed=seed,
        curves=read_curves(place / "metrics.jsonl"), more=[("few-labels", "Few labels", part)],
    )  # fmt: skip
    print(f"report  {folder / 'report.html'}")
