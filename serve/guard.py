"""What a request must pass before it is read: the API key, and the limit of its body."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import ServeConfig
from serve.errors import ApiError

OPEN_PATHS = ("/healthz",)


class Guard:
    """An ASGI layer in front of the app; raises `ApiError`, which `serve.errors.Shield` around it answers."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers)
        await self.app(scope, self._limited(headers, receive), send)

    def _check_key(self, headers: Headers) -> None:
        if not self.config.key_hashes:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if key and self.config.knows(key):
            return
        what = "the API key is wrong" if key else "an API key is wanted"
        message = f"{what}: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """A body is refused by its announced length at once, by its true length as soon as it is over."""
        limit = self.config.max_body_bytes
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise _too_large(limit)
            return message

        return counted


def _too_large(limit: int) -> ApiError:
    message = f"the body is larger than the limit max_body_bytes of {limit} bytes"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
