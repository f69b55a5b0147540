"""What a search costs and finds: ours, beside random search with full runs and beside the textbook's set-up.

    make bench-search           (python -m tests.bench.search [--only ours|textbook] [--trials 16])

SCALE=small for a short one. What an earlier start of it has finished is taken as it is: remove ``search/bench_*`` below
the storage root to measure anew.

A fixed part of easy-VQA, on which a full run takes a minute or more of steps: learning rate, dropout and freezing.

- ours: `jobs.search` with ASHA; `search.startup_s`: what a further trial takes from its start to its first step.
- full: the same samples, none stopped. `search.vs_one_run` is the time of ours to that of one of these, from the first
  step of the first trial; `search.points_behind_best` how far our winner is behind the best of all full runs.
- textbook: the same samples and stops under Tune over a TorchTrainer for each trial (`tests.bench.textbook`).

`search.leaked` counts actors and placement groups that are left when ours has ended.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs import cluster, prepare
from jobs import search as searches
from mmagent import config as configs
from mmagent import storage
from mmagent.arguments import Parser, positive
from mmagent.measurement import Row, publish, table
from tests.bench import rays

RECIPE = cluster.CHECKOUT / "jobs/recipes/easy_vqa.yaml"
SMALL = os.environ.get("SCALE") == "small"
PARTS = ("ours", "textbook")
DATA = "easy_vqa"
SPACE: dict[str, Any] = {
    "set": {
        "data.share": 0.02 if SMALL else 0.1,
        "train.max_steps": 32 if SMALL else 224,
        "train.epochs": 20,
        "train.eval_rows": 128 if SMALL else 1024,
        "train.eval_every_steps": 16 if SMALL else 112,
        "train.patience": 0,
    },
    "space": {
        "optim.lr": {"loguniform": [3.0e-4, 5.0e-3]},
        "model.dropout": {"uniform": [0.0, 0.3]},
        "freeze.strategy": {
            "choice": ["connector", "all", {"top": {"integer": [1, 3]}}, {"lora": {"choice": [4, 8]}}],
        },
    },
}


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.search", __doc__)
    parser.add_argument(
        "--only", choices=PARTS, help="ours, with full runs; or the textbook's, beside the last of ours"
    )
    parser.add_argument("--trials", type=positive, default=4 if SMALL else 16)
    args = parser.parse_args(argv)
    with rays.borrowed():
        if prepare.main(["--source", "easy_vqa", "--name", DATA]):
            return 2
        rows = []
        if args.only != "textbook":
            rows += _ours(args.trials)
        if args.only != "ours":
            rows += _textbook(args.trials)
        publish("search", rows, checkout, keep=True)
    print(table(rows))
    return 0


def _ours(trials: int) -> list[Row]:
    before = rays.living()
    quick = _search("bench_search", trials, scheduler="asha", seeds=3)
    left = rays.living() - before
    full = _search("bench_full", trials, scheduler="none", seeds=1)
    one_s = _spent_s([full[0]])
    startups = [trial["reports"][0]["metrics"]["startup_s"] for trial in quick if trial["reports"]]
    best = max(trial["quality"] for trial in full if trial["quality"] is not None)
    winner = json.loads((storage.folder("search", "bench_search") / "winner.json").read_text())
    own = winner["own"]
    spread = (
        "" if own["deviation"] is None else f"; the recipe's own deviate by {100 * own['deviation']:.2f} over seeds"
    )
    return [
        Row("search.one_run_s", one_s, "s", "steps and validations of one full run, without its start"),
        Row("search.vs_one_run", _spent_s(quick) / one_s, "ratio", f"{trials} trials to one full run", "<= 4"),
        Row("search.startup_s", statistics.median(startups[1:]), "s",
            f"from a further trial's start to its first step; the first {startups[0]:.0f} s, the slowest of the others "
            f"{max(startups[1:]):.1f}", "<= 3"),
        Row("search.points_behind_best", 100 * (best - winner["score"]), "points",
            f"of validation accuracy, our winner to the best of {trials} full runs ({100 * best:.2f} %){spread}",
            "<= 0.5"),
        Row("search.vs_full", _spent_s(full) / _spent_s(quick), "ratio", "time of full runs of all to ours"),
        Row("search.leaked", float(len(left)), "count", "actors and placement groups left", "<= 0"),
    ]  # fmt: skip


def _textbook(trials: int) -> list[Row]:
    from tests.bench import textbook

    quick = json.loads((storage.folder("search", "bench_search") / "trials.json").read_text())
    base = configs.load(RECIPE, [f"data.name={DATA}"])
    base = configs.override(base, SPACE["set"])
    took = _whole_s(quick)
    stages = _stages()
    cluster.connect()
    samples = [trial["sample"] for trial in quick[:trials]]
    theirs = textbook.search(base, samples, stages, storage.root() / "bench" / "textbook", 1)
    return [Row("search.vs_textbook", theirs / took, "ratio", f"wall time of the textbook's {theirs:.0f} s to ours")]


def _stages() -> Any:
    from jobs.trials import Stages

    steps = float(SPACE["set"]["train.max_steps"])
    return Stages("steps", steps / 16, steps, 4)


def _search(name: str, trials: int, **changed: Any) -> list[dict[str, Any]]:
    folder = storage.folder("search", name)
    if (folder / "winner.json").is_file():  # of an earlier start of this measurement
        earlier: list[dict[str, Any]] = json.loads((folder / "trials.json").read_text())
        return earlier
    file = storage.root() / "bench" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    space = {**SPACE, "trials": trials, "concurrent": 1, **changed}
    file.write_text(yaml.safe_dump(space))
    began = time.monotonic()
    if searches.main(["--config", str(RECIPE), "--space", str(file), "--name", name, f"data.name={DATA}"]):
        raise SystemExit(2)
    print(f"{name}: {time.monotonic() - began:.0f} s in all")
    found: list[dict[str, Any]] = json.loads((folder / "trials.json").read_text())
    return found


def _spent_s(trials: Sequence[Mapping[str, Any]]) -> float:
    """From the first step of the first trial to the last report of all."""
    first = trials[0]["reports"][0]
    began = first["time_s"] - first["metrics"]["seconds"] + first["metrics"]["startup_s"]
    return float(max(each["time_s"] for trial in trials for each in trial["reports"]) - began)


def _whole_s(trials: Sequence[Mapping[str, Any]]) -> float:
    """The same with the first start."""
    return _spent_s(trials) + float(trials[0]["reports"][0]["metrics"]["startup_s"])


if __name__ == "__main__":
    sys.exit(main())
