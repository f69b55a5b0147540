"""A spoken conversation over a WebSocket: sound in as it is spoken, text and sound out when the speaker pauses.

The client sends text frames with JSON and binary frames with sound (PCM, 16 bits, little-endian, mono):

    {"type": "start", "sample_rate_hz": 16000, "conversation": "c-1", "task": null, "speak": true, "text": null}
    binary, binary, ...                         sound, in pieces of any size
    {"type": "commit"}                          the turn is over, without waiting for a pause
    {"type": "image", "data": BASE64}           a picture for the turn that is being spoken

The service sends:

    {"type": "listening"}  {"type": "speech_started"}  {"type": "speech_ended", "seconds": 1.4}
    {"type": "answer", "text": ..., "id": ..., "mmagent": {...}, "after_ms": 31.0}     ms since the end was detected
    {"type": "audio", "sample_rate_hz": 24000}, then binary frames of PCM, then {"type": "audio_end"}
    {"type": "error", "error": {...}}           the turn failed; the next may be spoken
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soundfile
from fastapi import WebSocket
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from serve import spoken
from serve.completions import extension_of
from serve.errors import ApiError, detail_of
from serve.ids import new_id
from serve.keys import Key
from serve.questions import ChatRequest
from serve.service import Service

_FRAME_S = 0.02
_PAUSE_S = 0.22  # of silence that ends a turn
_SPEECH_S = 0.08  # of sound that begins one
_LEAD_S = 0.2  # kept from before it
_MARGIN_DB = 9.0  # above the noise
_FLOOR_DB = -55.0  # of full scale: what is below is silence, however quiet the room
_PIECE_BYTES = 16_384


class Start(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str = "start"
    sample_rate_hz: int = Field(16_000, ge=8_000, le=48_000)
    conversation: str | None = Field(None, max_length=128)
    task: str | None = None
    text: str | None = Field(None, max_length=10_000, description="words that go with every turn")
    speak: bool = True
    voice: str | None = Field(None, max_length=60)


@dataclass
class Ear:
    """Tells when speech begins and ends: louder than the noise by a margin, the noise being what is quiet for long.

    Args:
        rate_hz: of the sound.
        max_s: of one turn; a longer one is ended.
    """

    rate_hz: int
    max_s: float
    speaking: bool = False
    _left: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    _turn: list[np.ndarray] = field(default_factory=list)
    _ended: deque[np.ndarray] = field(default_factory=deque)
    _noise_db: float = -50.0
    _loud: int = 0
    _quiet: int = 0

    def hear(self, samples: np.ndarray) -> list[str]:
        """What these samples (n,) int16 change: ``started``, ``ended``."""
        size = int(self.rate_hz * _FRAME_S)
        samples = np.concatenate([self._left, samples])
        events = []
        for at in range(0, len(samples) - size + 1, size):
            if (event := self._frame(samples[at : at + size])) is not None:
                events.append(event)
        self._left = samples[len(samples) - len(samples) % size :]
        return events

    def end(self) -> None:
        """Ends the turn, and begins the next."""
        self._ended.append(np.concatenate(self._turn) if self._turn else np.zeros(0, np.int16))
        self._turn, self.speaking, self._loud, self._quiet = [], False, 0, 0

    def take(self) -> np.ndarray:
        """The samples of the oldest turn that ended."""
        return self._ended.popleft()

    def _frame(self, frame: np.ndarray) -> str | None:
        level = np.sqrt(np.mean(np.square(frame.astype(np.float32) / 32768)) + 1e-10)
        level_db = float(20 * np.log10(level))
        loud = level_db > max(self._noise_db + _MARGIN_DB, _FLOOR_DB)
        if not loud:  # noise is followed slowly; speech does not raise it
            self._noise_db += 0.05 * (max(level_db, -90.0) - self._noise_db)
        self._turn.append(frame)
        self._loud, self._quiet = (self._loud + 1, 0) if loud else (0, self._quiet + 1)
        if not self.speaking:
            if self._loud * _FRAME_S >= _SPEECH_S:
                self.speaking = True
                return "started"
            keep = int((_LEAD_S + _SPEECH_S) / _FRAME_S)
            del self._turn[:-keep]
            return None
        if self._quiet * _FRAME_S >= _PAUSE_S or len(self._turn) * _FRAME_S >= self.max_s:
            self.end()
            return "ended"
        return None


async def talk(socket: WebSocket, service: Service, key: Key) -> None:
    """One connection, turn after turn."""
    protocols = [each for each in socket.scope.get("subprotocols", []) if not each.startswith("mmagent-key.")]
    await socket.accept(subprotocol=protocols[0] if protocols else None)
    try:
        start = await _started(socket)
        if start is None:
            return
        limits = service.predictor.limits
        ear = Ear(start.sample_rate_hz, min(limits.max_audio_s - 1, 60.0))
        images: list[str] = []
        await socket.send_json({"type": "listening"})
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            events = await _events(socket, ear, images, message)
            for event in events:
                if event == "started":
                    await socket.send_json({"type": "speech_started"})
                elif event == "ended":
                    sound, pictures = ear.take(), [*images]
                    images.clear()
                    await _answer(socket, service, key, start, sound, pictures)
    except WebSocketDisconnect:
        return


async def _started(socket: WebSocket) -> Start | None:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        return None
    try:
        return Start.model_validate_json(message.get("text") or "")
    except ValidationError as error:
        reason = f"the first frame must be a start: {error.errors()[0]['msg']}"
        await socket.send_json({"type": "error", "error": detail_of(ApiError(422, reason, code="invalid_value"))})
        await socket.close(1003)
        return None


async def _events(socket: WebSocket, ear: Ear, images: list[str], message: Mapping[str, Any]) -> list[str]:
    data = message.get("bytes")
    if data is not None:
        return ear.hear(np.frombuffer(data[: len(data) // 2 * 2], "<i2"))
    try:
        found = json.loads(message.get("text") or "")
        kind = found["type"]
        if kind == "commit":
            ear.end()
            return ["ended"]
        if kind == "image" and isinstance(found["data"], str):
            images.append(found["data"])
            return []
        reason = f"frames of the type {kind!r:.40} are not known; image and commit are"
    except (ValueError, KeyError, TypeError):
        reason = "a text frame must be a JSON object with a type"
    await socket.send_json({"type": "error", "error": detail_of(ApiError(422, reason, code="invalid_value"))})
    return []


async def _answer(
    socket: WebSocket, service: Service, key: Key, start: Start, sound: np.ndarray, images: list[str]
) -> None:
    ended = time.perf_counter()
    await socket.send_json({"type": "speech_ended", "seconds": round(len(sound) / start.sample_rate_hz, 3)})
    try:
        if not len(sound):
            raise ApiError(422, "there is no sound in this turn", code="invalid_media")
        answered = await service.ask(_question(start, sound, images), key, new_id("req"))
        after_ms = round(1000 * (time.perf_counter() - ended), 1)
        extension = extension_of(service, answered).model_dump()
        told = {"type": "answer", "text": answered.words, "id": answered.id, "mmagent": extension, "after_ms": after_ms}
        await socket.send_json(told)
        if start.speak and answered.words:
            voice = spoken.voice_of(start.voice, key.profile, service.config.voice)
            data = await spoken.speak(answered.words, voice=voice, format="pcm")
            await socket.send_json({"type": "audio", "sample_rate_hz": 24_000})
            for at in range(0, len(data), _PIECE_BYTES):
                await socket.send_bytes(data[at : at + _PIECE_BYTES])
            await socket.send_json({"type": "audio_end"})
    except ApiError as error:
        await socket.send_json({"type": "error", "error": detail_of(error)})
    await socket.send_json({"type": "listening"})


def _question(start: Start, sound: np.ndarray, images: list[str]) -> ChatRequest:
    out = io.BytesIO()
    soundfile.write(out, sound, start.sample_rate_hz, format="WAV", subtype="PCM_16")
    heard = {"data": base64.b64encode(out.getvalue()).decode(), "format": "wav"}
    content: list[dict[str, Any]] = [
        *({"type": "image_url", "image_url": {"url": _uri(image)}} for image in images),
        {"type": "input_audio", "input_audio": heard},
    ]
    if start.text:
        content.append({"type": "text", "text": start.text})
    asked = {"messages": [{"role": "user", "content": content}], "task": start.task, "conversation": start.conversation}
    return ChatRequest.model_validate(asked)


def _uri(image: str) -> str:
    return image if image.startswith("data:") else f"data:image/png;base64,{image}"
