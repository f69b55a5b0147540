"""The only home of `ray.train`: a worker group of one process or many, and what a worker knows of its group."""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed as dist
from ray._raylet import PlacementGroupID
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_jobs, list_placement_groups

from jobs import failures, forecast, placement, stream, vigil
from jobs.failures import Failure
from mmagent import storage
from mmagent.config import Config

__all__ = ["Final", "Group", "WorkersFailed", "room", "run", "stay"]

_RELEASE_TIMEOUT_S = 30.0
_START = ".start"  # in a run's folder: which of its starts may write there
_DATA_CPUS = 1.6  # left for the tasks of a stream: reading asks for 1

os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")


class WorkersFailed(RuntimeError):
    """The training workers failed; the message is theirs."""


class Superseded(RuntimeError):
    """Another start of the same run has begun meanwhile: these workers are left over, and write nothing any more."""


class Final(RuntimeError):
    """What all ranks raise together, and would raise again: no reason to start them anew."""


@dataclass(frozen=True, slots=True)
class Group:
    """What one worker knows of its group. Collectives are called by every rank, in the same order."""

    rank: int
    world: int
    blocks: Callable[[str], Iterator[pa.Table]]  # a stream by name: one table for each optimizer step
    report: Callable[[dict[str, float]], bool]  # of a validation; whether the run goes on
    asked: Callable[[], str] = str  # why this rank's process shall end, or nothing
    drained: Callable[[], bool] = bool  # whether a machine of the group is to go: Ray moves the group when it does
    failure: Failure | None = None  # that this start of the workers follows

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
    """Makes streams for the workers that there are, and splits them so that block n goes to rank n modulo their number
    (see `jobs.stream`)."""

    def __init__(self, reserved_cpus: float) -> None:
        super().__init__()
        self._reserved_cpus = reserved_cpus

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        output: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, make in datasets.items():
            for rank, split in enumerate(stream.split_in_turn(make(world_size), world_size, self._reserved_cpus)):
                output[rank][name] = split
        return output


def run(
    work: Callable[[Group], None], config: Config, folder: Path, streams: Mapping[str, Callable[[int], Any]]
) -> None:
    """Runs `work` in every worker of a group, again from the start where workers fail (`cluster.max_failures`), with
    fewer of them where there is no room for all (`cluster.min_workers`).

    Args:
        folder: the run's own.
        streams: by name, what makes a stream for a number of workers; called anew whenever a group starts.

    Raises:
        WorkersFailed: they failed more often than `cluster.max_failures` allows.
        PlacementError: see `jobs.placement`.
    """
    placement.check_storage()
    _release_orphans()
    start, count = uuid.uuid4().hex[:8], 0
    storage.publish(folder / _START, start)
    while True:
        try:
            final = _fit(work, config, folder, streams, start)
            break
        except TrainingFailedError as error:
            count += 1
            words = _last_words(error, failures.last(folder, start))
            if config.cluster.min_workers is None or count > config.cluster.max_failures:
                raise WorkersFailed(words) from error
            print(f"workers failed ({words.splitlines()[0]}): counting who is left", flush=True)
    if final:
        raise WorkersFailed(final)


def stay(
    work: Callable[[Group, Mapping[str, Any]], None],
    spec: Mapping[str, Any],
    config: Config,
    folder: Path,
    cpus: float,
    watch: Callable[[Mapping[int, Exception]], None],
) -> None:
    """Runs `work` in every worker of a group, which lives until all of them return, and is started again whenever one
    fails; what it does meanwhile is its own affair (see `jobs.lanes`).

    Args:
        spec: given to `work`, with ``reserved_cpus``, which its streams must leave alone.
        cpus: of each worker (`cpus_of_a_worker`).
        watch: is told why workers failed, in the controller's process.

    Raises:
        WorkersFailed: no group comes to stand any more.
    """
    workers = config.cluster.workers
    entry: Any = _staying
    watching: Any = _Told(watch)
    reserved = cpus * workers + ray.cluster_resources().get("CPU", 0.0) - _free("CPU")
    trainer: Any = TorchTrainer(
        entry,
        train_loop_config={
            "work": work, "threads": config.cluster.threads, "spec": {**spec, "reserved_cpus": reserved},
        },
        scaling_config=_scaling(config, workers, cpus),
        torch_config=_torch(config),
        run_config=RunConfig(
            name="lane",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[watching],
        ),
    )  # fmt: skip
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise WorkersFailed(_last_words(error, None)) from error


