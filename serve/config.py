"""What the service can be told: one frozen model, filled by the flags of `serve.start` and one environment variable."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve import keys as key_file

KEYS_VARIABLE = "MMAGENT_API_KEYS"
_HOST = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d{1,5})?|\[[0-9a-f:]+\](:\d{1,5})?")

_ORIGIN = re.compile(r"https?://([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(:\d{1,5})?")


class ServeConfig(BaseModel):
    """Keys are held as SHA-256 only, so that none lies readable in the cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # -- where it listens, and for whom
    host: str = Field("127.0.0.1", description="address to listen on; another than loopback wants API keys")
    port: int = Field(8000, ge=1, le=65_535, description="port to listen on")
    max_body_bytes: int = Field(32 * 1024 * 1024, gt=0, description="size of a request's body")
    max_media: int = Field(16, gt=0, description="pictures and sounds of one request")
    max_views: int = Field(64, gt=0, description="candidates of one request, or strides that its long text is read in")
    batch_size: int = Field(16, gt=0, description="requests of one forward pass")
    batch_wait_ms: float = Field(5.0, ge=0, le=1000, description="how long a batch waits for requests being decoded")
    max_waiting: int = Field(256, gt=0, description="requests in a replica; more get 503 and Retry-After")
    min_replicas: int = Field(1, ge=0, description="replicas kept when nobody asks; 0: the first request waits for one")
    max_replicas: int = Field(2, gt=0, description="replicas under load")
    target_requests: float = Field(32, gt=0, description="requests in a replica above which another one is started")
    upscale_delay_s: float = Field(5, ge=0, description="how long there must be too many requests")
    downscale_delay_s: float = Field(120, ge=0, description="how long there must be too few")
    cpus: float = Field(1.0, gt=0, description="CPUs that Ray sets aside for a replica")
    gpus: float = Field(0.0, ge=0, description="GPUs that Ray sets aside for a replica")
    apart: bool = Field(
        False, description="the model gets a deployment of its own, with --gpus: processes that speak HTTP and decode "
        "have CPUs alone, and both are scaled by themselves"
    )  # fmt: skip
    max_models: int = Field(1, gt=0, description="replicas of a model that is apart, under load")
    role: str = Field("", description="replicas run on Ray nodes with this label mmagent.io/role alone; none: on any")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the forward pass; bf16 is faster where the processor (Intel's: AMX) or GPU has it, and "
        "its probabilities differ in the third digit: the gate allows 0.03, and no other label"
    )  # fmt: skip
    threads: int = Field(1, gt=0, description="CPU threads of a replica's forward pass")
    decode_threads: int = Field(1, gt=0, description="threads of a replica that decode media")
    cache_mb: int | None = Field(
        None, ge=0, description="of decoded media, of towers' tokens and of texts' states, each; 0: nothing is kept"
    )
    allow_media_hosts: tuple[str, ...] = Field(
        (), description="hosts whose http(s) pictures are fetched: HOST, HOST:PORT or *.DOMAIN; none by default"
    )
    fetch_timeout_s: float = Field(10.0, gt=0, description="for fetching one picture, from start to end")
    body_timeout_s: float = Field(30.0, gt=0, description="for a request's body to come whole")
    max_seconds: float = Field(120.0, gt=0, description="for an answer; clients may ask for less")
    per_minute: int = Field(0, ge=0, description="requests a minute of a key that says nothing itself; 0: any number")
    allow_origins: tuple[str, ...] = Field(
        (), description="web pages of other hosts that may ask (CORS): https://HOST, or *"
    )
    tls_cert: str = Field(
        "", description="PEM file of the certificate, the chain behind it: the service speaks TLS then"
    )
    tls_key: str = Field("", description="PEM file of its key")
    keys: str = Field("", description="the key file; none: serve/keys.json below the storage root")
    key_hashes: tuple[str, ...] = Field((), repr=False, description=f"SHA-256 of the keys in {KEYS_VARIABLE}")
    # -- what it keeps
    store: str = Field(
        "", description="of conversations and traces: redis://... (also as MMAGENT_STORE_URL in the environment), or "
        "SQLite below the storage root"
    )  # fmt: skip
    conversation_hours: float = Field(24.0, gt=0, description="how long a conversation is kept after its last turn")
    max_messages: int = Field(50, gt=0, description="of a conversation, the newest, that the model is asked with")
    keep: Literal["all", "sampled", "unsure", "none"] = Field(
        "all", description="whose questions are kept with their answers: feedback on those can be learned from"
    )
    keep_share: float = Field(0.1, gt=0, le=1, description="of the questions that --keep sampled keeps")
    keep_days: float = Field(30.0, gt=0, description="how long traces and questions are kept")
    log_content: bool = Field(False, description="write questions and answers into the log, too")
    # -- what it does
    agent: str = Field("", description="a YAML file: rules, tools, knowledge (see mmagent.agent.policy)")
    target_accuracy: float | None = Field(
        None, gt=0, le=1, description="answers less sure than validation needs for this accuracy count as abstained"
    )
    rollback_at: float | None = Field(
        0.1, gt=0, le=1, description="a canary, or a bundle that was promoted while this service runs, is taken back "
        "where surely more answers are called wrong, or unsure, than of the bundle before, by more than this share"
    )  # fmt: skip
    explain: Literal["auto", "integrated_gradients", "rollout", "occlusion"] = Field(
        "auto", description="how evidence is found where a request says explain: by integrated gradients where the "
        "model joins at the output, else by occlusion, which takes many passes; see mmagent.explain"
    )  # fmt: skip
    voice: str = Field("en-us", description="of what is spoken, where nobody says another")

    @field_validator("allow_media_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        lowered = tuple(host.lower().rstrip(".") for host in hosts)
        for host in lowered:
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no host: example.com, example.com:8080 or *.example.com is wanted")
        return lowered

    @field_validator("allow_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        lowered = tuple(origin.lower() for origin in origins)
        for origin in lowered:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin as browsers send it: https://HOST or https://HOST:PORT is wanted, or *"
                )
        return lowered

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        if not self.is_loopback and not self.key_hashes and not key_file.read(self.key_file):
            raise ValueError(
                f"host {self.host} can be reached by others, and there are no API keys: make some "
                "(python -m serve.keys add --name NAME), or put them into the environment, "
                f"{KEYS_VARIABLE}=KEY[,KEY...], or serve on 127.0.0.1"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key are wanted together")
        return self

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = self.host if self.host not in ("0.0.0.0", "::") else "127.0.0.1"
        return f"{'https' if self.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def key_file(self) -> Path:
        return Path(self.keys) if self.keys else key_file.default_file()

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host. A name other than localhost may resolve to anything, so it is not."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def key_hashes() -> tuple[str, ...]:
    """The hashes of the keys that the environment holds, separated by commas or white space.

    Raises:
        ValueError: a key that is too short to be one.
    """
    keys = re.split(r"[,\s]+", os.environ.get(KEYS_VARIABLE, "").strip())
    keys = [key for key in keys if key]
    if any(len(key) < 16 for key in keys):
        raise ValueError(
            f"{KEYS_VARIABLE} holds a key of fewer than 16 characters; "
            'python -c "import secrets; print(secrets.token_urlsafe(32))" makes a good one'
        )
    return tuple(key_file.hash_of(key) for key in keys)
