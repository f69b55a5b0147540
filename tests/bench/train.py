"""How fast training is: samples a second of the ZeRO workers against plain PyTorch, and the Transformers Trainer.

    make bench-train            (python -m tests.bench.train [--only packing|cache|others] [key.path=value ...])

SCALE=small for a short one.

The work: a frozen MiniLM reads texts, two fusion layers and a head learn to classify them. Ours is what `jobs.train`
runs: shards through Ray Data into two ZeRO workers of one thread each under Ray Train. The others are one process of
two threads with the same module, precision and global batch, fed from rows in memory.

- `vs_plain`, `vs_trainer`: all texts are of one length, so that nothing is packed, and no states are kept.
- `vs_trainer_full`: texts of 10 to 200 tokens, four passes, everything from the first step on; ours packs texts and
  keeps the frozen model's states, the Trainer pads each batch to its longest.
- `bucket_speedup`: see `tests.bench.packing`.
- `cache_speedup`: see `tests.bench.kept`.

Sides take turns; medians of the rounds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jobs import cluster
from mmagent import config as configs
from mmagent import storage
from mmagent.arguments import Parser
from mmagent.config import Config
from mmagent.measurement import Row, publish, table
from tests.bench import kept, rays, texts, transformers_trainer
from tests.bench.texts import LONGEST, SHORTEST

RECIPE = cluster.CHECKOUT / "jobs/recipes/small.yaml"
SMALL = os.environ.get("SCALE") == "small"
ROUNDS = 1 if SMALL else 3
PARTS = ("packing", "cache", "others")
SETTINGS = (
    f"data.max_text_tokens={LONGEST}", f"model.backbone={texts.BACKBONE}", "model.join=output", "model.image=null",
    "model.audio=null", "freeze.strategy=connector", "train.min_steps=0", "train.patience=0", "train.eval_rows=64",
    "train.micro_batch=32", "cluster.workers=2", "cluster.threads=1", "zero.stage=1",
)  # fmt: skip


class Work(NamedTuple):
    """What all sides do."""

    name: str
    rows: int
    shortest: int
    longest: int
    steps: int
    warm_steps: int  # that do not count
    keeps: bool  # whether our side keeps states

    @property
    def data(self) -> str:
        return f"{self.name}_{self.rows}"

    def settings(self, overrides: Sequence[str]) -> list[str]:
        own = [f"data.name={self.data}", f"train.max_steps={self.steps}", f"train.eval_every_steps={self.steps}"]
        return [*SETTINGS, *own, "train.epochs=100", f"train.cache={'memory' if self.keeps else 'none'}", *overrides]


EVEN = Work("bench_even", 128 if SMALL else 512, 96, 96, 8 if SMALL else 60, 2 if SMALL else 10, keeps=False)
VARIED = Work("bench_varied", 128 if SMALL else 1024, SHORTEST, LONGEST, 4 if SMALL else 64, 0, keeps=True)


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.train", __doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the recipe, on all sides")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for part in args.only or PARTS:
        if part == "packing":
            rows += _packing()
        else:
            with rays.borrowed():
                rows += kept.rows(_trained) if part == "cache" else _others(args.overrides)
        publish("train", rows, checkout, keep=True)
    print(table(rows))
    return 0


def _packing() -> list[Row]:
    found = [json.loads(_in_own_process("packing", "json.dumps(packing.measure())")) for _ in range(ROUNDS)]
    middle = {kind: statistics.median(each[kind] for each in found) for kind in found[0]}
    what = f"samples/s of texts of {SHORTEST} to {LONGEST} tokens, packed, to padding all to {LONGEST}"
    return [
        Row("train.bucket_speedup", min(middle.values()), "ratio", f"{what}: the smaller of the two", ">= 1.8"),
        *(Row(f"train.bucket_speedup.{kind}", value, "ratio", what) for kind, value in middle.items()),
    ]


def _others(overrides: Sequence[str]) -> list[Row]:
    for work in (EVEN, VARIED):
        texts.written(work.data, work.rows, shortest=work.shortest, longest=work.longest)
    sides: dict[str, list[float]] = {name: [] for name in ("ours", "plain", "trainer", "full", "trainer_full")}
    waits = []
    for index in range(ROUNDS):
        rate, wait = _ours(EVEN, overrides)
        waits.append(wait)
        sides["ours"].append(rate)
        sides["plain"].append(float(_in_own_process("train", f"train.plain({list(overrides)!r})")))
        sides["trainer"].append(float(_in_own_process("train", f"train.theirs('EVEN', {list(overrides)!r})")))
        sides["full"].append(_ours(VARIED, overrides)[0])
        sides["trainer_full"].append(float(_in_own_process("train", f"train.theirs('VARIED', {list(overrides)!r})")))
        said = ", ".join(f"{name} {rates[-1]:.0f}" for name, rates in sides.items())
        print(f"round {index + 1}, samples/s: {said}", flush=True)
    middle = {name: statistics.median(rates) for name, rates in sides.items()}
    what = "2 workers, global batch 64, texts of one length, no states kept"
    full = f"2 workers, texts of {SHORTEST} to {LONGEST} tokens packed, states of the frozen model kept"
    ratio = middle["full"] / middle["trainer_full"]
    return [
        Row("train.vs_plain", middle["ours"] / middle["plain"], "ratio", f"{what}; to plain PyTorch", ">= 1.0"),
        Row("train.vs_trainer", middle["ours"] / middle["trainer"], "ratio", f"{what}; to the Trainer", ">= 1.0"),
        Row("train.vs_trainer_full", ratio, "ratio", f"{full}; to the Trainer", ">= 2.0"),
        Row("train.samples_per_s", middle["ours"], "samples/s", what),
        Row("train.plain_samples_per_s", middle["plain"], "samples/s", "plain PyTorch, one process"),
        Row("train.trainer_samples_per_s", middle["trainer"], "samples/s", "Transformers Trainer, one process"),
        Row("train.wait_share", statistics.median(waits), "share", "of step time spent waiting for data", "<= 0.03"),
    ]


def _ours(work: Work, overrides: Sequence[str]) -> tuple[float, float]:
    """Samples a second of `jobs.train`, and the share of waiting, after the first steps."""
    rows, _ = _run(RECIPE, work.settings(overrides), work.name)
    return _rate(rows, work.warm_steps)


def _trained(settings: Sequence[str], name: str, warm_steps: int) -> tuple[float, str]:
    """Samples a second of `jobs.train` on the demo's recipe, and what it said."""
    rows, said = _run(kept.RECIPE, settings, name)
    return _rate(rows, warm_steps)[0], said


