"""What a search costs and finds: ours, beside random search with full runs and beside the textbook's set-up.

    make bench-search           (python -m tests.bench.search [--only ours|textbook] [--trials 16])

SCALE=small for a short one. What an earlier start of it has finished is taken as it is: remove ``search/bench_*`` below
the storage root to measure anew.

The data: easy-VQA's written questions for what a picture shows, which a run of a minute or so learns. Searched
over: learning rate, dropout and freezing. A trial's time is its steps, validations and checkpoints, without its start.

- ours: `jobs.search` as it is by default; `search.startup_s`: from a further trial's start to its first step.
- full: the same samples, none stopped. `search.vs_one_run` is the time of our trials to the mean of these (they differ,
  by what is frozen); `search.points_behind_best` how far our winner is behind the best of them all.
- textbook: the same samples, each for as many steps as ours gave it, under Tune over a TorchTrainer for each trial
  (`tests.bench.textbook`); `search.vs_textbook` is its wall time to ours, starts and all.

`search.leaked` counts actors and placement groups that are left when ours has ended; `search.memory_growth` is the most
memory that the search and its cluster had (each shared page once) to the most until a quarter of its trials had ended.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
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
DATA = "bench_shown"
ROWS = {"train": 192, "validation": 128, "test": 64} if SMALL else {"train": 5120, "validation": 1024, "test": 512}
SETTINGS = (f"data.name={DATA}", "model.audio=null")
SPACE: dict[str, Any] = {
    "set": {
        "train.max_steps": 32 if SMALL else 160,
        "train.epochs": 20,
        "train.eval_rows": ROWS["validation"],
        "train.eval_every_steps": 16 if SMALL else 80,
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
        _prepared()
        rows = []
        if args.only != "textbook":
            rows += _ours(args.trials)
        if args.only != "ours":
            rows += _textbook(args.trials)
        publish("search", rows, checkout, keep=True)
    print(table(rows))
    return 0


def _prepared() -> None:
    """The data set, by `jobs.prepare`."""
    import easy_vqa

    if (storage.folder("data", DATA) / "dataset.json").exists():
        return
    rows: list[dict[str, Any]] = []
    for part, (asked, answers, shown), images in (
        ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    ):
        shows = [n for n, answer in enumerate(answers) if answer not in ("yes", "no")]
        splits = [split for split in ROWS for _ in range(ROWS[split]) if (split == "test") == (part == "test")]
        for split, index in zip(splits, random.Random(0).sample(shows, len(splits)), strict=True):
            row = {"text": asked[index], "label": answers[index], "image": str(images[shown[index]]), "split": split}
            rows.append(row)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if prepare.main(["--source", f"jsonl:{file}", "--name", DATA]):
            raise SystemExit(2)


def _ours(trials: int) -> list[Row]:
    before = rays.living()
    file = storage.root() / "bench" / "bench_search_memory.json"  # beside what an earlier start has finished
    with rays.memory() as memory:
        quick = _search("bench_search", trials)
    if memory and memory[0][0] < max(trial["reports"][-1]["time_s"] for trial in quick if trial["reports"]):
        file.write_text(json.dumps(memory))
    left = rays.living() - before
    early, most = _peaks(json.loads(file.read_text()) if file.exists() else [], quick)
    full = _search("bench_full", trials, scheduler="none", seeds=1)
    one_s, own_s = statistics.mean(trial["seconds"] for trial in full), full[0]["seconds"]
    spent_s = sum(trial["seconds"] for trial in quick)
    startups = [trial["reports"][0]["metrics"]["startup_s"] for trial in quick if trial["reports"]]
    best = max(trial["quality"] for trial in full if trial["quality"] is not None)
    winner = json.loads((storage.folder("search", "bench_search") / "winner.json").read_text())
    own = winner["own"]
    spread = (
        "" if own["deviation"] is None else f"; the recipe's own deviate by {100 * own['deviation']:.2f} over seeds"
    )
    rows = [
        Row("search.one_run_s", one_s, "s",
            f"steps, validations and checkpoints of a full run, the mean of {trials}; the recipe's own {own_s:.0f} s"),
        Row("search.vs_one_run", spent_s / one_s, "ratio",
            f"{trials} trials to one full run; to one of the recipe's own, which freezes most, {spent_s / own_s:.1f}",
            "<= 4"),
        Row("search.startup_s", statistics.median(startups[1:]), "s",
            f"from a further trial's start to its first step; the first {startups[0]:.0f} s, the slowest of the others "
            f"{max(startups[1:]):.1f}", "<= 3"),
        Row("search.points_behind_best", 100 * (best - winner["score"]), "points",
            f"of validation accuracy, our winner to the best of {trials} full runs ({100 * best:.2f} %){spread}",
            "<= 0.5"),
        Row("search.vs_full", trials * one_s / spent_s, "ratio", "time of full runs of all to ours"),
        Row("search.leaked", float(len(left)), "count", "actors and placement groups left", "<= 0"),
    ]  # fmt: skip
    if early:
        what = (
            f"memory of all {trials} trials' time, Ray's own with it, {most / 2**30:.2f} GiB, to that until the first "
        )
        rows.append(
            Row("search.memory_growth", most / early, "ratio", f"{what}{max(1, trials // 4)} had ended", "<= 1.25")
        )
    return rows


def _textbook(trials: int) -> list[Row]:
    cluster.connect()
    from tests.bench import textbook  # brings Ray, which reads its environment when it is imported

    quick = json.loads((storage.folder("search", "bench_search") / "trials.json").read_text())[:trials]
    base = configs.override(configs.load(RECIPE, SETTINGS), SPACE["set"])
    theirs = textbook.search(
        base, [(trial["sample"], trial["step"]) for trial in quick], storage.root() / "bench" / "textbook", 1
    )
    what = f"wall time of the textbook's to ours, the same steps of each trial: {theirs:.0f} s to {_wall_s(quick):.0f}"
    return [Row("search.vs_textbook", theirs / _wall_s(quick), "ratio", what)]


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
    if searches.main(["--config", str(RECIPE), "--space", str(file), "--name", name, *SETTINGS]):
        raise SystemExit(2)
    print(f"{name}: {time.monotonic() - began:.0f} s in all")
    found: list[dict[str, Any]] = json.loads((folder / "trials.json").read_text())
    return found


def _peaks(memory: Sequence[tuple[float, int]], trials: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The most bytes until a quarter of the trials had ended, 0 where nobody looked then, and of all the time."""
    ends = sorted(trial["reports"][-1]["time_s"] for trial in trials if trial["reports"])
    quarter = ends[max(1, len(trials) // 4) - 1]
    return max((size for at, size in memory if at <= quarter), default=0), max((size for _, size in memory), default=0)


def _wall_s(trials: Sequence[Mapping[str, Any]]) -> float:
    """From the start of the first trial to the last report of all."""
    first = trials[0]["reports"][0]
    began = first["time_s"] - first["metrics"]["seconds"] - first["metrics"]["startup_s"]
    return float(max(each["time_s"] for trial in trials for each in trial["reports"]) - began)


if __name__ == "__main__":
    sys.exit(main())
