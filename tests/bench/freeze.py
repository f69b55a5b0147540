"""What each way of freezing costs: samples a second, peak memory and the share of weights that learn.

    make bench-freeze           (python -m tests.bench.freeze [key.path=value ...]; SCALE=small for a short one)

Each strategy trains the demo's recipe in a process of its own, with plain PyTorch and the loop's batches, and once more
with one ZeRO worker of the recipe's stage; strategies take turns, medians of the rounds. A process's first steps, while
caches fill, do not count for its speed. Peak memory is the process's resident set, weights, data and Python included:
what a machine must have.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch

from jobs import cluster, demo, prepare
from mmagent import config as configs
from mmagent import measurement, storage
from mmagent.config import Config
from mmagent.frozen import FrozenStates
from mmagent.measurement import Row
from mmagent.shards import INFO_FILE, Dataset

RECIPE = Path("jobs/recipes/easy_vqa.yaml")
SMALL = os.environ.get("SCALE") == "small"
ROUNDS, STEPS, WARM_STEPS = (1, 4, 1) if SMALL else (3, 16, 4)
STRATEGIES = (
    "head", "connector", "image_tower", "audio_tower", "bias", "lora:8", "top:2", "towers", "gradual", "all",
)  # fmt: skip


def main(
    overrides: list[str],
    recipe: Path = RECIPE,
    strategies: tuple[str, ...] = STRATEGIES,
    checkout: Path = cluster.CHECKOUT,
) -> int:
    _prepare(configs.load(recipe, overrides))
    found: dict[str, list[dict[str, float]]] = {strategy: [] for strategy in strategies}
    for index in range(ROUNDS):
        for strategy in strategies:
            plain = _in_own_process(recipe, [*overrides, "zero.engine=torch", f"freeze.strategy={strategy}"])
            zero = _in_own_process(recipe, [*overrides, "zero.engine=deepspeed", f"freeze.strategy={strategy}"])
            found[strategy].append({**plain, **{f"zero_{key}": value for key, value in zero.items()}})
            print(
                f"round {index + 1}, {strategy}: {plain['samples_per_s']:.0f} samples/s, {plain['peak_mb']:.0f} MB; "
                f"ZeRO {zero['samples_per_s']:.0f} samples/s, {zero['peak_mb']:.0f} MB",
                flush=True,
            )
    rows = [row for strategy, rounds in found.items() for row in _rows(strategy, rounds)]
    measurement.publish("freeze", rows, checkout)
    print(measurement.table(rows))
    return 0


def _prepare(config: Config) -> None:
    """The demo's data where they are missing; whose recipe names another data set has prepared it."""
    if config.data.name == demo.DATA and not (storage.folder("data", demo.DATA) / INFO_FILE).exists():
        prepare.main(["--source", "easy_vqa", "--name", demo.DATA])


def _rows(strategy: str, rounds: list[dict[str, float]]) -> list[Row]:
    middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    name = f"freeze.{strategy.replace(':', '')}"
    told = (
        ("samples_per_s", "samples/s", "samples/s, plain PyTorch, one process"),
        ("peak_mb", "MB", "its memory at its peak, MB"),
        ("trained_share", "fraction", "share of all weights that learn"),
        ("zero_samples_per_s", "samples/s", "samples/s, one ZeRO worker"),
        ("zero_peak_mb", "MB", "its memory at its peak, MB (ZeRO)"),
    )
    return [Row(f"{name}.{key}", middle[key], unit, f"{strategy} | {column}") for key, unit, column in told]


def _in_own_process(recipe: Path, overrides: list[str]) -> dict[str, float]:
    """`measure` in a fresh process: a peak is of the whole life of one."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    program = (
        "import json; from pathlib import Path; from tests.bench import freeze; "
        f"print(json.dumps(freeze.measure(Path({str(recipe)!r}), {overrides!r})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **group}, check=False
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(overrides)} failed:\n{run.stderr}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def measure(recipe: Path, overrides: list[str]) -> dict[str, float]:
    """Trains for `STEPS` steps in this process: samples a second, peak memory, share of weights that learn."""
    from jobs import engine as engines
    from jobs import loop, supervised
    from jobs.meter import Meter
    from mmagent import freeze, text
    from mmagent.batch import Inputs
    from mmagent.tasks import make_all

    torch.set_num_threads(2)
    config = configs.override(configs.load(recipe, overrides), {"cluster.workers": 1})
    dataset = Dataset.open(storage.folder("data", config.data.name))
    tasks = make_all(dataset.tasks)
    encoder = text.load_encoder(config.model.backbone, dropout=config.model.backbone_dropout)
    model = supervised.build(config, tasks, encoder)
    parts = freeze.table(model, encoder)
    engine = engines.make(model, freeze.groups(model, config), config)
    frozen = FrozenStates(encoder, device=engine.device) if model.backbone is None else None
    inputs = Inputs(config.model, config.data, text.load_tokenizer(config.model.backbone), tasks)
    batches = supervised.Batches(inputs, frozen, config, {}, engine.device)
    feed, meter = loop.Feed(batches.steps, _tables(config, dataset)), Meter()
    started = 0.0
    for step in range(STEPS):
        if step == WARM_STEPS:
            started = time.perf_counter()
        micros = feed.next(meter)[1].micros
        stage = freeze.stage(model, config.freeze, step, STEPS)
        freeze.thaw(model, config.freeze, stage)
        engine.set_lr(1.0, stage)
        for micro in micros:
            batch = engines.moved(micro, engine.device)
            engine.backward(supervised.loss_of(engine.forward(batch), batch, tasks, config))
            engine.step()
    seconds = time.perf_counter() - started
    feed.close()
    return {
        "samples_per_s": (STEPS - WARM_STEPS) * config.global_batch / seconds,
        "peak_mb": measurement.resident_peak() / 2**20,
        "trained_share": sum(part.trained for part in parts) / sum(part.total for part in parts),
    }


def _tables(config: Config, dataset: Dataset) -> Iterator[pa.Table]:
    """The rows of the first steps, laid out as a worker gets them, read before the clock starts."""
    from jobs import stream
    from mmagent.order import Position

    order = stream.order_of(dataset, "train", seed=config.seed, window_rows=config.data.window_rows)
    return iter(list(stream.tables(order, stream.layout_of(config, 1), Position(), STEPS)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
