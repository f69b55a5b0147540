"""What training holds in memory: bytes of weights, gradients and optimizer state by ZeRO stage, and what data adds.

    make bench-memory           (python -m tests.bench.memory; SCALE=small for a short one)

Two gloo ranks train a random BERT of 109 million parameters at each stage: one update of two micro-batches, and one
micro-batch more. Then, in the middle of an accumulation, when all three are there, every live storage is counted once,
by what it is. The ZeRO paper's formula
(arXiv:1910.02054, sections 3 and 5) is of mixed precision; ours is fp32, as the engine trains. Of N ranks each holds,
in bytes for a parameter:

    stage   weights   gradients   optimizer
    0       4         4           8             Adam's moments
    1       4         4           12 / N        and a copy of its share of the weights, which DeepSpeed steps on and
    2       4         4 / N       12 / N        keeps in fp32 whatever the weights are
    3       4 / N     4 / N       12 / N

Then a run goes once over N shards, and over ten times as many, each in a process of its own: what it needs at its peak
must not grow with the data.
"""

from __future__ import annotations

import functools
import gc
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from jobs import cluster
from jobs.ranks import together
from jobs.workers import Group
from mmagent import config as configs
from mmagent import measurement, storage
from mmagent.config import Config
from mmagent.measurement import Row
from mmagent.record import SCHEMA_VERSION
from mmagent.rows import parse
from mmagent.shards import ShardWriter
from mmagent.targets import TaskInfo

SMALL = os.environ.get("SCALE") == "small"
ROUNDS, SHARDS, SHARD_ROWS = (1, 2, 32) if SMALL else (3, 6, 256)
RECIPE = Path("jobs/recipes/small.yaml")
WORLD, STAGES = 2, (0, 1, 2, 3)
PARTS = ("weights", "gradients", "optimizer")
# (vocabulary, width, layers): a BERT base; the small one still has matrices that stage 3 shares out.
SIZE = (20_000, 320, 8) if SMALL else (30_522, 768, 12)
MODELS = {"0.1B": 0.1e9, "7B": 7e9, "70B": 70e9}
GPUS = (8, 64, 1024)
# Where DeepSpeed's optimizers of the stages 1 to 3 keep them.
_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
_LABELS = ("red", "green", "blue", "black")


def per_parameter(stage: int, ranks: int) -> dict[str, float]:
    """Bytes that a rank holds for each parameter that learns."""
    return {
        "weights": 4 / (ranks if stage == 3 else 1),
        "gradients": 4 / (ranks if stage >= 2 else 1),
        "optimizer": (8 + 4) / ranks if stage >= 1 else 8,
    }


def main(recipe: Path = RECIPE, checkout: Path = cluster.CHECKOUT) -> int:
    rows, errors = [], []
    for stage in STAGES:
        found = _of_stage(stage)
        wanted = {part: size * found["parameters"] for part, size in per_parameter(stage, WORLD).items()}
        errors += [abs(found[part] / wanted[part] - 1) for part in PARTS]
        rows += list(_rows(stage, found, wanted))
        print(f"stage {stage}: " + ", ".join(f"{part} {found[part] / 1e6:.0f} MB" for part in PARTS), flush=True)
    growth = _growth(recipe)
    rows = [
        Row("memory.worst_error", max(errors), "fraction", "the largest distance of a measured part from the formula",
            "<= 0.05"),
        Row("memory.growth_10x", growth, "ratio", "peak of a run over ten times as many shards", "<= 1.05"),
        *rows,
    ]  # fmt: skip
    measurement.publish("memory", rows, checkout)
    measurement.publish("memory_forecast", forecast(), checkout)
    print(measurement.table(rows))
    return 0


def forecast() -> list[Row]:
    """What a GPU would hold of models of several sizes, all of whose weights learn."""
    return [
        Row(
            f"memory_forecast.{name}.stage{stage}.{gpus}",
            sum(per_parameter(stage, gpus).values()) * parameters / 1e9,
            "GB",
            f"{name} parameters, stage {stage} | {gpus:,} GPUs",
        )
        for name, parameters in MODELS.items()
        for stage in STAGES
        for gpus in GPUS
    ]


