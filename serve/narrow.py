"""What Ray Serve opens to all of a network, and need not."""

from __future__ import annotations

from typing import Any

import ray


def replica_port() -> None:
    """Ray 2.60 opens a replica's internal port on all addresses (``[::]:0``, ray/serve/_private/replica.py), and opens
    it after the constructor. Others reach it by the address of its node, so that one is enough.
    tests/test_serve_start.py fails when Ray does this differently."""
    from ray.serve._private import replica

    module: Any = replica
    add_port = module.add_port_to_grpc_server

    def add_port_of_node(server: Any, address: str) -> Any:
        if address == "[::]:0":
            node = ray.util.get_node_ip_address()
            address = f"[{node}]:0" if ":" in node else f"{node}:0"
        return add_port(server, address)

    module.add_port_to_grpc_server = add_port_of_node
