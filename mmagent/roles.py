"""What machines of a cluster are set aside for, by the label that the files of `cluster/` give them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

LABEL = "mmagent.io/role"  # data, train or serve
VARIABLE = "MMAGENT_ROLES"  # those that a cluster has, or brings when they are asked for


def living(nodes: Iterable[Mapping[str, Any]]) -> set[str]:
    """Of the machines that live, as `ray.nodes` tells them."""
    return {role for node in nodes if node["Alive"] and (role := node["Labels"].get(LABEL))}


def has(role: str, nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a cluster has machines for something, or says that it will."""
    return role in os.environ.get(VARIABLE, "").replace(" ", "").split(",") or role in living(nodes)
