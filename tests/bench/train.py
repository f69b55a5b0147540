"""What distribution costs: samples a second of the ZeRO workers against plain PyTorch, in turn, in one run.

    make bench-train            (python -m tests.bench.train [key.path=value ...]; SCALE=small for a short one)

Ours is what `jobs.train` runs: shards through Ray Data into two ZeRO workers of one thread each under Ray Train. Plain
is one process of two threads with the same module, batch function, precision, cache and global batch, fed from rows
that are in memory before its clock starts. Both sides' first steps, while caches fill, do not count. Medians of the
rounds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from jobs import cluster
from mmagent import config as configs
from mmagent import measurement, storage
from mmagent.config import Config
from mmagent.measurement import Row

RECIPE = Path("jobs/recipes/easy_vqa.yaml")
SMALL = os.environ.get("SCALE") == "small"
ROUNDS, STEPS, WARM_STEPS = (1, 12, 4) if SMALL else (3, 100, 30)


def main() -> int:
    overrides = sys.argv[1:]
    config = configs.load(
        RECIPE, [f"train.max_steps={STEPS}", f"train.eval_every_steps={STEPS}", "train.eval_rows=64", *overrides]
    )
    found, new = cluster.ensure(cluster.record())
    ours, plain, waits = [], [], []
    try:
        for index in range(ROUNDS):
            rate, wait = _ours(overrides)
            ours.append(rate)
            waits.append(wait)
            plain.append(_in_own_process(overrides))
            print(f"round {index + 1}: ours {ours[-1]:.0f}, plain {plain[-1]:.0f} samples/s", flush=True)
    finally:
        if new:
            cluster.stop(found)
            cluster.record().unlink(missing_ok=True)
    what = f"{config.cluster.workers} workers, global batch {config.global_batch}"
    ratio = statistics.median(ours) / statistics.median(plain)
    rows = [
        Row("train.vs_plain", ratio, "ratio", f"samples/s of {what}, to plain PyTorch", ">= 0.9"),
        Row("train.samples_per_s", statistics.median(ours), "samples/s", what),
        Row("train.plain_samples_per_s", statistics.median(plain), "samples/s", "plain PyTorch, one process"),
        Row("train.wait_share", statistics.median(waits), "share", "of step time spent waiting for data", "<= 0.03"),
    ]
    measurement.publish("train", rows, cluster.CHECKOUT)
    print(measurement.table(rows))
    return 0


def _ours(overrides: list[str]) -> tuple[float, float]:
    """Samples a second, and the share of waiting, of `jobs.train` after its first steps."""
    name = "bench_train"
    folder = storage.folder("runs", name)
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"train.max_steps={STEPS}", f"train.eval_every_steps={STEPS}", "train.eval_rows=64", *overrides]
    command = [sys.executable, "-m", "jobs.train", "--config", str(RECIPE), "--name", name, "--no-evaluate", *settings]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counted = [row for row in rows if row["kind"] == "train" and row["step"] - row["steps"] >= WARM_STEPS]
    seconds = sum(row["samples"] / row["samples_per_s"] for row in counted)
    wait = sum(row["wait_share"] * row["samples"] / row["samples_per_s"] for row in counted) / seconds
    shutil.rmtree(folder)
    return sum(row["samples"] for row in counted) / seconds, wait


def _in_own_process(overrides: list[str]) -> float:
    """`plain` in a process of its own: threads and caches start afresh, as the workers' do."""
    run = subprocess.run(
        [sys.executable, "-c", f"from tests.bench import train; print(train.plain({overrides!r}))"],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"the plain side failed:\n{run.stderr}")
    return float(run.stdout.splitlines()[-1])


def plain(overrides: list[str]) -> float:
    """Samples a second of plain PyTorch."""
    from jobs import loop, stream, supervised
    from jobs.engine import TorchEngine
    from jobs.meter import Meter
    from mmagent import freeze, text
    from mmagent.batch import Inputs
    from mmagent.order import Position
    from mmagent.shards import Dataset
    from mmagent.tasks import make_all
    from mmagent.text import FrozenStates

    torch.set_num_threads(2)
    config = _plain_config(configs.load(RECIPE, overrides))
    dataset = Dataset.open(storage.folder("data", config.data.name))
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    tasks = make_all(dataset.tasks)
    model = supervised.build(config, tasks, encoder)
    engine = TorchEngine(model, freeze.groups(model, config), config)
    frozen = FrozenStates(encoder, device=engine.device) if model.backbone is None else None
    batches = supervised.Batches(Inputs(config.model, config.data, tokenizer, tasks), frozen, config, {}, engine.device)
    order = stream.order_of(dataset, "train", seed=config.seed, window_rows=config.data.window_rows)
    tables = list(stream.tables(order, stream.layout_of(config, 1), Position(), STEPS))
    feed, meter = loop.Feed(batches.steps, iter(tables)), Meter()
    started = 0.0
    for step in range(STEPS):
        if step == WARM_STEPS:
            started = time.perf_counter()
        micros = feed.next(meter)[1].micros
        engine.set_lr(1.0)
        for batch in micros:
            engine.backward(supervised.loss_of(engine.forward(batch), batch, tasks, config))
            engine.step()
    return (STEPS - WARM_STEPS) * config.global_batch / (time.perf_counter() - started)


def _plain_config(config: Config) -> Config:
    """One process, the same global batch in one pass."""
    return configs.override(
        config,
        {
            "cluster.workers": 1,
            "train.micro_batch": config.global_batch,
            "train.accumulation": 1,
            "zero.engine": "torch",
        },
    )


if __name__ == "__main__":
    sys.exit(main())
