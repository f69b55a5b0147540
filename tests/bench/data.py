"""How fast rows become tensors: our stream beside `datasets` streaming, WebDataset and a torch DataLoader.

    make bench-data             (python -m tests.bench.data; SCALE=small for a short one)

The same rows, pictures or sounds with a question each, from the same Parquet shards (WebDataset's from tars of them),
to the same tensors, by the same number of processes that decode: ours are the workers of Ray Train, which get their
rows from Ray Data as a training does; the others' are the workers of a DataLoader. All shuffle within a window. The
first fifth of the rows, while processes start and queues fill, does not count, nor the last, while they run empty.
Medians of rounds in which all take turns.

How long steps wait for data is measured by a short training on the pictures.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from jobs import cluster
from mmagent import config as configs
from mmagent import measurement, storage
from mmagent.config import Config
from mmagent.measurement import Row
from mmagent.record import SCHEMA_VERSION
from mmagent.rows import parse
from mmagent.shards import Dataset, ShardWriter
from mmagent.targets import TaskInfo
from tests.bench import loaders, rays

RECIPE = Path("jobs/recipes/small.yaml")
SMALL = os.environ.get("SCALE") == "small"
ROUNDS, ROWS, STEPS = (1, 512, 12) if SMALL else (3, 16_384, 150)
WORKERS, BATCH, WINDOW = 2, 32, 1024
KINDS = {"image": 1.0, "sound": 0.5}  # share of `ROWS`: a sound takes longer
_COUNTED = (0.2, 0.8)  # of the rows
_LABELS = ("black", "blue", "green", "red")

Trace = list[tuple[float, int]]  # seconds, rows of a batch


def main(recipe: Path = RECIPE, checkout: Path = cluster.CHECKOUT) -> int:
    rows: list[Row] = []
    with rays.borrowed():
        try:
            ratios = [_compare(recipe, kind, int(share * ROWS), rows) for kind, share in KINDS.items()]
            wait = _wait_share(recipe)
        finally:
            for kind in KINDS:
                shutil.rmtree(storage.folder("data", f"bench_data_{kind}"), ignore_errors=True)
    rows = [
        Row("data.vs_best", min(ratios), "ratio", "rows/s of ours to the best other, the worse of both", ">= 1.0"),
        Row("data.wait_share", wait, "fraction", "of step time spent waiting for data, pictures", "<= 0.01"),
        *rows,
    ]  # fmt: skip
    measurement.publish("data", rows, checkout)
    print(measurement.table(rows))
    return 0


def _compare(recipe: Path, kind: str, count: int, rows: list[Row]) -> float:
    """Ours to the best of the others on one kind; adds all their figures to `rows`."""
    dataset = write(kind, storage.folder("data", f"bench_data_{kind}"), count)
    rates: dict[str, list[float]] = {name: [] for name in ("ours", *loaders.LOADERS)}
    for index in range(ROUNDS):
        for name, measured in rates.items():
            measured.append(_rate(_in_own_process(recipe, name, kind)))
        told = ", ".join(f"{name} {measured[-1]:,.0f}" for name, measured in rates.items())
        print(f"{kind}, round {index + 1}: {told} rows/s", flush=True)
    middle = {name: statistics.median(measured) for name, measured in rates.items()}
    size = sum(shard["bytes"] for shard in dataset.info["splits"]["train"]["shards"]) / count / 1e6
    for name, rate in middle.items():
        rows.append(
            Row(f"data.{kind}.{name}.rows_per_s", rate, "rows/s", f"{kind}: {name}, {WORKERS} processes decode")
        )
        rows.append(Row(f"data.{kind}.{name}.mb_per_s", rate * size, "MB/s", f"{kind}: {name}, of encoded rows"))
    ratio = middle["ours"] / max(rate for name, rate in middle.items() if name != "ours")
    rows.append(Row(f"data.{kind}.vs_best", ratio, "ratio", f"{kind}: rows/s of ours to the best of the others"))
    return ratio


def _rate(traces: Sequence[Trace]) -> float:
    """Rows a second of all consumers together, between two shares of the rows."""
    events = sorted(tuple(event) for trace in traces for event in trace)
    done = np.cumsum([rows for _, rows in events])
    first, last = (int(np.searchsorted(done, share * done[-1])) for share in _COUNTED)
    return float((done[last] - done[first]) / (events[last][0] - events[first][0]))


def _in_own_process(recipe: Path, name: str, kind: str) -> list[Trace]:
    side = "data.ours(" if name == "ours" else f"data.theirs({name!r}, "
    call = f"{side}Path({str(recipe)!r}), {kind!r})"
    program = f"import json; from pathlib import Path; from tests.bench import data; print(json.dumps({call}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"{name} failed on {kind}:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    found: list[Trace] = json.loads(run.stdout.splitlines()[-1])
    return found


def settings(recipe: Path, kind: str) -> Config:
    """The recipe as both sides read with it: both towers' formats, nothing changed, nothing decoded is kept."""
    told = [
        *(
            f"data.name=bench_data_{kind}",
            "data.cache_mb=0",
            f"data.window_rows={WINDOW}",
            "model.join=output",
            "augment={}",
        ),
        *(f"train.micro_batch={BATCH}", "train.accumulation=1"),
        *(f"cluster.workers={WORKERS}", "cluster.threads=1", "cluster.max_failures=0"),
    ]
    return configs.load(recipe, told)


