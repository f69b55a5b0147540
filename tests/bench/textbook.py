"""A search as the textbook has it: Ray Tune over Ray Train, a trainer of its own for each trial. The same training,
samples and steps as ours; what differs is where trials run."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune import TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback

from jobs import loop, run, stream, workers
from jobs.workers import Group
from mmagent import config as configs
from mmagent import storage
from mmagent.config import Config
from mmagent.space import Sample


def search(base: Config, samples: Sequence[tuple[Sample, int]], folder: Path, concurrent: int) -> float:
    """Runs a trial for each sample, to the step that stands beside it; the wall time in seconds."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trainable: Any = functools.partial(_trial, base, storage.variables(), folder)
    began = time.monotonic()
    grid = Tuner(
        tune.with_resources(trainable, {"cpu": 0.1}),
        param_space={"sample": tune.grid_search([{"values": dict(s), "steps": steps} for s, steps in samples])},
        tune_config=TuneConfig(metric="score", mode="max", max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    ).fit()  # fmt: skip
    if grid.errors:
        raise SystemExit(f"{len(grid.errors)} trials of the textbook's failed: {grid.errors[0]}")
    return time.monotonic() - began


def _trial(base: Config, root: Mapping[str, str], folder: Path, config: dict[str, Any]) -> None:
    storage.use(root)
    place = folder / tune.get_context().get_trial_id()
    made = run.prepare(configs.override(base, config["sample"]["values"]), place, export=False)
    until = config["sample"]["steps"]
    plan = replace(made.plan, stages=(until,))
    workers_wanted = made.config.cluster.workers
    cpus = workers.cpus_of_a_worker(made.config, workers_wanted)
    datasets: Any = {
        name: each(workers_wanted) for name, each in run.streams(plan, made.dataset).items()
    }  # fmt: skip
    callback: Any = TuneReportCallback()  # declared as of Ray's first Train
    trainer: Any = TorchTrainer(
        _work,
        train_loop_config={"plan": plan, "until": until, "threads": made.config.cluster.threads},
        scaling_config=ScalingConfig(num_workers=workers_wanted, resources_per_worker={"CPU": cpus}),
        torch_config=TorchConfig(backend="gloo"),
        datasets=datasets,
        dataset_config=_InOrder(cpus * workers_wanted),
        run_config=RunConfig(name="train", storage_path=str(place / "ray"), callbacks=[callback]),
    )
    trainer.fit()


class _InOrder(ray.train.DataConfig):
    def __init__(self, reserved_cpus: float) -> None:
        super().__init__()
        self._reserved_cpus = reserved_cpus

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            for rank, split in enumerate(stream.split_in_turn(dataset, world_size, self._reserved_cpus)):
                out[rank][name] = split
        return out


def _work(spec: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(spec["threads"])
    context = ray.train.get_context()
    rank = context.get_world_rank()

    def report(metrics: dict[str, float]) -> bool:
        ray.train.report(metrics)
        return bool(metrics["step"] < spec["until"])

    group = Group(
        rank=rank,
        world=context.get_world_size(),
        blocks=lambda name: stream.rank_steps(ray.train.get_dataset_shard(name), rank),
        report=report,
    )
    loop.train(group, spec["plan"])