def _fit(
    work: Callable[[Group], None],
    config: Config,
    folder: Path,
    streams: Mapping[str, Callable[[int], Any]],
    start: str,
) -> str:
    """One group, with as many workers as there is room for; what its workers gave back: why another try makes no sense,
    or nothing. Ray starts a group that failed again by itself where its size is fixed; where it may change, it is
    counted anew. Ray's own elastic groups (2.60) count the CPUs of whole nodes, also those that a service holds, and
    leave none to the tasks that read the data."""
    workers = _workers(config)
    cpus = cpus_of_a_worker(config, workers)
    entry: Any = _entry  # what Ray declares is its first Train, which took no return value and other callbacks
    given: Any = {name: functools.partial(_as_it_is, make) for name, make in streams.items()}
    watching: Any = _Failures(folder, config, start)
    trainer: Any = TorchTrainer(
        entry,
        train_loop_config={"work": work, "threads": config.cluster.threads, "folder": folder, "start": start},
        scaling_config=_scaling(config, workers, cpus),
        torch_config=_torch(config),
        datasets=given,
        # What others hold is none of the readers' either.
        dataset_config=_InTurn(cpus * workers + ray.cluster_resources().get("CPU", 0.0) - _free("CPU")),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures if config.cluster.min_workers is None else 0
            ),
            callbacks=[watching],
        ),
    )
    return trainer.fit().return_value or ""


def _scaling(config: Config, workers: int, cpus: float) -> Any:
    make: Any = ScalingConfig  # what Ray declares is its first Train's, which knows no labels
    return make(
        num_workers=workers, use_gpu=config.cluster.gpu, resources_per_worker=_resources(config, cpus),
        placement_strategy="PACK",  # what they exchange in each step stays on a machine as far as it can
        label_selector=placement.workers(config) or None,
    )  # fmt: skip


def _torch(config: Config) -> TorchConfig:
    return TorchConfig(backend="nccl" if config.cluster.gpu else "gloo")


