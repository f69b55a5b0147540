"""Tools of MCP servers (Model Context Protocol), by the official client: a command that is started, or an address.

Those are taken that the operator allows by name; what a server says of itself is no instruction. The connection stays
open while the service runs, and is made anew where it broke: the call that met the broken one fails, for it may have
been done, but for one that the server never saw because it forgot the session. An answer over HTTP is read up to a
limit, whatever it is; proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from mmagent.agent.tools import Tool, ToolError

_CONNECT_TIMEOUT_S = 20.0
_AROUND_BYTES = 65_536  # of an answer, beside twice what a tool may say: it says it as text and as data
_FORGOTTEN = "Session terminated"  # what the client calls a session that the server does not know (mcp 2.3)


_Call = tuple[str, dict[str, Any], "asyncio.Future[Any]"]  # tool, arguments, what comes of it


class Server:
    """
    Args:
        command: what starts a server that speaks over its standard input and output; or none.
        url: of a server over HTTP; or none.
        environment: names of variables that a started server is given, beside PATH.
    """

    def __init__(self, command: Sequence[str] | None, url: str | None, environment: Sequence[str]) -> None:
        self._command, self._url, self._environment = command, url, environment
        self._work: asyncio.Queue[_Call | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Any] | None = None
        self._max_bytes = 0

    async def tools(self, allow: Sequence[str], timeout_s: float, max_bytes: int) -> list[Tool]:
        """
        Raises:
            ToolError: the server does not start or answer, or lacks a tool that is allowed.
        """
        self._max_bytes = max(self._max_bytes, 2 * max_bytes + _AROUND_BYTES)
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
            try:
                return _value(name, await self._called(name, arguments))
            except _ForgottenError:
                return _value(name, await self._called(name, arguments))

        return call

    async def _called(self, name: str, arguments: dict[str, Any]) -> Any:
        await self._connected()
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._work.put_nowait((name, arguments, done))
        return await done

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
        work: asyncio.Queue[Any] = asyncio.Queue()
        self._work = work  # calls are made of the connection that they were given to
        try:
            async with self._transport() as transport, Client(transport) as client:
                ready.set_result((await client.list_tools()).tools)
                while (call := await work.get()) is not None:
                    task = asyncio.create_task(_answer(client, call, work))
                    # Who gave up waiting is told nothing, and the server that nobody waits.
                    call[2].add_done_callback(lambda done, task=task: task.cancel() if done.cancelled() else None)
                    pending.add(task)
                    task.add_done_callback(pending.discard)
        except Exception as error:  # noqa: BLE001  belongs to who waits for this connection
            told = ToolError(f"the MCP server {self.name} cannot be reached: {_first_words(error)}")
            if not ready.done():
                ready.set_exception(told)
        finally:
            for task in pending:
                task.cancel()
            lost = [call for call in (work.get_nowait() for _ in range(work.qsize())) if call is not None]
            for _, _, done in lost:
                if not done.done():
                    done.set_exception(ToolError(f"the MCP server {self.name} is gone"))

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        from mcp import StdioServerParameters

        if not self._url:
            assert self._command
            given = {key: os.environ[key] for key in ("PATH", *self._environment) if key in os.environ}
            yield StdioServerParameters(command=self._command[0], args=list(self._command[1:]), env=given)
            return
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        timeout = httpx2.Timeout(_CONNECT_TIMEOUT_S, read=None)  # each call has its own
        transport = _limited(httpx2, self._max_bytes + _AROUND_BYTES)  # events have a limit of their own
        async with httpx2.AsyncClient(timeout=timeout, transport=transport, trust_env=False) as client:
            yield streamable_http_client(self._url, http_client=client, max_sse_event_size=self._max_bytes)


class _ForgottenError(ToolError):
    """A call that the server did not take, for it does not know the session."""


async def _answer(client: Any, call: _Call, work: asyncio.Queue[_Call | None]) -> None:
    name, arguments, done = call
    try:
        found = await client.call_tool(name, dict(arguments))
    except asyncio.CancelledError:
        if not done.done():
            done.set_exception(ToolError(f"{name}: the connection to its MCP server broke"))
        raise
    except Exception as error:  # noqa: BLE001  belongs to who called
        words = _first_words(error)
        if _is_lost(error):
            work.put_nowait(None)  # the next call makes a connection anew
        if not done.done():
            done.set_exception((_ForgottenError if words == _FORGOTTEN else ToolError)(f"{name}: {words}"))
        return
    if not done.done():
        done.set_result(found)


def _is_lost(error: Exception) -> bool:
    """Whether a connection is of no further use."""
    from mcp.shared.exceptions import MCPError
    from mcp_types import CONNECTION_CLOSED

    return not isinstance(error, MCPError) or error.code == CONNECTION_CLOSED or error.message == _FORGOTTEN


def _limited(httpx2: Any, most: int) -> Any:
    """HTTP of which no single answer to a call is read beyond so many bytes."""

    class Stream(httpx2.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            seen = 0
            async for part in self._stream:
                seen += len(part)
                if seen > most:
                    raise httpx2.StreamError(f"the answer is larger than the limit of {most} bytes")
                yield part

        async def aclose(self) -> None:
            await self._stream.aclose()

    class Transport(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: Any) -> Any:
            answer = await super().handle_async_request(request)
            if request.method == "POST":
                answer.stream = Stream(answer.stream)
            return answer

    return Transport()


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
