"""Asks a running service the question of a record, as any HTTP client would: in OpenAI's chat form."""

from __future__ import annotations

import base64
import json
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmagent import media
from mmagent.media import Limits
from mmagent.record import Media, Record

TIMEOUT_S = 60.0
_AUDIO_FORMATS = {"WAV": "wav", "FLAC": "flac"}


class ServiceError(RuntimeError):
    """The service refused, failed or does not answer; the message is its own where it spoke."""


@dataclass(frozen=True)
class Reply:
    """An answer as it came over HTTP."""

    id: str
    answer: Mapping[str, Any]  # the "mmagent" object
    ms: float  # from the first byte sent to the last one read


def question(record: Record, model: str) -> dict[str, Any]:
    """The body of ``POST /v1/chat/completions`` that asks a bundle what the record asks, parts in its order."""
    images, audios = iter(record.images), iter(record.audios)
    content: list[dict[str, Any]] = []
    for kind, text in record.segments():
        if kind == "image":
            content.append({"type": "image_url", "image_url": {"url": _data_uri(next(images))}})
        elif kind == "audio":
            content.append({"type": "input_audio", "input_audio": _audio(next(audios))})
        elif text.strip():
            content.append({"type": "text", "text": text.strip()})
    return {"model": model, "task": record.task, "messages": [{"role": "user", "content": content}]}


def ask(address: str, body: Mapping[str, Any]) -> Reply:
    """Sends a question.

    Raises:
        ServiceError: no answer, or an error in its place.
    """
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            raw = response.read()
    except urllib.error.HTTPError as error:
        raise ServiceError(f"{address} answers {error.code}: {_words(error.read())}") from error
    except OSError as error:
        raise ServiceError(f"{address} does not answer: {error}") from error
    ms = (time.perf_counter() - start) * 1000
    reply = json.loads(raw)
    if "mmagent" not in reply:
        raise ServiceError(f"{address} is no service of mmagent: its answer has {sorted(reply)}")
    return Reply(reply["id"], reply["mmagent"], ms)


def curl(address: str, body: Mapping[str, Any]) -> str:
    """The shell command that asks the same."""
    data = shlex.quote(json.dumps(body))
    return f"curl -s {address}/v1/chat/completions -H 'Content-Type: application/json' -d {data}"


def _data_uri(image: Media) -> str:
    data = image.read()
    kind = media.check_image(data, Limits()).format.lower()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _audio(sound: Media) -> dict[str, str]:
    data = sound.read()
    kind = media.check_audio(data, Limits()).format
    if kind not in _AUDIO_FORMATS:
        raise ServiceError(f"the sound is {kind}; the chat form takes {', '.join(_AUDIO_FORMATS)}")
    return {"data": base64.b64encode(data).decode(), "format": _AUDIO_FORMATS[kind]}


def _words(raw: bytes) -> str:
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return raw[:500].decode(errors="replace")
