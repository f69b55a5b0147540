"""Bad weather on a connection: a proxy in this process that delays, stalls and breaks what passes through it.

    with weather.between("10.0.0.9", ("10.0.0.9", 6379), Weather(seed=0)) as port:
        ...

What befalls a connection is drawn from the seed and the connection's number: the same for each that is the n-th.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_PIECE = 16 << 10


@dataclass(frozen=True, slots=True)
class Weather:
    seed: int = 0
    delay_s: tuple[float, float] = (0.0, 0.05)  # of each piece
    stall: float = 0.02  # share of pieces that wait for `stall_s`
    stall_s: float = 1.0
    broken: float = 0.3  # share of connections that are reset
    broken_after: tuple[int, int] = (1, 40)  # pieces


@dataclass(slots=True)
class Seen:
    """What the weather did."""

    port: int = 0
    connections: int = 0
    broken: int = 0
    stalled: int = 0


@contextlib.contextmanager
def between(host: str, target: tuple[str, int], weather: Weather) -> Iterator[Seen]:
    """A proxy that listens on a free port of `host` for as long as the block lasts."""
    seen, ready, stop = Seen(), threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        server = await asyncio.start_server(
            lambda reader, writer: _connection(reader, writer, target, weather, seen), host, 0
        )
        seen.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()  # connections that are open are cancelled with the loop
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True, name="weather")
    thread.start()
    if not ready.wait(10):
        raise RuntimeError(f"the proxy does not listen on {host}")
    try:
        yield seen
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)


async def _connection(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int], weather: Weather, seen: Seen
) -> None:
    number, seen.connections = seen.connections, seen.connections + 1
    rng = random.Random(f"{weather.seed}/{number}")
    left = rng.randint(*weather.broken_after) if rng.random() < weather.broken else None
    try:
        there, back = await asyncio.open_connection(*target)
    except OSError:
        writer.transport.abort()
        return
    pieces = 0

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        nonlocal pieces
        while data := await source.read(_PIECE):
            pieces += 1
            if left is not None and pieces > left:
                seen.broken += 1
                raise ConnectionResetError
            stalled = rng.random() < weather.stall
            seen.stalled += stalled
            await asyncio.sleep(weather.stall_s if stalled else rng.uniform(*weather.delay_s))
            sink.write(data)
            await sink.drain()
        sink.write_eof()

    with contextlib.suppress(OSError):
        try:
            await asyncio.gather(carry(reader, back), carry(there, writer))
        finally:
            for end in (writer, back):
                end.transport.abort()