def _rows(stage: int, found: Mapping[str, float], wanted: Mapping[str, float]) -> Iterator[Row]:
    for part in PARTS:
        what = f"stage {stage}, {part} of a rank of {WORLD}; by the formula {wanted[part] / 1e6:.0f} MB"
        yield Row(f"memory.stage{stage}.{part}_mb", found[part] / 1e6, "MB", what)
    what = f"stage {stage}, other storages, most of them buffers of DeepSpeed's, taken as they are filled"
    yield Row(f"memory.stage{stage}.other_mb", found["other"] / 1e6, "MB", what)
    yield Row(f"memory.stage{stage}.resident_mb", found["resident"] / 1e6, "MB", f"stage {stage}, resident at its peak")


# ---------------------------------------------------------------------------------------------- by stage


class Bert(nn.Module):
    """A random BERT, as a function of a batch."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        shape = BertConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64,
        )  # fmt: skip
        self.bert = BertModel(shape, add_pooling_layer=False)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"states": self.bert(input_ids=batch["ids"]).last_hidden_state}


def _of_stage(stage: int) -> dict[str, float]:
    """The bytes of the ranks' parts, the larger of each; ranks differ by what does not divide."""
    config = settings(stage)
    ranks: list[dict[str, float]] = together(functools.partial(hold, config, SIZE), WORLD, config)
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def settings(stage: int) -> Config:
    zero = {"zero.stage": stage, "cluster.workers": WORLD, "train.precision": "fp32"}
    batch = {"train.micro_batch": 2, "train.accumulation": 2}
    return configs.resolve({"data": {"name": "none"}, "model": {"backbone": "none"}}, {**zero, **batch})


def hold(config: Config, size: tuple[int, int, int], group: Group) -> dict[str, float]:
    """One rank: an update and half of another; the bytes of what it holds then."""
    from jobs import engine as engines

    torch.manual_seed(0)
    model = Bert(*size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    groups = [{"params": list(model.parameters()), "peak_lr": 1e-4, "lr": 1e-4, "stage": 0, "weight_decay": 0.01}]
    engine: Any = engines.make(model, groups, config)
    for _ in range(config.train.accumulation + 1):
        engine.set_lr(1.0)
        ids = torch.randint(0, size[0], (config.train.micro_batch, 16))
        engine.backward(engine.forward({"ids": ids})["states"].square().mean())
        engine.step()
    gc.collect()
    return {
        "parameters": parameters,
        "resident": measurement.resident_peak(),
        **holdings(model, engine._engine.optimizer),
    }


def holdings(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Bytes of all live storages, each counted once, by what it is.

    Args:
        optimizer: DeepSpeed's, around the one of torch.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    weights = list(model.parameters())
    stepped = [parameter for each in inner.param_groups for parameter in each["params"]]  # shares, or the weights
    kinds: dict[str, Any] = {
        "weights": [*weights, *(getattr(weight, "ds_tensor", None) for weight in weights)],
        "gradients": [
            [each.grad for each in (*weights, *stepped)],
            [getattr(weight, "grad_accum", None) for weight in weights],
            [getattr(optimizer, name, None) for name in _GRADIENTS],
        ],
        "optimizer": [stepped, list(inner.state), list(inner.state.values())],
        "other": [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)],
    }
    seen: set[int] = set()
    out = dict.fromkeys(kinds, 0.0)
    for kind, held in kinds.items():
        for tensor in _tensors(held):
            place = tensor.untyped_storage()
            if place.nbytes() and place.data_ptr() not in seen:
                seen.add(place.data_ptr())
                out[kind] += place.nbytes()
    return out


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (dict, list, tuple)):
        for each in held.values() if isinstance(held, dict) else held:
            yield from _tensors(each)


# ---------------------------------------------------------------------------------------------- by shards


