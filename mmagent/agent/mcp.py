"""Tools of MCP servers (Model Context Protocol), by the official client: a command that is started, or an address.

Those are taken that the operator allows by name; what a server says of itself is no instruction. The connection stays
open while the service runs, and is made anew where it broke.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmagent.agent.tools import Tool, ToolError

_CONNECT_TIMEOUT_S = 20.0


class Server:
    """
    Args:
        command: what starts a server that speaks over its standard input and output; or none.
        url: of a server over HTTP; or none.
        environment: names of variables that a started server is given, beside PATH.
    """

    def __init__(self, command: Sequence[str] | None, url: str | None, environment: Sequence[str]) -> None:
        self._command, self._url, self._environment = command, url, environment
        self._work: asyncio.Queue[tuple[str, dict[str, Any], asyncio.Future[Any]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Any] | None = None

    async def tools(self, allow: Sequence[str], timeout_s: float, max_bytes: int) -> list[Tool]:
        """
        Raises:
            ToolError: the server does not start or answer, or lacks a tool that is allowed.
        """
        offered = {tool.name: tool for tool in await self._connected()}
        if missing := [name for name in allow if name not in offered]:
            there = ", ".join(sorted(offered)) or "none"
            raise ToolError(f"the MCP server {self.name} has no tool {missing[0]!r}; it has: {there}")
        out = []
        for name in allow:
            schema = getattr(offered[name], "input_schema", None) or getattr(offered[name], "inputSchema", {})
            words = offered[name].description or name
            out.append(Tool(name, words, schema or {"type": "object"}, self._caller(name), timeout_s, max_bytes))
        return out

    @property
    def name(self) -> str:
        return self._url or " ".join(self._command or ())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._task

    def _caller(self, name: str) -> Any:
        async def call(arguments: dict[str, Any]) -> Any:
            await self._connected()
            done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._work.put_nowait((name, arguments, done))
            return _value(name, await done)

        return call

    async def _connected(self) -> Sequence[Any]:
        """The tools of the server, connected to where it is not."""
        if self._task is None or self._task.done():
            self._ready = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._stay(self._ready))
        assert self._ready is not None
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), _CONNECT_TIMEOUT_S)
        except TimeoutError as error:
            self._task.cancel()
            raise ToolError(f"the MCP server {self.name} did not answer within {_CONNECT_TIMEOUT_S:g} s") from error

    async def _stay(self, ready: asyncio.Future[Any]) -> None:
        """One connection's life, in one task: the protocol's own scopes may not be left in another."""
        from mcp import Client

        pending: set[asyncio.Task[None]] = set()
        try:
            async with Client(self._server()) as client:
                ready.set_result((await client.list_tools()).tools)
                while True:
                    name, arguments, done = await self._work.get()
                    task = asyncio.create_task(_answer(client, name, arguments, done))
                    pending.add(task)
                    task.add_done_callback(pending.discard)
        except Exception as error:
            if ready.done():
                raise
            reason = _first_words(error)
            ready.set_exception(ToolError(f"the MCP server {self.name} cannot be reached: {reason}"))

    def _server(self) -> Any:
        from mcp import StdioServerParameters

        if self._url:
            return self._url
        assert self._command
        given = {key: os.environ[key] for key in ("PATH", *self._environment) if key in os.environ}
        return StdioServerParameters(command=self._command[0], args=list(self._command[1:]), env=given)


async def _answer(client: Any, name: str, arguments: Mapping[str, Any], done: asyncio.Future[Any]) -> None:
    try:
        found = await client.call_tool(name, dict(arguments))
    except Exception as error:  # noqa: BLE001  belongs to who called
        if not done.done():
            done.set_exception(ToolError(f"{name}: {_first_words(error)}"))
        return
    if not done.done():
        done.set_result(found)


def _value(name: str, result: Any) -> Any:
    """What a result says, structured where it is."""
    texts = [part.text for part in result.content if getattr(part, "type", "") == "text"]
    failed = getattr(result, "is_error", None) or getattr(result, "isError", None)
    if failed:
        raise ToolError(f"{name}: {' '.join(texts)[:300] or 'failed'}")
    structured = getattr(result, "structured_content", None) or getattr(result, "structuredContent", None)
    if structured is not None:
        return structured["result"] if set(structured) == {"result"} else structured
    return texts[0] if len(texts) == 1 else texts


def _first_words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return (str(error) or type(error).__name__).splitlines()[0][:300]
