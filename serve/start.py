"""Starts the service: a bundle, or the bundle that a channel points to, as one Ray Serve application.

    python -m serve.start --bundle demo                # a run's name or a bundle folder
    python -m serve.start --channel production --port 8000
    python -m serve.start --stop                       # ends the application, and Serve where it was the last one

It deploys into the Ray that RAY_ADDRESS names (else the one of `make demo`, else a local one), waits until the service
answers, prints its address and ends; the application stays in the cluster. The same command again replaces the bundle
while the old one answers. Without API keys (environment variable MMAGENT_API_KEYS, separated by commas) it listens on
loopback only. Ray must be started with Serve's switches in its environment for full speed: `python -m serve.switches`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

from mmagent import storage
from mmagent.arguments import Parser
from serve import tls
from serve.config import ServeConfig, is_loopback
from serve.launch import StartError, check_agent, check_store, check_target, configured, folder_of, record
from serve.switches import LOCAL_ONLY

READY_TIMEOUT_S = 180.0
_HINT = "`make demo` starts one; on your own: ray start --head --port 6379, with RAY_AUTH_MODE=token in the environment"


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    try:
        if args.stop:
            connect()
            stop(args.name)
        else:
            config = _config(args)
            tls.check(config)
            folder = folder_of(args.bundle, args.channel)
            check_agent(config, folder)
            check_target(config, folder)
            connect()
            deploy(folder, args.channel, config, args.name)
            if args.channel:
                record(args.channel, config.url)
            print(f"serving {folder} at {config.url}  (/ is the page, /docs says what can be asked)")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def connect() -> None:
    """Connects this process to Ray.

    Raises:
        StartError: no Ray there, or its token is missing or wrong.
    """
    address = _address()
    host, _, port = address.rpartition(":")
    if port.isdigit():
        if is_loopback(host):
            os.environ.setdefault(LOCAL_ONLY, "0")  # see serve.switches; read when ray is imported
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise StartError(f"no Ray answers at {address} ({error.strerror or error}). {_HINT}") from error
    if _token_is_there():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` did; read when ray is imported
    import ray
    from ray.exceptions import AuthenticationError, RaySystemError

    root = str(Path(__file__).resolve().parents[1])
    try:
        # Replicas run in processes of the cluster, whose working directory is not this one.
        ray.init(
            address,
            namespace="mmagent",
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([root, *_path_entries()])}},
        )
    except AuthenticationError as error:
        raise StartError(
            "Ray wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where the token is not in "
            f"~/.ray/auth_token ({str(error).splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise StartError(
            f"{' '.join(lines)}. They must be the same: install the cluster's version here, or start the cluster anew "
            "with this one"
        ) from error
    except (ConnectionError, RaySystemError) as error:
        token = "; where it listens, the token is wrong or missing: see RAY_AUTH_TOKEN_PATH" if port.isdigit() else ""
        raise StartError(f"no Ray to connect to ({str(error).splitlines()[0]}){token}. {_HINT}") from error


def _token_is_there() -> bool:
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()


def deploy(folder: Path, channel: str | None, config: ServeConfig, name: str) -> None:
    """Deploys into the connected Ray and waits until the service answers with this bundle.

    Raises:
        StartError: Serve listens elsewhere already, a replica does not start, or nothing answers.
    """
    from ray import serve
    from ray.serve.config import ProxyLocation
    from ray.serve.exceptions import RayServeException

    from serve.replica import application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the command says itself what it does
    check_store(config)
    _check_running_proxy(config)
    options: dict[str, Any] = {"host": config.host, "port": config.port}
    if not tls.place(config) and config.tls_cert:
        options |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    serve.start(
        proxy_location=ProxyLocation.HeadOnly if config.is_loopback else ProxyLocation.EveryNode, http_options=options
    )
    try:
        serve.run(application(str(folder), channel, config), name=name, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        raise StartError(f"the service did not start: {_last_words(name, error)}") from error
    _wait_ready(config, _name_of(folder))


def stop(name: str) -> None:
    """Deletes the application; shuts Serve and its proxies down where no other application is left.

    Raises:
        StartError: no such application.
    """
    from ray import serve

    running = serve.status().applications
    if name not in running:
        raise StartError(f"no application {name!r} runs here; running: {', '.join(sorted(running)) or 'none'}")
    serve.delete(name)
    if set(running) == {name}:
        serve.shutdown()
    print(f"stopped {name}")


def _check_running_proxy(config: ServeConfig) -> None:
    """Serve applies its HTTP address once: a service must never end up on one that it did not ask for."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    running = client.http_config
    if (running.host, running.port) != (config.host, config.port):
        raise StartError(
            f"Serve listens on {running.host}:{running.port} in this Ray already, not on {config.host}:{config.port}: "
            f"use --host {running.host} --port {running.port}, or end it first with --stop"
        )


