"""A spoken conversation over a WebSocket: where speech begins and ends is heard, and each turn is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from mmagent.predictor import Predictor
from serve import keys
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service
from serve.voice import Ear

RATE_HZ = 16_000


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    return (
        (np.random.default_rng(seed).normal(0, level, int(seconds * RATE_HZ)) * 32767).clip(-32768, 32767).astype("<i2")
    )


def speech(seconds: float) -> np.ndarray:
    """Syllables: a tone that swells five times a second."""
    at = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return (np.sin(2 * np.pi * 220 * at) * (0.15 + 0.15 * np.sin(2 * np.pi * 5 * at)) * 32767).astype("<i2")


@pytest.mark.parametrize("level", [0.0, 0.0005, 0.004])
def test_speech_is_told_from_noise(level: float) -> None:
    ear = Ear(RATE_HZ, 30)
    sound = np.concatenate([noise(1.0, level), speech(1.2), noise(0.6, level, 1), speech(0.7), noise(0.6, level, 2)])
    events: list[tuple[float, str]] = []
    lengths = []
    for at in range(0, len(sound), 517):  # pieces of an odd size
        for event in ear.hear(sound[at : at + 517]):
            events.append((at / RATE_HZ, event))
            if event == "ended":
                lengths.append(len(ear.take()) / RATE_HZ)
    assert [event for _, event in events] == ["started", "ended", "started", "ended"]
    assert [at for at, _ in events] == pytest.approx([1.08, 2.46, 2.88, 3.76], abs=0.2)
    assert lengths == pytest.approx([1.7, 1.2], abs=0.3)


def test_noise_alone_is_no_speech_and_a_monologue_is_cut() -> None:
    assert Ear(RATE_HZ, 30).hear(noise(5, 0.004)) == []
    ear = Ear(RATE_HZ, 2.0)
    assert ear.hear(speech(2.5))[:2] == ["started", "ended"]


@pytest.fixture
def client(tiny_bundle: Path, storage: Path) -> Iterator[TestClient]:
    service = Service(Predictor.load(tiny_bundle), ServeConfig())
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def heard(socket: Any, until: str) -> list[dict[str, Any]]:
    out = []
    while True:
        message = socket.receive()
        if message.get("bytes") is not None:
            out.append({"type": "sound", "bytes": len(message["bytes"])})
            continue
        out.append(json.loads(message["text"]))
        if out[-1]["type"] == until:
            return out


def test_turns(client: TestClient, make_png: Any) -> None:
    pytest.importorskip("espeakng_loader")
    import base64

    with client.websocket_connect("/v1/voice") as socket:
        socket.send_json({"type": "start", "sample_rate_hz": RATE_HZ, "conversation": "spoken", "text": "what is it?"})
        assert socket.receive_json() == {"type": "listening"}
        socket.send_json({"type": "image", "data": base64.b64encode(make_png("red")).decode()})
        for part in np.array_split(np.concatenate([noise(0.4, 0.0005), speech(1.0), noise(0.5, 0.0005)]), 20):
            socket.send_bytes(part.tobytes())
        told = heard(socket, "audio_end")
        kinds = [each["type"] for each in told]
        assert kinds[:4] == ["speech_started", "speech_ended", "answer", "audio"]
        answer = told[2]
        assert answer["mmagent"]["label"] == answer["text"]
        assert answer["after_ms"] < 2000
        assert sum(each["bytes"] for each in told if each["type"] == "sound") > 10_000
        assert heard(socket, "listening")
        socket.send_bytes(speech(0.5).tobytes())
        socket.send_json({"type": "commit"})
        told = heard(socket, "listening")
        assert "answer" in [each["type"] for each in told], told
    kept = client.get("/v1/conversations/spoken").json()["messages"]
    assert [part["type"] for part in kept[0]["content"]] == ["image_url", "input_audio", "text"]
    assert len(kept) == 4


def test_mistakes_end_no_conversation(client: TestClient) -> None:
    with client.websocket_connect("/v1/voice") as socket:
        socket.send_json({"type": "start", "speak": False})
        assert socket.receive_json() == {"type": "listening"}
        for frame in ("{", '{"type": "dance"}', "3"):
            socket.send_text(frame)
            assert socket.receive_json()["type"] == "error"
        socket.send_json({"type": "commit"})
        assert "no sound" in heard(socket, "listening")[-2]["error"]["message"]
        socket.send_bytes(b"\x01")
        socket.send_bytes(speech(0.4).tobytes())
        socket.send_json({"type": "commit"})
        assert "answer" in [each["type"] for each in heard(socket, "listening")]
    with client.websocket_connect("/v1/voice") as socket:
        socket.send_json({"type": "start", "sample_rate_hz": 1})
        assert "greater than or equal" in socket.receive_json()["error"]["message"]
        with pytest.raises(WebSocketDisconnect):
            socket.receive_json()


def test_a_key_is_wanted_here_too(client: TestClient, storage: Path) -> None:
    import time

    key = keys.Key(id="key_1", name="n", hashes={}, scopes=("ask",))
    secret = keys.add(keys.default_file(), key, days=None)
    time.sleep(0.6)
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/voice"):
        pass
    with client.websocket_connect("/v1/voice", subprotocols=["mmagent", f"mmagent-key.{secret}"]) as socket:
        assert socket.accepted_subprotocol == "mmagent"
        socket.send_json({"type": "start"})
        assert socket.receive_json() == {"type": "listening"}