def theirs(name: str, recipe: Path, kind: str) -> list[Trace]:
    """When each batch of a DataLoader came."""
    config = settings(recipe, kind)
    dataset = Dataset.open(storage.folder("data", config.data.name))
    trace = [
        (time.time(), len(batch["ids"]))
        for batch in loaders.batches(name, dataset, config, kind, WINDOW, WORKERS)
    ]  # fmt: skip
    return [trace]


def ours(recipe: Path, kind: str) -> list[Trace]:
    """When each batch came, of each worker of Ray Train."""
    cluster.connect()
    import tempfile

    from jobs import stream, workers
    from mmagent.order import Position

    config = settings(recipe, kind)
    dataset = Dataset.open(storage.folder("data", config.data.name))
    order = stream.order_of(dataset, "train", seed=config.seed, window_rows=config.data.window_rows)
    steps = order.steps(1, config.global_batch)
    with tempfile.TemporaryDirectory() as folder:
        work = reader(config, dataset, Path(folder))

        def made(world: int) -> Any:
            return stream.training_stream(order, stream.layout_of(config, world), Position(), steps)

        workers.run(work, config, Path(folder), {"train": made})
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(WORKERS)]


def reader(config: Config, dataset: Dataset, folder: Path) -> Callable[[Any], None]:
    """What a worker does: makes the batches of a training. (A function of a function travels with its code: Ray's
    processes do not know this file.)"""

    def read(group: Any) -> None:
        import json
        import time

        import torch

        from jobs.supervised import Batches
        from mmagent.assembly import load_reading
        from mmagent.batch import Inputs
        from mmagent.tasks import make_all

        inputs = Inputs(config.model, config.data, load_reading(config.model), make_all(dataset.tasks))
        batches = Batches(inputs, None, config, {}, torch.device("cpu"))
        trace = []
        for step in batches.steps(group.blocks("train")):
            rows = sum(int((batch["weight"] > 0).sum()) for batch in step.micros)
            trace.append((time.time(), rows))
        (folder / f"{group.rank}.json").write_text(json.dumps(trace))

    return read


def _wait_share(recipe: Path) -> float:
    """Of the step time of a short training, what it waits for data, behind its first ten steps."""
    folder = storage.folder("runs", "bench_data")
    shutil.rmtree(folder, ignore_errors=True)
    options = ["data.name=bench_data_image", f"train.max_steps={STEPS}", f"train.eval_every_steps={STEPS}",
               "train.eval_every_epochs=null", "train.eval_rows=64"]  # fmt: skip
    command = [sys.executable, "-m", "jobs.train", "--config", str(recipe), "--name", "bench_data", "--no-evaluate"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    share = float(json.loads((folder / "timing.json").read_text())["wait_share"])
    shutil.rmtree(folder)
    return share


# ---------------------------------------------------------------------------------------------- material


def write(kind: str, folder: Path, count: int) -> Dataset:
    """A data set of pictures or sounds, each another, with 64 different questions; and its tars."""
    field, make = ("image", _picture) if kind == "image" else ("audio", _sound)
    shutil.rmtree(folder, ignore_errors=True)
    splits: dict[str, Any] = {}
    for split, rows in (("train", count), ("validation", 64)):
        with ShardWriter(folder, split, rows_per_shard=max(64, min(1024, count // 4)), row_group_rows=128) as writer:
            for index in range(rows):
                row = {"id": f"{split}-{index}", "text": f"what is it, number {index % 64}?", "split": split}
                writer.add(parse({**row, field: make(index), "label": _LABELS[index % 4]}))
            splits[split] = {"rows": rows, "shards": writer.close(), "modalities": {f"text+{field}": rows}}
    counts = {split: about["rows"] for split, about in splits.items()}
    info = TaskInfo("classify", _LABELS, dict.fromkeys(_LABELS, count // 4), rows=counts)
    storage.publish_json(folder / "dataset.json", {
        "format_version": 1, "schema_version": SCHEMA_VERSION, "name": folder.name, "source": "noise", "seed": 0,
        "created_ms": 0, "task": "classify", "splits": splits, "quarantine": {"rows": 0},
        "tasks": {"classify": info.to_dict()},
    })  # fmt: skip
    dataset = Dataset.open(folder)
    loaders.write_tars(dataset)
    return dataset


def _picture(number: int) -> bytes:
    """A JPEG of 160 x 160 pixels: noise, made smooth as photographs are."""
    noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise, "RGB").resize((160, 160), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def _sound(number: int, rate_hz: int = 16_000, seconds: float = 1.5) -> bytes:
    """A FLAC: a tone that glides, with noise."""
    noise = np.random.default_rng(number)
    time_s = np.arange(int(rate_hz * seconds)) / rate_hz
    pitch = 100 + 300 * noise.random() + 80 * np.sin(2 * np.pi * 3 * time_s)
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / rate_hz) + 0.05 * noise.standard_normal(len(time_s))
    out = io.BytesIO()
    soundfile.write(out, wave.clip(-1, 1), rate_hz, format="FLAC")
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
