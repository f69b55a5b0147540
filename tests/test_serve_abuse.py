"""Each case of `tests.abuse` gets its status, tells nothing, leaves the service up; `make test-abuse` counts them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmagent import channels
from mmagent.predictor import Predictor
from serve import keys
from serve.config import ServeConfig
from serve.service import Service
from tests.abuse import CHAT, SECRET, Case, cases
from tests.serving import running

OUT = "MMAGENT_ABUSE_OUT"  # where what was seen is written, for `tests.bench.abuse`


@dataclass
class Target:
    """A service with keys, an answer and a conversation of somebody else's, and bundles that are traps."""

    address: str
    keys: dict[str, str]
    names: dict[str, str]
    root: Path
    log: list[str]
    seen: list[dict[str, Any]] = field(default_factory=list)

    def sent(self, case: Case) -> tuple[int, str]:
        """Status and body of what comes back; 0: the connection ended without an answer."""
        if case.raw is not None:
            return self._raw(case.raw.replace(b"{key}", self.keys["ask"].encode()))
        body = case.body if isinstance(case.body, bytes) or case.body is None else json.dumps(case.body).encode()
        path = case.path
        for name, value in self.names.items():
            path = path.replace("{" + name + "}", value)
            body = body.replace(b"{" + name.encode() + b"}", value.encode()) if body else body
        headers = {"Content-Type": "application/json", **case.headers}
        if case.key != "none":
            headers["Authorization"] = f"Bearer {self.keys[case.key]}"
        given = {key.encode(): value.encode("latin-1") for key, value in headers.items()}
        url = httpx.URL(self.address, raw_path=path.encode())
        answer = httpx.request(case.method, url, content=body, headers=given, timeout=60)
        return answer.status_code, answer.text

    def _raw(self, data: bytes) -> tuple[int, str]:
        host, port = self.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(data)
            found = b""
            while part := connection.recv(65_536):
                found += part
                if b"\r\n\r\n" in found:
                    break
        head, _, body = found.partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]) if head.startswith(b"HTTP/") else 0, body.decode(errors="replace")


@pytest.fixture(scope="module")
def target(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("storage")
    patch.setenv("MMAGENT_STORAGE", str(root))
    for name in ("pickle", "torn"):
        shutil.copytree(tiny_bundle, root / "runs" / name / "bundle")
    (root / "runs" / "pickle" / "bundle" / "backbone" / "pytorch_model.bin").write_bytes(
        b"\x80\x04cposix\nsystem\n(S'id'\ntR."
    )
    (root / "runs" / "pickle" / "bundle" / "model.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n(S'id'\ntR.")
    (root / "runs" / "torn" / "bundle" / "model.safetensors").unlink()
    channels.append("production", tiny_bundle, share=1, act="promote", by="test")
    file = keys.default_file()
    secrets = {}
    for name, scopes, days in (
        ("ask", ("ask",), None), ("feedback", ("feedback",), None), ("admin", ("ask", "admin"), None),
        ("other", ("ask",), None), ("expired", ("ask",), -1), ("revoked", ("ask",), None),
    ):  # fmt: skip
        key = keys.Key.model_validate({"id": name, "name": name, "hashes": {}, "scopes": scopes})
        secrets[name] = keys.add(file, key, days=days)
    keys.revoke(file, "revoked")
    secrets["wrong"] = "mma_" + "x" * 43
    log: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: log.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    for name in ("mmagent.serve", "mmagent.requests", "uvicorn.error"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    config = ServeConfig(max_body_bytes=8_000_000, body_timeout_s=1.0)
    with running(Service(Predictor.load(tiny_bundle), config, "production")) as address:
        body = {"messages": [{"role": "user", "content": "what is it?"}], "conversation": "theirs"}
        headers = {"Authorization": f"Bearer {secrets['other']}"}
        theirs = httpx.post(address + CHAT, json=body, headers=headers).json()["id"]
        names = {"theirs": theirs, "mine": theirs, "pickle": "pickle", "torn": "torn"}
        found = Target(address, secrets, names, root, log)
        yield found
    for name in ("mmagent.serve", "mmagent.requests", "uvicorn.error"):
        logging.getLogger(name).removeHandler(handler)
    if out := os.environ.get(OUT):
        Path(out).write_text(json.dumps(found.seen))
    patch.undo()


@pytest.fixture(scope="module")
def all_cases(make_png: Callable[..., bytes], make_wav: Callable[..., bytes]) -> list[Case]:
    return cases(make_png, make_wav)


@pytest.mark.long
def test_every_case_gets_its_status_and_tells_nothing(target: Target, all_cases: list[Case]) -> None:
    assert len(all_cases) >= 200
    wrong = []
    for case in all_cases:
        before = len(target.log)
        started = time.monotonic()
        status, body = target.sent(case)
        said = body + "".join(target.log[before:])
        leaks = [mark for mark in _marks(target) if mark in said]
        alive = httpx.get(f"{target.address}/healthz", timeout=10).status_code == 200
        right = status in case.status and (status < 400 or case.raw is not None or _is_error(case, body))
        target.seen.append(
            {"name": case.name, "status": status, "right": right, "leaks": leaks, "alive": alive}
        )  # fmt: skip
        if not right or leaks or not alive or time.monotonic() - started > 15:
            wrong.append(f"{case.name}: {status} (wanted {case.status}), leaks {leaks}, alive {alive}: {body[:200]}")
    assert wrong == []


def _marks(target: Target) -> list[str]:
    """What must stand in no error and no log."""
    return [SECRET, str(target.root), "site-packages", "Traceback", "/serve/", *target.keys.values()]


def _is_error(case: Case, body: str) -> bool:
    """OpenAI's shape; of what the server itself refuses before the application, any."""
    if case.method in ("TRACE", "HEAD"):
        return True
    try:
        return set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError):
        return False
