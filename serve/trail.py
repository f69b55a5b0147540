"""The outermost layer: an id for every request, a line in the log, and what operators count."""

from __future__ import annotations

import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import logs
from serve.ids import new_id
from serve.metrics import Metrics

REQUEST_ID = "x-request-id"
_OURS = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Trail:
    """A client's own ``x-request-id`` is kept where it is a short plain word; else one is made."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _OURS.fullmatch(given) else new_id("req")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                for name, value in state.get("headers", {}).items():
                    headers[name] = value
            await send(message)

        try:
            await self.app(scope, receive, marked)
        finally:
            if scope["type"] == "http":
                self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # The pattern of the path, not the path: it may hold an id, and a label for each would be one too many.
        route = getattr(scope.get("route"), "path", "other")
        state = scope["state"]
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        key = state.get("key")
        logs.request(
            request_id=state["request_id"],
            method=scope["method"],
            route=route,
            status=status,  # 0: the client was gone before there was one
            ms=round(1000 * seconds, 1),
            key=key.id if key else None,
            **({"answer": state["answer"]} if "answer" in state else {}),
        )
