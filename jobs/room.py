"""Whether a cluster has what a command asks for, or can grow to it: told before anything is started that would wait for
ever."""

from __future__ import annotations

import ray
from ray._private.state import state as global_state

from jobs.cluster import ClusterError
from mmagent.config import Config

_ANSWERER_CPUS = 0.5  # of one process of jobs.evaluate or jobs.predict: see `jobs.stream`


class RoomError(ClusterError):
    """More is asked for than there is or will be; the message says how much there is, and what to do."""


def capacity(resource: str) -> tuple[float, float]:
    """How much of a resource the cluster has, and how much it may come to have where it grows by itself."""
    has = float(ray.cluster_resources().get(resource, 0.0))
    return has, max(has, float(grown().get(resource, 0.0)))


def grown() -> dict[str, int]:
    """What the cluster may come to have by its autoscaler; nothing where it has none."""
    return global_state.get_max_resources_from_cluster_config() or {}


def check(config: Config) -> None:
    """Of a training: a GPU for each worker; CPUs are shared where they are few.

    Raises:
        RoomError: there are too few.
    """
    if not config.cluster.gpu:
        return
    least = config.cluster.min_workers
    key = f"cluster.workers={config.cluster.workers}" if least is None else f"cluster.min_workers={least}"
    _check("GPU", key, least or config.cluster.workers)


def check_alone(config: Config) -> None:
    """Of workers that must all start beside each other: one GPU or CPU for each.

    Raises:
        RoomError: there are too few.
    """
    what = "GPU" if config.cluster.gpu else "CPU"
    _check(what, f"cluster.workers={config.cluster.workers}", config.cluster.workers)


def check_answerers(count: int) -> None:
    """Of processes that answer.

    Raises:
        RoomError: the CPUs are too few.
    """
    _check("CPU", f"--workers {count}", count * _ANSWERER_CPUS)


def _check(what: str, asked: str, wanted: float) -> None:
    has, most = capacity(what)
    if wanted <= most:
        return
    grows = f", and grows to {most:g}" if most > has else " and does not grow by itself"
    instead = " (or cluster.gpu=false)" if what == "GPU" else ""
    raise RoomError(
        f"{asked} want {wanted:g} {what}s or more, but the cluster has {has:g}{grows}: give fewer workers{instead}, "
        "or add machines (ray start --address=...)"
    )
