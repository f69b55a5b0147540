"""The Ray of a measurement: one that was started here before, or one for as long as it takes; what lives in it, and how
much memory that has."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil

from jobs import cluster

# Of the whole cluster: Ray Data starts them once and keeps them.
_RAY_DATA = ("_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker", "_UsageCollectionActor")


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """A Ray, which is stopped afterwards where it was not there before."""
    found, new = cluster.ensure(cluster.record())
    try:
        yield
    finally:
        if new:
            cluster.stop(found)
            cluster.record().unlink(missing_ok=True)


def living() -> set[str]:
    """The actors and placement groups of the cluster."""
    cluster.connect()
    import ray  # after the environment is set: Ray reads it when it is imported
    from ray.util.state import list_actors, list_placement_groups

    address = ray.get_runtime_context().gcs_address
    actors = list_actors(address, filters=[("state", "=", "ALIVE")], limit=1000)
    groups = list_placement_groups(address, filters=[("state", "=", "CREATED")], limit=1000)
    ours = {f"{each.class_name} {each.actor_id}" for each in actors if each.class_name not in _RAY_DATA}
    return ours | {each.placement_group_id for each in groups}


@contextlib.contextmanager
def memory(every_s: float = 2.0) -> Iterator[list[tuple[float, int]]]:
    """When, and how many bytes this process and all of the cluster's have then in memory: each shared page is counted
    once (`smaps_rollup`'s Pss)."""
    seen: list[tuple[float, int]] = []
    found, _ = cluster.ensure(cluster.record())
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(every_s):
            sizes = [_bytes(each) for each in [psutil.Process(), *cluster.family(found)]]
            seen.append((time.time(), sum(sizes)))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # ended since
        return 0
