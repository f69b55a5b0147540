"""What the service can be told: one frozen model, filled by the flags of `serve.start` and one environment variable."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

KEYS_VARIABLE = "MMAGENT_API_KEYS"
_HOST = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d{1,5})?|\[[0-9a-f:]+\](:\d{1,5})?")


class ServeConfig(BaseModel):
    """Keys are held as SHA-256 only, so that none lies readable in the cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; another than loopback wants API keys")
    port: int = Field(8000, ge=1, le=65_535, description="port to listen on")
    max_body_bytes: int = Field(32 * 1024 * 1024, gt=0, description="size of a request's body")
    max_media: int = Field(16, gt=0, description="pictures and sounds of one request")
    max_views: int = Field(64, gt=0, description="candidates of one request, or strides that its long text is read in")
    batch_size: int = Field(16, gt=0, description="requests of one forward pass")
    batch_wait_ms: float = Field(5.0, ge=0, le=1000, description="how long a batch waits for requests being decoded")
    max_waiting: int = Field(256, gt=0, description="requests in a replica; more get 503 and Retry-After")
    min_replicas: int = Field(1, gt=0, description="replicas kept when nobody asks")
    max_replicas: int = Field(2, gt=0, description="replicas under load")
    target_requests: float = Field(32, gt=0, description="requests in a replica above which another one is started")
    cpus: float = Field(1.0, gt=0, description="CPUs that Ray sets aside for a replica")
    gpus: float = Field(0.0, ge=0, description="GPUs that Ray sets aside for a replica")
    threads: int = Field(1, gt=0, description="CPU threads of a replica's forward pass")
    decode_threads: int = Field(2, gt=0, description="threads of a replica that decode media")
    allow_media_hosts: tuple[str, ...] = Field(
        (), description="hosts whose http(s) pictures are fetched: HOST, HOST:PORT or *.DOMAIN; none by default"
    )
    fetch_timeout_s: float = Field(10.0, gt=0, description="for fetching one picture, from start to end")
    key_hashes: tuple[str, ...] = Field((), repr=False, description=f"SHA-256 of the keys in {KEYS_VARIABLE}")

    @field_validator("allow_media_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        lowered = tuple(host.lower().rstrip(".") for host in hosts)
        for host in lowered:
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no host: example.com, example.com:8080 or *.example.com is wanted")
        return lowered

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        if not self.is_loopback and not self.key_hashes:
            raise ValueError(
                f"host {self.host} can be reached by others, and there are no API keys: put them into the environment, "
                f"{KEYS_VARIABLE}=KEY[,KEY...], or serve on 127.0.0.1"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    def knows(self, key: str) -> bool:
        """Whether a presented key is one of ours; takes as long for a wrong one as for a right one."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self.key_hashes) > 0  # a sum ends not early


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
    return tuple(_digest(key) for key in keys)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
