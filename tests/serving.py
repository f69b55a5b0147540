"""A real HTTP server around a service, for tests that need one: official clients, browsers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import uvicorn

from serve.app import build
from serve.service import Service


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """Its address on the loopback, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    config = uvicorn.Config(build(service), "127.0.0.1", port, log_level="warning", ws="websockets-sansio")
    server = uvicorn.Server(config)

    async def live() -> None:
        await asyncio.gather(server.serve(), service.warm_up())

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    while httpx.get(f"{address}/healthz").status_code != 200 and time.monotonic() < end:
        time.sleep(0.05)
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()
