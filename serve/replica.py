"""The thin shell of Ray Serve around the application. The model lives in the deployment that HTTP enters, which is one
hop, or in one of its own (`serve.apart`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.deployment import Application

from mmagent import channels, roles, storage
from mmagent.agent import policy as policies
from serve import apart, logs, narrow
from serve.app import build
from serve.config import KEYS_VARIABLE, ServeConfig
from serve.launch import StartError, check_agent, check_store, check_target, configured, folder_of, record
from serve.metrics import Metrics
from serve.service import Service, load


@serve.ingress()
class Replica:
    """One process that HTTP enters. Ray calls the constructor, then asks for the ASGI app, then for its health.

    Args:
        model: the handle of the deployment that computes; none: this one does.
    """

    def __init__(
        self, bundle: str, channel: str | None, config: dict[str, Any], root: dict[str, str], model: Any = None
    ) -> None:
        narrow.replica_port()
        logs.to_stderr()
        storage.use(root)  # of the command that started the service, not of the Ray that holds it
        self.config = ServeConfig.model_validate(config)
        self.channel = channel
        # A channel may have moved on since the application was deployed.
        place = channels.read(channel).bundle if channel is not None else bundle
        self.predictor = load(Path(place), self.config)
        self.model = model
        self.service: Service | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        file = Path(self.config.agent) if self.config.agent else None
        self.service = Service(
            self.predictor,
            self.config,
            self.channel,
            policy=policies.read(file) if file else None,
            policy_file=file,
            metrics=Metrics(Path(tempfile.gettempdir()) / f"mmagent-metrics-{os.getuid()}-{self.config.port}"),
            model=self.model,
        )
        return build(self.service)

    async def check_health(self) -> None:
        """Called by Ray before traffic comes, and at intervals; a replica that raises is replaced."""
        assert self.service is not None
        if not self.service.is_warm:
            await self.service.warm_up()
        if self.service.is_ill:
            raise RuntimeError(self.service.trouble)


def application(bundle: str, channel: str | None, config: ServeConfig) -> Application:
    """The Serve application of a bundle folder."""
    placed = _place(config)
    model = [apart.deployment(bundle, channel, config, placed)] if config.apart else []
    gpus = 0 if config.apart else config.gpus
    deployment: Any = serve.deployment(
        name="agent",
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": gpus} | placed,
        # Our own queue answers 503 in OpenAI's shape first; Ray's limit is a second wall.
        max_ongoing_requests=2 * config.max_waiting,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_requests,
            # Ray's own 30 s and ten minutes: a new process needs its time to load on top.
            upscale_delay_s=config.upscale_delay_s,
            look_back_period_s=15,
            downscale_delay_s=config.downscale_delay_s,
        ),
        graceful_shutdown_timeout_s=20,
    )(Replica)
    return deployment.bind(bundle, channel, config.model_dump(), storage.variables(), *model)


def _place(config: ServeConfig) -> dict[str, Any]:
    """The machines that replicas run on: those of a role that was asked for, else those that are set aside for serving
    where there are some, or MMAGENT_ROLES says that there will be."""
    there = config.role or roles.has("serve", ray.nodes())
    return {"label_selector": {roles.LABEL: config.role or "serve"}} if there else {}


def build_app(args: dict[str, Any]) -> Application:
    """What a Serve config file (KubeRay's RayService, `serve deploy`) names: ``import_path: serve.replica:build_app``.

    Args:
        args: ``channel`` or ``bundle`` as of `serve.start`; any field of `ServeConfig`, where host and port are those
            of the file's ``http_options``; ``url``, where others reach the service, for `jobs.promote` to find it.
            API keys and the store's address come from the environment (MMAGENT_API_KEYS, MMAGENT_STORE_URL), never
            from here: these arguments can be read in the dashboard.

    Raises:
        StartError: it cannot be served so.
    """
    given = dict(args)
    bundle, channel, url = (given.pop(key, None) for key in ("bundle", "channel", "url"))
    if (bundle is None) == (channel is None):
        raise StartError(f"args name bundle={bundle!r} and channel={channel!r}: one of the two is wanted")
    if secret := sorted({"key_hashes", "tls_cert", "tls_key"} & given.keys()):
        raise StartError(
            f"args name {', '.join(secret)}: keys come from the environment ({KEYS_VARIABLE}) or the key file, and TLS "
            "ends at what stands before a service that Ray Serve starts by itself"
        )
    if url is not None and channel is None:
        raise StartError(f"args name url={url!r} without a channel: only a channel's service is recorded")
    config = configured(given)
    folder = folder_of(bundle, channel)
    check_agent(config, folder)
    check_target(config, folder)
    check_store(config)
    if url is not None:
        record(channel, url)
    return application(str(folder), channel, config)