def _growth(recipe: Path) -> float:
    """Peak of a run over ten times as many shards, to that over as many: medians of rounds in turn."""
    peaks: dict[str, list[int]] = {"bench_memory_few": [], "bench_memory_many": []}
    try:
        for name, shards in zip(peaks, (SHARDS, 10 * SHARDS), strict=True):
            _write(storage.folder("data", name), shards)
        for index in range(ROUNDS):
            for name, found in peaks.items():
                found.append(_peak(recipe, name))
            few, many = (found[-1] / 1e6 for found in peaks.values())
            print(f"round {index + 1}: {SHARDS} shards {few:.0f} MB, {10 * SHARDS} shards {many:.0f} MB", flush=True)
    finally:
        for name in peaks:
            shutil.rmtree(storage.folder("data", name), ignore_errors=True)
    few, many = (statistics.median(found) for found in peaks.values())
    return many / few


def _write(folder: Path, shards: int) -> None:
    """A data set of pictures of noise, each another, with 64 different questions."""
    noise = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    for split, count in (("train", shards * SHARD_ROWS), ("validation", SHARD_ROWS)):
        with ShardWriter(folder, split, rows_per_shard=SHARD_ROWS, row_group_rows=SHARD_ROWS) as writer:
            for index in range(count):
                file = io.BytesIO()
                Image.fromarray(noise.integers(0, 256, (48, 48, 3), np.uint8), "RGB").save(file, "PNG")
                row = {"id": f"{split}-{index}", "text": f"what is it, number {index % 64}?", "split": split}
                writer.add(parse({**row, "image": file.getvalue(), "label": _LABELS[index % 4]}))
            splits[split] = {"rows": count, "shards": writer.close(), "modalities": {"text+image": count}}
    counts = dict.fromkeys(_LABELS, shards * SHARD_ROWS // 4)
    rows = {split: about["rows"] for split, about in splits.items()}
    storage.publish_json(folder / "dataset.json", {
        "format_version": 1, "schema_version": SCHEMA_VERSION, "name": folder.name, "source": "noise", "seed": 0,
        "created_ms": 0, "task": "classify", "splits": splits, "quarantine": {"rows": 0},
        "tasks": {"classify": TaskInfo("classify", tuple(sorted(_LABELS)), counts, rows=rows).to_dict()},
    })  # fmt: skip


def _peak(recipe: Path, name: str) -> int:
    """`pass_over` in a process of its own."""
    call = f"memory.pass_over(Path({str(recipe)!r}), {name!r})"
    program = f"from pathlib import Path; from tests.bench import memory; print({call})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the run over {name} failed:\n{run.stderr}")
    return int(run.stdout.splitlines()[-1])


def pass_over(recipe: Path, name: str) -> int:
    """Trains once over a data set in this process; the most bytes that it had in memory."""
    from jobs import engine as engines
    from jobs import loop, run, stream
    from jobs.meter import Meter
    from mmagent import freeze
    from mmagent.order import Position

    torch.set_num_threads(2)
    settings = [f"data.name={name}", "cluster.workers=1", "zero.engine=torch", "train.epochs=1", "train.min_steps=0"]
    # What is kept in memory has limits of its own, which few shards already reach.
    config = configs.load(recipe, [*settings, "data.cache_mb=1", f"data.window_rows={SHARD_ROWS}", "model.audio=null"])
    with tempfile.TemporaryDirectory() as folder:
        plan = run.prepare(config, Path(folder) / name).plan
    config, learner = plan.config, plan.learner(plan)
    engine = engines.make(learner.model, freeze.groups(learner.model, config), config)
    learner.begin(engine.device)
    tables = stream.tables(plan.order, stream.layout_of(config, 1), Position(), plan.total_steps)
    feed, meter = loop.Feed(learner.steps, tables), Meter()
    for _ in range(plan.total_steps):
        engine.set_lr(1.0)
        micros = feed.next(meter)[1].micros
        engine.begin(len(micros))
        for batch in (engines.moved(micro, engine.device) for micro in micros):
            engine.backward(learner.loss(engine.forward(batch), batch))
            engine.step()
    feed.close()
    return measurement.resident_peak()


if __name__ == "__main__":
    sys.exit(main())