def _wait_ready(config: ServeConfig, bundle: str) -> None:
    """Asks /healthz through the proxy: what serve.run calls ready, the proxy may not have heard of yet."""
    url = f"{config.url}/healthz"
    unverified = (
        ssl._create_unverified_context()
    )  # the certificate names the service's host, this is the machine itself
    end, last = time.monotonic() + READY_TIMEOUT_S, "nothing answered"
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5, context=unverified) as answer:
                health = json.load(answer)
            if health.get("status") == "ready" and health.get("bundle") == bundle:
                return
            last = f"it answers {health}"
        except (OSError, ValueError, AttributeError) as error:
            last = str(error)
        time.sleep(0.2)
    raise StartError(f"{url} is not ready after {READY_TIMEOUT_S:.0f} s: {last}; see the logs of Ray Serve")


def _last_words(name: str, error: Exception) -> str:
    """What a replica said when it failed, without its traceback."""
    from ray import serve

    app = serve.status().applications.get(name)
    said = [str(error)] + ([app.message, *(d.message for d in app.deployments.values())] if app else [])
    lines = [line.strip() for text in said for line in text.splitlines() if "Error" in line]
    return lines[-1] if lines else str(error)


def _name_of(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["name"])


def _address() -> str:
    """RAY_ADDRESS, else the cluster that `make demo` recorded, else whatever Ray finds on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise StartError(
            f"RAY_ADDRESS is {address!r}, an address for `ray job submit`; the service is deployed through Ray itself: "
            "HOST:PORT is wanted, as `ray start` prints it"
        )
    if address:
        return address
    try:
        return str(json.loads((storage.root() / "cluster.json").read_text())["address"])
    except (FileNotFoundError, KeyError):
        return "auto"


def _path_entries() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _config(args: argparse.Namespace) -> ServeConfig:
    return configured(
        {key: found for key in ServeConfig.model_fields if (found := getattr(args, key, None)) is not None}
    )


def _parser() -> Parser:
    parser = Parser("serve.start", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bundle", help="a bundle folder, or the name of a run")
    what.add_argument("--channel", help="a channel: its newest bundle is served")
    what.add_argument("--stop", action="store_true", help="end the application of this name")
    parser.add_argument("--name", default="mmagent", help="name of the Serve application (%(default)s)")
    for key, field in ServeConfig.model_fields.items():
        if key != "key_hashes":
            _add_flag(parser, key, field)
    return parser


def _add_flag(parser: Parser, key: str, field: Any) -> None:
    many = {"allow_media_hosts": ("--allow-media-host", "HOST"), "allow_origins": ("--allow-origin", "URL")}
    if key in many:
        flag, shown = many[key]
        parser.add_argument(flag, dest=key, action="append", metavar=shown, help=field.description)
        return
    flag = f"--{key.replace('_', '-')}"
    text = f"{field.description} ({field.default})".replace("%", "%%")
    if field.default is False:
        parser.add_argument(flag, dest=key, action="store_true", default=None, help=field.description)
    elif choices := getattr(field.annotation, "__args__", None) if get_origin(field.annotation) is Literal else None:
        parser.add_argument(flag, dest=key, choices=choices, help=text)
    else:
        kind = float if field.default is None else type(field.default)
        parser.add_argument(flag, dest=key, type=kind, metavar=kind.__name__.upper(), help=text)


if __name__ == "__main__":
    main()
