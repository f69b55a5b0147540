"""What a request must pass before it is read: the API key and its scope, limits, the body's size, the deadline.

Nobody computes for a client that is gone, or whose deadline has passed: what serves it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import ServeConfig
from serve.errors import ApiError
from serve.keys import ANYONE, Key, Keys, Refused
from serve.keys import Scope as KeyScope
from serve.limits import Limits

_OPEN_PATHS = ("/", "/healthz", "/favicon.ico")
_OPEN_PREFIX = "/web/"  # the page's own files
_SUBPROTOCOL = "mmagent-key."  # browsers cannot set headers of a WebSocket: its protocols carry the key
_READING = ("GET", "HEAD", "OPTIONS")
_DRAIN_S = 2.0
_MAX_HEADER_BYTES = 32_768
_DEADLINE_MS = "x-request-timeout-ms"
_DEADLINE_S = "x-stainless-read-timeout"  # OpenAI's clients say so how long they will wait


class Guard:
    """An ASGI layer in front of the app; raises `ApiError`, which `serve.errors.Shield` around it answers."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys, limits: Limits) -> None:
        self.app, self.config, self.keys, self.limits = app, config, keys, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADER_BYTES:
            message = f"the headers are larger than the limit of {_MAX_HEADER_BYTES} bytes"
            raise ApiError(431, message, code="headers_too_large", headers={"Connection": "close"})
        if path not in _OPEN_PATHS and not path.startswith(_OPEN_PREFIX):
            try:
                self._check_origin(scope, headers)
                self._admit(scope, headers)
            except ApiError:
                if scope["type"] != "websocket":
                    raise
                await send({"type": "websocket.close", "code": 1008})
                return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        await self._served(scope, headers, receive, send)

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Where no key is wanted, any web page that its user's browser shows could ask and act (a browser sends such
        requests, it only keeps their answers from the page): those of other hosts are refused, unless CORS names them.
        """
        origin = headers.get("origin", "").lower()
        if not origin or self.keys.wanted or scope.get("method") in _READING:
            return
        allowed = self.config.allow_origins
        if origin.partition("://")[2] != headers.get("host", "").lower() and not {origin, "*"} & set(allowed):
            message = f"web pages of {origin!r:.100} may not ask here: --allow-origin {origin:.100} lets them"
            raise ApiError(403, message, code="origin_not_allowed")

    def _admit(self, scope: Scope, headers: Headers) -> None:
        key = self._key(headers)
        wanted = _scope_of(scope["path"])
        if not key.may(wanted):
            message = f"this API key may not do that: it lacks the scope {wanted!r}"
            raise ApiError(403, message, code="insufficient_scope")
        state = scope.setdefault("state", {})
        state["key"] = key
        state["headers"] = self.limits.take(key)

    def _key(self, headers: Headers) -> Key:
        if not self.keys.wanted:
            return ANYONE
        scheme, _, token = headers.get("authorization", "").partition(" ")
        secret = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        for protocol in headers.get("sec-websocket-protocol", "").split(","):
            if protocol.strip().startswith(_SUBPROTOCOL):
                secret = protocol.strip().removeprefix(_SUBPROTOCOL)
        how = "send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
        found = self.keys.find(secret) if secret else Refused("invalid_api_key", "an API key is wanted")
        if isinstance(found, Refused):
            raise ApiError(401, f"{found.reason}: {how}", code=found.code, headers={"WWW-Authenticate": "Bearer"})
        return found

    async def _served(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Runs the app until it is done, its client is gone, or its deadline has passed."""
        began = False

        async def noted(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        body = _Body(headers, receive, self.config)
        work = asyncio.ensure_future(self.app(scope, body.receive, noted))
        gone = asyncio.ensure_future(body.pump())
        deadline_s = _deadline_s(headers, self.config.max_seconds)
        try:
            await asyncio.wait({work, gone}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or began:
                await work  # an answer that has begun is sent to its end, or fails where its client is gone
                return
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            if not gone.done():
                message = f"there is no answer within {deadline_s:g} s, the deadline of this request"
                raise ApiError(504, message, code="deadline_exceeded", headers={"Retry-After": "1"})
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


class _Body:
    """A request's body as it comes: refused by its announced length at once, by its true length or for its slowness as
    soon as that is seen. Afterwards it waits for the client to go."""

    def __init__(self, headers: Headers, receive: Receive, config: ServeConfig) -> None:
        self._receive, self._limit, self._timeout_s = receive, config.max_body_bytes, config.body_timeout_s
        self._queue: asyncio.Queue[Message | ApiError] = asyncio.Queue()
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            raise _too_large(self._limit)

    async def receive(self) -> Message:
        found = await self._queue.get()
        if isinstance(found, ApiError):
            raise found
        return found

    async def pump(self) -> None:
        """Takes all there is; returns when the client is gone."""
        seen, whole = 0, False
        end = asyncio.get_running_loop().time() + self._timeout_s
        while True:
            try:
                wait_s = None if whole else max(0.0, end - asyncio.get_running_loop().time())
                message = await asyncio.wait_for(self._receive(), wait_s)
            except TimeoutError:
                text = f"the body did not come within {self._timeout_s:g} s"
                self._queue.put_nowait(ApiError(408, text, code="body_timeout", headers={"Connection": "close"}))
                await asyncio.Event().wait()  # the answer is sent, then this is cancelled
            if message["type"] == "http.disconnect":
                self._queue.put_nowait(message)
                return
            seen += len(message.get("body", b""))
            if seen > self._limit:
                await self._drain(message)
                self._queue.put_nowait(_too_large(self._limit))
                await asyncio.Event().wait()
            whole = not message.get("more_body", False)
            self._queue.put_nowait(message)

    async def _drain(self, message: Message) -> None:
        """Takes a little of what else comes, and drops it: a client that is still sending does not read its answer."""
        seen = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while message.get("more_body", False) and seen < self._limit:
                    message = await self._receive()
                    seen += len(message.get("body", b""))


def _scope_of(path: str) -> KeyScope:
    if path.startswith("/admin") or path == "/metrics":
        return "admin"
    return "feedback" if path.startswith("/v1/feedback") else "ask"


def _deadline_s(headers: Headers, longest_s: float) -> float:
    """What the client says it will wait, `longest_s` at most."""
    for name, unit in ((_DEADLINE_MS, 1000.0), (_DEADLINE_S, 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) / unit if text else 0.0
        except ValueError:
            continue
        if 0 < seconds < longest_s:
            return seconds
    return longest_s


def _too_large(limit: int) -> ApiError:
    message = f"the body is larger than the limit max_body_bytes of {limit} bytes"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
