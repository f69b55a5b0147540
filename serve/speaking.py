"""The routes that speak and listen: OpenAI's text to speech, and voice turns over a WebSocket (`serve.voice`)."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket

from serve import spoken, voice
from serve.asking import ERRORS, key_of
from serve.keys import ANYONE
from serve.questions import SpeechRequest
from serve.service import Service

_SOUND: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the sound, in the format that was asked for",
        "content": {each: {"schema": {"type": "string", "format": "binary"}} for each in spoken.MEDIA_TYPES.values()},
    }
}


def add(app: FastAPI, service: Service) -> None:
    @app.post("/v1/audio/speech", responses=ERRORS | _SOUND, response_class=Response, tags=["speech"])
    async def speech(body: SpeechRequest, request: Request) -> Response:
        """A text as sound."""
        chosen = spoken.voice_of(body.voice, key_of(request).profile, service.config.voice)
        data = await spoken.speak(body.input, voice=chosen, format=body.response_format, speed=body.speed)
        return Response(data, media_type=spoken.MEDIA_TYPES[body.response_format])

    @app.websocket("/v1/voice")
    async def talk(socket: WebSocket) -> None:
        key = socket.scope.get("state", {}).get("key", ANYONE)
        await voice.talk(socket, service, key)
