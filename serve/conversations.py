"""Conversations that the service keeps: a request names one, and brings its new messages alone.

    {"conversation": "c-17", "messages": [{"role": "user", "content": "and this one?"}]}

The first request with a name begins it; it belongs to that request's API key, ends `conversation_hours` after its last
turn, and can be read and deleted. What the model has no room for is left out by a stated rule (`fitted`), not deleted.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serve.config import ServeConfig
from serve.errors import ApiError
from serve.keys import Key
from serve.questions import ChatMessage
from serve.store import NotYoursError, Store

_KIND = "conversation"
_MOST = 2000  # messages
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MEDIA = ("image_url", "input_audio")
_GONE = {"image_url": "[an earlier picture]", "input_audio": "[an earlier recording]"}


class Conversations:
    def __init__(self, store: Store, config: ServeConfig, thread: ThreadPoolExecutor) -> None:
        self._store, self._config, self._thread = store, config, thread
        self._keep_s = config.conversation_hours * 3600

    async def messages(self, id: str, key: Key) -> list[dict[str, Any]]:
        """All messages so far, as they were sent and answered; none of a conversation that is not there.

        Raises:
            ApiError: no name; or another key's, of which nothing is said but that it is not there.
        """
        if not _ID.fullmatch(id):
            message = "conversation is no name: letters, digits, '.', '_' and '-' are wanted, 128 at most"
            raise ApiError(422, message, code="invalid_value", param="conversation")
        held = await self._run(self._store.read, _KIND, id)
        if held is not None and held.owner != key.id:
            raise _absent(id)
        return [json.loads(item) for item in held.items] if held else []

    async def continued(self, id: str, key: Key) -> list[dict[str, Any]]:
        """`messages` of one that is to have more.

        Raises:
            ApiError: it has all that it can have.
        """
        found = await self.messages(id, key)
        if len(found) >= _MOST:
            message = f"the conversation has {len(found)} messages, which is all it can have: begin another"
            raise ApiError(409, message, code="conversation_full", param="conversation")
        return found

    async def add(self, id: str, key: Key, turn: Sequence[dict[str, Any]]) -> None:
        """Keeps a turn: what was sent, and what was answered.

        Raises:
            ApiError: the conversation is too large, or became another key's meanwhile.
        """
        items = [json.dumps(message, ensure_ascii=False).encode() for message in turn]
        try:
            await self._run(self._store.append, _KIND, id, key.id, items, self._keep_s)
        except NotYoursError as error:
            raise _absent(id) from error

    async def existing(self, id: str, key: Key) -> list[dict[str, Any]]:
        """`messages` of one that is there.

        Raises:
            ApiError: it is not.
        """
        if not (found := await self.messages(id, key)):
            raise _absent(id)
        return found

    async def delete(self, id: str, key: Key) -> None:
        """Raises:
        ApiError: there is none.
        """
        await self.existing(id, key)
        await self._run(self._store.delete, _KIND, id)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def fitted(messages: Sequence[ChatMessage], max_media: int, max_messages: int) -> list[ChatMessage]:
    """What of a conversation the model is asked with: the newest messages, beginning with a user's, all system
    messages; of pictures and sounds the newest, words standing where older ones were. What is still too long for the
    model's text loses its oldest words (`mmagent.text.fitted`)."""
    rules = [message for message in messages if message.role in ("system", "developer")]
    rest = [message for message in messages if message.role not in ("system", "developer")]
    recent = rest[-max_messages:]
    while len(recent) > 1 and recent[0].role != "user":
        recent = recent[1:]
    left = max_media
    out: list[ChatMessage] = []
    for message in reversed(recent):
        if isinstance(message.content, list):
            parts: list[Any] = []
            for part in reversed(message.content):
                if part.type in _MEDIA and left == 0:
                    parts.append({"type": "text", "text": _GONE[part.type]})
                    continue
                left -= part.type in _MEDIA
                parts.append(part.model_dump())
            message = ChatMessage.model_validate({**message.model_dump(), "content": parts[::-1]})
        out.append(message)
    return [*rules, *reversed(out)]


def _absent(id: str) -> ApiError:
    return ApiError(404, f"there is no conversation {id!r:.140}", code="conversation_not_found", param="conversation")
