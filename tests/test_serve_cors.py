"""Web pages of other hosts: those that CORS names may ask and read, why they were refused included; others may not, and
where no key is wanted they cannot even act."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from mmagent.predictor import Predictor
from serve import keys
from serve.app import build
from serve.config import ServeConfig
from serve.keys import Key
from serve.service import Service

OURS, OTHER = "https://shop.example", "https://evil.example"
BODY = {"text": "what color is the shape?"}


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@contextmanager
def client_of(predictor: Predictor, **config: Any) -> Iterator[TestClient]:
    service = Service(predictor, ServeConfig(**config))
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def preflight(client: TestClient, origin: str, path: str = "/v1/chat/completions") -> Any:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return client.options(path, headers={"Origin": origin, **asks})


def allowed(answer: Any) -> str | None:
    found: str | None = answer.headers.get("access-control-allow-origin")
    return found


@pytest.fixture
def secret(storage: Path) -> str:
    key = Key.model_validate({"id": "key_1", "name": "n", "hashes": {}, "scopes": ("ask",), "per_minute": 2})
    return keys.add(keys.default_file(), key, days=None)


def test_a_page_that_is_named_asks_and_reads_with_a_key(predictor: Predictor, secret: str) -> None:
    with client_of(predictor, allow_origins=(OURS,)) as client:
        before = preflight(client, OURS)  # browsers send no key with it
        assert (before.status_code, allowed(before)) == (200, OURS)
        assert "POST" in before.headers["access-control-allow-methods"]
        assert before.headers["access-control-allow-headers"] == "authorization,content-type"
        headers = {"Origin": OURS, "Authorization": f"Bearer {secret}"}
        answer = client.post("/v1/predict", json=BODY, headers=headers)
        assert (answer.status_code, allowed(answer)) == (200, OURS)
        assert "Origin" in answer.headers["vary"]
        readable = answer.headers["access-control-expose-headers"]
        assert {"x-request-id", "retry-after", "x-ratelimit-remaining-requests"} <= set(readable.split(", "))
        assert "access-control-allow-credentials" not in answer.headers  # cookies mean nothing here


def test_it_reads_why_it_was_refused(predictor: Predictor, secret: str) -> None:
    with client_of(predictor, allow_origins=(OURS,), max_body_bytes=1000) as client:
        key = {"Authorization": f"Bearer {secret}"}
        for headers, body, status in (
            ({}, BODY, 401), (key, {"text": "x" * 2000}, 413), (key, {"txt": "x"}, 422), (key, BODY, 429),
        ):  # fmt: skip
            answer = client.post("/v1/predict", json=body, headers={"Origin": OURS, **headers})
            assert (answer.status_code, allowed(answer)) == (status, OURS)
            assert answer.json()["error"]["message"]
            assert answer.headers["x-request-id"]


def test_another_page_reads_nothing(predictor: Predictor, secret: str) -> None:
    with client_of(predictor, allow_origins=(OURS,)) as client:
        before = preflight(client, OTHER)
        assert (before.status_code, allowed(before)) == (400, None)
        headers = {"Origin": OTHER, "Authorization": f"Bearer {secret}"}
        assert allowed(client.post("/v1/predict", json=BODY, headers=headers)) is None
        assert allowed(client.post("/v1/predict", json=BODY, headers={"Origin": OTHER})) is None
        near = client.post("/v1/predict", json=BODY, headers={**headers, "Origin": OURS + ".evil.example"})
        assert allowed(near) is None


def test_without_cors_no_page_is_named(predictor: Predictor, secret: str) -> None:
    with client_of(predictor) as client:
        assert preflight(client, OURS).status_code == 401
        headers = {"Origin": OURS, "Authorization": f"Bearer {secret}"}
        assert allowed(client.post("/v1/predict", json=BODY, headers=headers)) is None


@pytest.mark.parametrize("origin", [OTHER, "null", "http://testserver.evil.example", "http://testserver:81"])
def test_where_no_key_is_wanted_other_pages_cannot_act(predictor: Predictor, storage: Path, origin: str) -> None:
    # What a browser sends without asking first: it keeps the answer from the page, but the act would be done.
    simple = {"Origin": origin, "Content-Type": "text/plain"}
    with client_of(predictor, allow_origins=(OURS,)) as client:
        for path in ("/v1/predict", "/admin/rollback", "/v1/feedback"):
            answer = client.post(path, content=b"{}", headers=simple)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "--allow-origin" in answer.json()["error"]["message"]
        for path in ("/v1/answers/ans_1", "/v1/conversations/a"):
            assert client.delete(path, headers=simple).status_code == 403
        with (
            pytest.raises(WebSocketDisconnect) as refused,
            client.websocket_connect("/v1/voice", headers={"Origin": origin}),
        ):
            pass
        assert refused.value.code == 1008


def test_its_own_page_and_those_that_are_named_do(predictor: Predictor, storage: Path) -> None:
    with client_of(predictor, allow_origins=(OURS,)) as client:
        for origin in ("http://testserver", OURS, OURS.upper()):
            assert client.post("/v1/predict", json=BODY, headers={"Origin": origin}).status_code == 200
        assert client.post("/v1/predict", json=BODY).status_code == 200  # no browser
        with client.websocket_connect("/v1/voice", headers={"Origin": OURS}) as socket:
            socket.send_json({"type": "start", "speak": False})
            assert socket.receive_json() == {"type": "listening"}
    with client_of(predictor, allow_origins=("*",)) as client:
        answer = client.post("/v1/predict", json=BODY, headers={"Origin": OTHER})
        assert (answer.status_code, allowed(answer)) == (200, "*")


@pytest.mark.parametrize("origin", ["shop.example", "https://shop.example/", "https://shop.example/page", "null", ""])
def test_what_no_browser_sends_is_no_origin(origin: str) -> None:
    with pytest.raises(ValidationError, match="no origin"):
        ServeConfig(allow_origins=(origin,))
    assert ServeConfig(allow_origins=("HTTPS://Shop.example:8443",)).allow_origins == ("https://shop.example:8443",)