def _run(recipe: Path, settings: Sequence[str], name: str) -> tuple[list[dict[str, Any]], str]:
    """What a run measured, and what it said; nothing of it is left."""
    folder = storage.folder("runs", name)
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "jobs.train", "--config", str(recipe), "--name", name, "--no-evaluate", *settings]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return rows, run.stdout + run.stderr


def _rate(rows: Sequence[dict[str, Any]], warm_steps: int) -> tuple[float, float]:
    """Samples a second, and the share of waiting, after the first steps."""
    counted = [row for row in rows if row["kind"] == "train" and row["step"] - row["steps"] >= warm_steps]
    counted = counted or [row for row in rows if row["kind"] == "train"]  # a short run logs once
    seconds = sum(row["samples"] / row["samples_per_s"] for row in counted)
    wait = sum(row["wait_share"] * row["samples"] / row["samples_per_s"] for row in counted) / seconds
    return sum(row["samples"] for row in counted) / seconds, wait


def _in_own_process(module: str, expression: str) -> str:
    """What an expression says in a process of its own: threads and caches start afresh, as the workers' do."""
    program = f"import json; from tests.bench import {module}; print({expression})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=cluster.CHECKOUT, check=False
    )
    if run.returncode:
        raise RuntimeError(f"{expression} failed:\n{run.stderr}")
    return run.stdout.splitlines()[-1]


def theirs(work: str, overrides: Sequence[str]) -> float:
    """Samples a second of the Trainer, on the work of this name."""
    given: Work = globals()[work]
    return transformers_trainer.measure(_plain_config(given, overrides), given.steps, given.warm_steps)


def plain(overrides: Sequence[str]) -> float:
    """Samples a second of plain PyTorch."""
    from jobs import engine as engines
    from jobs import loop, stream, supervised
    from jobs.engine import TorchEngine
    from jobs.meter import Meter
    from mmagent import freeze, text
    from mmagent.batch import Inputs
    from mmagent.order import Position
    from mmagent.shards import Dataset
    from mmagent.tasks import make_all

    torch.set_num_threads(2)
    config = _plain_config(EVEN, overrides)
    dataset = Dataset.open(storage.folder("data", config.data.name))
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    tasks = make_all(dataset.tasks)
    model = supervised.build(config, tasks, encoder)
    engine = TorchEngine(model, freeze.groups(model, config), config)
    batches = supervised.Batches(Inputs(config.model, config.data, tokenizer, tasks), None, config, {}, engine.device)
    order = stream.order_of(dataset, "train", seed=config.seed, window_rows=config.data.window_rows)
    tables = list(stream.tables(order, stream.layout_of(config, 1), Position(), EVEN.steps))
    feed, meter = loop.Feed(batches.steps, iter(tables)), Meter()
    started = 0.0
    for step in range(EVEN.steps):
        if step == EVEN.warm_steps:
            started = time.perf_counter()
        micros = feed.next(meter)[1].micros
        engine.set_lr(1.0)
        for micro in micros:
            batch = engines.moved(micro, engine.device)
            engine.backward(supervised.loss_of(engine.forward(batch), batch, tasks, config))
            engine.step()
    seconds = time.perf_counter() - started
    feed.close()
    return (EVEN.steps - EVEN.warm_steps) * config.global_batch / seconds


def _plain_config(work: Work, overrides: Sequence[str]) -> Config:
    """One process, the same global batch in one pass; no states kept."""
    config = configs.load(RECIPE, work.settings(overrides))
    return configs.override(
        config,
        {
            "cluster.workers": 1,
            "train.micro_batch": config.global_batch,
            "train.accumulation": 1,
            "train.cache": "none",
            "zero.engine": "torch",
        },
    )


if __name__ == "__main__":
    sys.exit(main())
