"""The only home of `ray.train`: a worker group of one process or many, and what a worker knows of its group."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed as dist
from ray._raylet import PlacementGroupID
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_jobs, list_placement_groups

from jobs import stream
from mmagent.config import Config

__all__ = ["Group", "WorkersFailed", "release", "room", "run"]

_RELEASE_TIMEOUT_S = 30.0
_DATA_CPUS = 1.6  # left for the tasks of a stream: reading asks for 1

os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")


class WorkersFailed(RuntimeError):
    """The training workers failed; the message is theirs."""


@dataclass(frozen=True, slots=True)
class Group:
    """What one worker knows of its group. Collectives are called by every rank, in the same order."""

    rank: int
    world: int
    blocks: Callable[[str], Iterator[pa.Table]]  # a stream by name: one table for each optimizer step
    report: Callable[[dict[str, float]], None]

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks."""
        if self.world == 1:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def all(self, mine: bool) -> bool:
        return self.sum([float(not mine)])[0] == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out


class _InTurn(DataConfig):
    """Splits streams so that block n goes to rank n modulo the number of workers (see `jobs.stream`)."""

    def __init__(self, reserved_cpus: float) -> None:
        super().__init__()
        self._reserved_cpus = reserved_cpus

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        output: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            for rank, split in enumerate(stream.split_in_turn(dataset, world_size, self._reserved_cpus)):
                output[rank][name] = split
        return output


def run(
    work: Callable[[Group], None],
    config: Config,
    folder: Path,
    streams: Mapping[str, Callable[[], Any]],
    callbacks: list[Any] | None = None,
) -> None:
    """Runs `work` in every worker of a group, again from the start where workers fail (`cluster.max_failures`).

    Args:
        folder: the run's own.
        streams: by name, what makes a stream; called anew whenever the group starts.

    Raises:
        WorkersFailed: they failed more often than `cluster.max_failures` allows.
    """
    _release_orphans()
    cpus = _cpus_of_a_worker(config)
    trainer = TorchTrainer(
        _entry,
        train_loop_config={"work": work, "threads": config.cluster.threads},
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=config.cluster.gpu,
            resources_per_worker=_resources(config, cpus),
        ),
        torch_config=TorchConfig(backend="nccl" if config.cluster.gpu else "gloo"),
        datasets=dict(streams),
        # What others hold is none of the readers' either.
        dataset_config=_InTurn(cpus * config.cluster.workers + ray.cluster_resources().get("CPU", 0.0) - _free_cpus()),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=callbacks or [],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise WorkersFailed(_last_words(error)) from error


def _last_words(error: TrainingFailedError) -> str:
    """What the workers said. An error of this project explains itself; of any other the traceback is wanted too."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    if causes and all(_explains_itself(cause) for cause in causes):
        return "\n".join(dict.fromkeys(str(cause) for cause in causes))
    return str(error)


def _explains_itself(error: BaseException) -> bool:
    return isinstance(error, FloatingPointError) or type(error).__module__.startswith(("jobs.", "mmagent."))


def _entry(spec: dict[str, Any]) -> None:
    torch.set_num_threads(spec["threads"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    spec["work"](
        Group(
            rank=rank,
            world=context.get_world_size(),
            blocks=lambda name: stream.rank_blocks(ray.train.get_dataset_shard(name), rank),
            report=lambda metrics: ray.train.report(metrics),
        )
    )


def release() -> None:
    """Ends what this job's groups still hold: a search calls it when all trials are over. A controller that is stopped
    from outside may wait for minutes before it lets go of its workers (Ray 2.60)."""
    mine = ray.get_runtime_context().get_job_id()
    _remove_groups(lambda job: job == mine)


def _release_orphans() -> None:
    """Gives back what jobs that are over still hold. A job that is stopped while its controller asks for workers may
    leave their placement group behind (Ray 2.60), and nobody else would ever get those CPUs."""
    jobs = list_jobs(_address(), limit=10_000)
    running = {job.job_id for job in jobs if job.status in ("RUNNING", "PENDING")}
    _remove_groups(lambda job: job not in running)


def _remove_groups(of_job: Callable[[str], bool]) -> None:
    """Removes placement groups, and with them the processes inside, but those that shall outlive their job."""
    for group in list_placement_groups(_address(), detail=True, limit=10_000):
        held = group.state in ("CREATED", "PENDING", "RESCHEDULING")
        if held and not group.is_detached and of_job(group.creator_job_id):
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.placement_group_id)))


def _address() -> str:
    """Of the cluster that this process is in; on a machine with two, Ray's state functions would have to guess."""
    return str(ray.get_runtime_context().gcs_address)


def room(config: Config) -> int:
    """How many groups the free CPUs of the cluster hold beside each other; one at least."""
    return max(1, int((_free_cpus() - _DATA_CPUS) // (config.cluster.workers * config.cluster.threads)))


def _cpus_of_a_worker(config: Config) -> float:
    """What a worker asks of Ray: its threads, or less where the machine is small or a service runs beside, so that
    the tasks which read the data have theirs; on a full machine they would wait for ever."""
    wanted = _DATA_CPUS + 0.1 * config.cluster.workers
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while (free := _free_cpus()) < wanted and time.monotonic() < deadline:
        time.sleep(0.5)  # what ended a moment ago may still hold its CPUs
    if free < wanted:
        print(
            f"Ray has {free:g} CPUs free, and training wants {wanted:g} or more: it may wait until another job ends "
            "(ray job list; ray job stop ID) or a service is stopped",
            flush=True,
        )
    share = (free - _DATA_CPUS) / config.cluster.workers
    return round(min(float(config.cluster.threads), max(0.1, share)), 2)


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def _resources(config: Config, cpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": 1.0} if config.cluster.gpu else {})}
