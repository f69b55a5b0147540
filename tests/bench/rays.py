"""The Ray of a measurement: one that was started here before, or one for as long as it takes; and what lives in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
