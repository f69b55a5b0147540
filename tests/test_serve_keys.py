"""API keys: made, rotated, revoked, and never readable; what each may do, and how often."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mmagent.predictor import Predictor
from serve import keys
from serve.app import build
from serve.config import ServeConfig
from serve.keys import Key, Keys, Refused
from serve.service import Service


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@pytest.fixture
def file(storage: Path) -> Path:
    return keys.default_file()


@pytest.fixture
def client(predictor: Predictor, file: Path) -> Iterator[TestClient]:
    service = Service(predictor, ServeConfig())
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def made(file: Path, *scopes: str, days: float | None = None, **more: Any) -> str:
    key = Key.model_validate({"id": f"key_{len(keys.read(file))}", "name": "n", "hashes": {}, "scopes": scopes, **more})
    return keys.add(file, key, days=days)


def asked(client: TestClient, secret: str | None, path: str = "/v1/predict", **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    if path == "/v1/predict":
        body = body or {"text": "what color is the shape?"}
    return client.post(path, json=body, headers=headers)


def test_the_command_makes_a_secret_that_the_file_does_not_hold(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["add", "--name", "app", "--scope", "ask", "--scope", "feedback", "--days", "1", "--per-minute", "9"])
    id, secret = capsys.readouterr().out.splitlines()[0].split()
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    found = Keys(file).find(secret)
    assert isinstance(found, Key)
    assert (found.id, found.scopes, found.per_minute) == (id, ("ask", "feedback"), 9)
    keys.main(["list"])
    assert "live until" in capsys.readouterr().out


def test_a_rotated_key_has_two_secrets_for_a_while(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = made(file, "ask")
    keys.main(["rotate", "key_0", "--overlap-hours", "1"])
    new = capsys.readouterr().out.split()[1]
    both = Keys(file)
    assert isinstance(both.find(old), Key)
    assert isinstance(both.find(new), Key)
    keys.rotate(file, "key_0", days=None, overlap_hours=0)
    found = Keys(file).find(old)
    assert isinstance(found, Refused)


def test_a_key_ends(file: Path) -> None:
    expired, revoked = made(file, "ask", days=-1), made(file, "ask")
    keys.revoke(file, "key_1")
    codes = [
        found.code for secret in (expired, revoked, "wrong") if isinstance(found := Keys(file).find(secret), Refused)
    ]
    assert codes == ["expired_api_key", "revoked_api_key", "invalid_api_key"]


def test_unknown_keys_and_damaged_files_are_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        keys.main(["revoke", "key_9"])
    assert "there is no key 'key_9'" in capsys.readouterr().err
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{")
    with pytest.raises(SystemExit):
        keys.main(["list"])
    assert "cannot be read" in capsys.readouterr().err


def test_the_service_follows_the_file(client: TestClient, file: Path) -> None:
    assert asked(client, None).status_code == 200  # nobody has a key yet
    secret = made(file, "ask")
    time.sleep(0.6)
    assert asked(client, None).status_code == 401
    assert asked(client, secret).status_code == 200
    keys.revoke(file, "key_0")
    time.sleep(0.6)
    refused = asked(client, secret)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "revoked_api_key")
    file.unlink()
    time.sleep(0.6)
    assert asked(client, None).status_code == 401  # a file that vanished opens no door


def test_scopes(client: TestClient, file: Path) -> None:
    ask, feedback, admin = (made(file, scope) for scope in ("ask", "feedback", "admin"))
    time.sleep(0.6)
    assert asked(client, ask).status_code == 200
    assert asked(client, feedback).json()["error"]["code"] == "insufficient_scope"
    body = {"answer": "ans_x", "verdict": "right"}
    assert asked(client, ask, "/v1/feedback", **body).status_code == 403
    assert asked(client, feedback, "/v1/feedback", **body).status_code == 404  # may, but there is no such answer
    for path in ("/admin/status", "/metrics", "/admin/audit"):
        assert client.get(path, headers={"x-api-key": ask}).status_code == 403
        assert client.get(path, headers={"x-api-key": admin}).status_code == 200


def test_limits_by_minute_and_day(client: TestClient, file: Path) -> None:
    few, daily = made(file, "ask", per_minute=2), made(file, "ask", per_day=2)
    time.sleep(0.6)
    first = asked(client, few)
    assert (first.status_code, first.headers["x-ratelimit-limit-requests"]) == (200, "2")
    assert asked(client, few).headers["x-ratelimit-remaining-requests"] == "0"
    refused = asked(client, few)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 0 < int(refused.headers["retry-after"]) <= 30
    assert [asked(client, daily).status_code for _ in range(3)] == [200, 200, 429]
    assert asked(client, daily).json()["error"]["code"] == "quota_exceeded"


def test_a_profile_says_which_skills(client: TestClient, file: Path) -> None:
    other = made(file, "ask", profile={"skills": ["tag"]})
    time.sleep(0.6)
    refused = asked(client, other)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "skill_not_allowed")


def test_nobody_reads_anothers_answer_or_conversation(client: TestClient, file: Path) -> None:
    mine, other, admin = made(file, "ask", "feedback"), made(file, "ask", "feedback"), made(file, "ask", "admin")
    time.sleep(0.6)
    messages = [{"role": "user", "content": "what color is the shape?"}]
    body = client.post(
        "/v1/chat/completions", json={"messages": messages, "conversation": "c1"}, headers={"x-api-key": mine}
    ).json()
    for path in (f"/v1/answers/{body['id']}", "/v1/conversations/c1"):
        assert client.get(path, headers={"x-api-key": mine}).status_code == 200
        missing = client.get(path.replace("c1", "c2").replace(body["id"], "ans_0"), headers={"x-api-key": other})
        theirs = client.get(path, headers={"x-api-key": other})
        assert theirs.status_code == missing.status_code == 404
        assert client.delete(path, headers={"x-api-key": other}).status_code == 404
    assert client.get(f"/v1/answers/{body['id']}", headers={"x-api-key": admin}).status_code == 200
    told = asked(client, other, "/v1/feedback", answer=body["id"], verdict="wrong")
    assert told.status_code == 404
    continued = client.post(
        "/v1/chat/completions", json={"messages": messages, "conversation": "c1"}, headers={"x-api-key": other}
    )
    assert continued.status_code == 404
    assert json.dumps(continued.json()).count("color") == 0
