"""TLS: the certificate files of `serve.start`, put where HAProxy takes them from (see `serve.switches`).

Serve's own proxy, where HAProxy is switched off, takes the files by itself.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

from serve.config import ServeConfig
from serve.switches import TLS_FILE

_PLACE = "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"  # in the environment of the cluster's processes


class TlsError(ValueError):
    """Certificate files that cannot be used."""


def check(config: ServeConfig) -> None:
    """
    Raises:
        TlsError: files that are not there, or do not belong together.
    """
    if not config.tls_cert:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f"--tls-cert {config.tls_cert} and --tls-key {config.tls_key} cannot be used ({error}): PEM files that "
            "belong together are wanted"
        ) from error


def place(config: ServeConfig) -> bool:
    """Puts certificate and key beside HAProxy's files on every node, or takes older ones away; whether HAProxy is there
    to take them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pem = (Path(config.tls_cert).read_text() + "\n" + Path(config.tls_key).read_text()) if config.tls_cert else ""
    put: Any = ray.remote(num_cpus=0)(_put)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    done = [
        put.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(pem) for node in nodes
    ]
    return all(ray.get(done))


def _put(pem: str) -> bool:
    if not (found := os.environ.get(_PLACE)):
        return False
    file = Path(found).with_name(TLS_FILE)
    if not pem:
        file.unlink(missing_ok=True)
        return True
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as out:
        out.write(pem)
    return True
