"""Where work runs on a cluster of several machines: what their labels say, and whether they share the storage root.

A machine that was started with ``--labels mmagent.io/role=R`` is for ``data`` (reading, decoding, tokenising),
``train`` or ``serve``. Where a cluster has machines for something, that runs there and nowhere else; where it has none,
anywhere. MMAGENT_ROLES names those that a cluster has, or brings when they are asked for (``data,train``). The files of
`cluster/` say so. Kinds of GPU are told apart by Ray's own label (`cluster.accelerator`).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs import room
from jobs.cluster import ClusterError
from mmagent import roles, storage
from mmagent.config import Config

Role = Literal["data", "train", "serve"]
ACCELERATOR = "ray.io/accelerator-type"  # Ray's own, by what it finds in a machine
_TIMEOUT_S = 60.0


class PlacementError(ClusterError):
    """Machines that cannot do what is asked; says which and what to do."""


def selector(role: Role) -> dict[str, str]:
    """What Ray shall look for in a machine for this work; nothing where no machine is set aside for it."""
    return {roles.LABEL: role} if roles.has(role, ray.nodes()) else {}


def workers(config: Config) -> dict[str, str]:
    """The same for training workers.

    Raises:
        PlacementError: no machine has the kind of GPU that `cluster.accelerator` names.
    """
    wanted = selector("train")
    if kind := config.cluster.accelerator:
        has = sorted({found for node in _alive(ray.nodes()) if (found := node["Labels"].get(ACCELERATOR))})
        if kind not in has and not room.grown():
            raise PlacementError(
                f"cluster.accelerator={kind}: no machine of the cluster has it; they have {', '.join(has) or 'none'}"
            )
        wanted |= {ACCELERATOR: kind}
    return wanted


def check_storage() -> None:
    """
    Raises:
        PlacementError: the storage root is a folder that some machine of the cluster does not see.
    """
    nodes = list(_alive(ray.nodes()))
    if len(nodes) < 2 or storage.is_remote():
        return
    sign = storage.root() / f".seen-{secrets.token_hex(8)}"
    sign.touch()
    try:
        asked = [(node, _sees.options(scheduling_strategy=_on(node)).remote(sign)) for node in nodes]
        blind = sorted({str(node["NodeManagerAddress"]) for node, answer in asked if not _says(answer)})
    finally:
        sign.unlink(missing_ok=True)
    if blind:
        raise PlacementError(
            f"the storage root {storage.root()} is a folder that {', '.join(blind)} does not see: on several "
            f"machines {storage.ROOT_VARIABLE} names a folder that all of them share (NFS, or a volume that is mounted "
            "on each), or object storage: s3://BUCKET/PREFIX"
        )


def _on(node: Mapping[str, Any]) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


@ray.remote(num_cpus=0, max_retries=0)
def _sees(sign: Path) -> bool:
    return sign.exists()


def _says(answer: Any) -> bool:
    """A machine that went away meanwhile is none that lacks anything."""
    try:
        return bool(ray.get(answer, timeout=_TIMEOUT_S))
    except ray.exceptions.RayError:
        return True


def _alive(nodes: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    return (node for node in nodes if node["Alive"])