def _as_it_is(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """Ray makes a stream before it says for how many workers: it is given what makes one (see `_InTurn`)."""
    return make


class _Failures(UserCallback):
    """Writes down why workers failed; it lives in the controller."""

    def __init__(self, folder: Path, config: Config, start: str) -> None:
        self._folder, self._config, self._start = folder, config, start

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        steps = [int(path.name.removeprefix("step_")) for path in (self._folder / "checkpoints").glob("step_*")]
        words = reason(worker_exceptions, self._folder, self._config)
        failures.note(self._folder, self._start, max(steps, default=0), words)


class _Told(UserCallback):
    """Hands on why workers failed; it lives in the controller."""

    def __init__(self, watch: Callable[[Mapping[int, Exception]], None]) -> None:
        self._watch = watch

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._watch(worker_exceptions)


def reason(errors: Mapping[int, Exception], folder: Path, config: Config) -> str:
    """Why the workers of a run failed, by what they raised and where each stood."""
    words = {rank: f"{type(error).__name__}: {error}" for rank, error in errors.items()}
    standings = {standing.rank: standing for standing in vigil.read(folder)}
    return forecast.explain(words, standings, config)


def _last_words(error: TrainingFailedError, failure: Failure | None) -> str:
    """What the workers said. An error of this project explains itself; of any other the traceback is wanted too."""
    failed = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    causes = [getattr(each, "_base_exc", each) for each in failed]
    if causes and all(_explains_itself(cause) for cause in causes):
        return "\n".join(dict.fromkeys(str(cause) for cause in causes))
    return f"{failure.reason}\n{error}" if failure else str(error)


def _explains_itself(error: BaseException) -> bool:
    return type(error).__module__.startswith(("jobs.", "mmagent."))


def _entry(spec: dict[str, Any]) -> str:
    """A worker's whole life; what a `Final` error says, or nothing."""
    torch.set_num_threads(spec["threads"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    sigterm = Sigterm()
    try:
        spec["work"](
            Group(
                rank=rank,
                world=context.get_world_size(),
                blocks=lambda name: stream.rank_steps(ray.train.get_dataset_shard(name), rank),
                report=_report,
                asked=functools.partial(_asked, sigterm, spec["folder"], spec["start"], rank),
                drained=lambda: get_train_context().preemption_context.preemption_info is not None,
                failure=failures.last(spec["folder"], spec["start"]),
            )
        )
    except Final as error:
        return str(error)
    finally:
        sigterm.close()
        storage.send(spec["folder"])
    return ""


def _asked(sigterm: Sigterm, folder: Path, start: str, rank: int) -> str:
    """Why this rank's process shall end, or nothing. When a head dies with its driver and controller, their workers on
    other machines train on until Ray (2.60) notices, a minute later; the same command was given again by then.

    Raises:
        Superseded: the run has begun anew. The ranks beside lose their connection, and end as well.
    """
    if rank == 0 and (folder / _START).exists() and (newer := (folder / _START).read_text()) != start:
        raise Superseded(f"the run {folder.name!r} was started anew ({newer} after {start}): this start is over")
    return "SIGTERM" if sigterm else ""


def _report(metrics: dict[str, float]) -> bool:
    ray.train.report(metrics)
    return True


def _staying(given: dict[str, Any]) -> None:
    """A worker's whole life in a group that stays."""
    torch.set_num_threads(given["threads"])
    context = ray.train.get_context()
    sigterm = Sigterm()
    try:
        group = Group(
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            blocks=_nothing,
            report=_report,
            asked=lambda: "SIGTERM" if sigterm else "",
        )
        given["work"](group, given["spec"])
    finally:
        sigterm.close()


def _nothing(name: str) -> Iterator[pa.Table]:
    raise RuntimeError(f"a group that stays has no stream of its own, and none called {name!r}")


class Sigterm:
    """Whether SIGTERM has reached this process; it then ends when the training does.

    The training runs in a thread, where Python sets no signal handlers, and Ray's main thread runs no Python for
    seconds. The handler of faulthandler is set from any thread and runs at once: it writes a stack into a file.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the handler
        faulthandler.register(signal.SIGTERM, file=self._file, all_threads=False, chain=False)

    def __bool__(self) -> bool:
        return os.fstat(self._file.fileno()).st_size > 0

    def close(self) -> None:
        faulthandler.unregister(signal.SIGTERM)
        self._file.close()


def beside(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function says on a machine with a free GPU, as a worker would have it; alone in a process of its own."""
    return ray.get(ray.remote(num_cpus=0, num_gpus=1, max_calls=1)(function).remote(*arguments))


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
    return max(1, int((_free("CPU") - _DATA_CPUS) // (config.cluster.workers * config.cluster.threads)))


def _workers(config: Config) -> int:
    """How many workers start: all, or what there is room for now, where that is enough (`cluster.min_workers`)."""
    wanted, least = config.cluster.workers, config.cluster.min_workers
    if least is None:
        return wanted
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while (found := _hold(config)) < wanted and time.monotonic() < deadline:
        time.sleep(0.5)  # what failed a moment ago may still hold what it had
    number = max(least, min(wanted, found))
    if number < wanted:
        print(f"{number} of cluster.workers={wanted} start: Ray has no room for more", flush=True)
    return number


def _hold(config: Config) -> int:
    """How many workers the free CPUs and GPUs hold."""
    found = (_free("CPU") - _DATA_CPUS) // config.cluster.threads
    return int(min(found, _free("GPU")) if config.cluster.gpu else found)


def cpus_of_a_worker(config: Config, workers: int) -> float:
    """What a worker asks of Ray: its threads, or less where the machine is small or a service runs beside, so that
    the tasks which read the data have theirs; on a full machine they would wait for ever."""
    wanted = _DATA_CPUS + 0.1 * workers
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while (free := _free("CPU")) < wanted and time.monotonic() < deadline:
        time.sleep(0.5)  # what ended a moment ago may still hold its CPUs
    if free < wanted:
        print(
            f"Ray has {free:g} CPUs free, and training wants {wanted:g} or more: it may wait until another job ends "
            "(ray job list; ray job stop ID) or a service is stopped",
            flush=True,
        )
    share = (free - _DATA_CPUS) / workers
    return round(min(float(config.cluster.threads), max(0.1, share)), 2)


def _free(resource: str) -> float:
    return float(ray.available_resources().get(resource, 0.0))


def _resources(config: Config, cpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": 1.0} if config.cluster.gpu else {})}
