"""A load: so many clients that each ask, wait for the answer, and ask again, over connections that stay open.

    python -m tests.bench.load ADDRESS BODIES.json CLIENTS SECONDS [RATE]

A process of its own; prints one JSON object: latencies of all answers, statuses, the names of bundles that answered,
and the share of a core that it took itself. With a RATE requests begin at that many a second, whoever still waits.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Load:
    """What a load saw."""

    seconds: float
    latencies_ms: np.ndarray  # of answers with status 200
    statuses: dict[str, int]  # "0": the connection broke
    bundles: dict[str, int]
    mixed: int  # answers that two bundles share
    own_cpu: float  # of a core

    @property
    def per_s(self) -> float:
        return len(self.latencies_ms) / self.seconds

    def at(self, percentile: float) -> float:
        return float(np.percentile(self.latencies_ms, percentile)) if len(self.latencies_ms) else float("inf")

    @property
    def lost(self) -> int:
        """Requests that got neither an answer nor the advice to try again."""
        return sum(count for status, count in self.statuses.items() if status not in ("200", "429", "503"))


def begin(
    address: str,
    bodies: list[dict[str, Any]],
    clients: int,
    seconds: float,
    rate: float = 0.0,
    path: str = "/v1/predict",
) -> Running:
    """Starts a load in a process of its own."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump({"path": path, "bodies": bodies}, file)
    command = [sys.executable, "-m", "tests.bench.load", address, file.name, str(clients), str(seconds), str(rate)]
    return Running(subprocess.Popen(command, stdout=subprocess.PIPE, text=True), Path(file.name))


@dataclass
class Running:
    process: subprocess.Popen[str]
    file: Path

    def end(self) -> Load:
        out, _ = self.process.communicate()
        self.file.unlink()
        found = json.loads(out)
        return Load(latencies_ms=np.array(found.pop("latencies_ms")), **found)


def run(address: str, bodies: list[dict[str, Any]], clients: int, seconds: float, **more: Any) -> Load:
    return begin(address, bodies, clients, seconds, **more).end()


async def _client(host: str, port: int, turns: Callable[[], Awaitable[bytes | None]], seen: _Seen, end: float) -> None:
    reader = writer = None
    while time.perf_counter() < end:
        request = await turns()
        if request is None:
            break
        started = time.perf_counter()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection(host, port)
            assert reader is not None
            writer.write(request)
            status, body, closes = await asyncio.wait_for(_answer(reader), 60)
        except (OSError, asyncio.IncompleteReadError, ValueError, TimeoutError):
            seen.statuses["0"] += 1
            writer = None
            continue
        seen.statuses[str(status)] += 1
        if status == 200:
            seen.latencies.append(1000 * (time.perf_counter() - started))
            seen.note(body)
        if closes:
            writer = None
        if status in (429, 503):
            await asyncio.sleep(0.2)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split(b" ", 2)[1])
    if b"content-length:" in head:
        size = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(size)
    else:
        body = b""
        while (size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)) > 0:
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    return status, body, b"connection: close" in head


class _Seen:
    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.bundles: Counter[str] = Counter()
        self.mixed = 0

    def note(self, body: bytes) -> None:
        """Which bundle an answer names, where it names one."""
        at = body.rfind(b'"bundle":"')
        if at < 0:
            return
        name = body[at + 10 : body.index(b'"', at + 10)]
        self.bundles[name.decode()] += 1
        model = body.find(b'"model":"')
        self.mixed += model >= 0 and not body[model + 9 :].startswith(name + b'"')


async def _main(address: str, file: str, clients: int, seconds: float, rate: float) -> None:
    host, port = address.removeprefix("http://").split(":")
    given = json.loads(Path(file).read_text())
    requests = []
    for body in given["bodies"]:
        data = json.dumps(body).encode()
        head = f"POST {given['path']} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        requests.append(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    seen, number = _Seen(), 0
    end = time.perf_counter() + seconds
    begun = time.perf_counter()

    async def turns() -> bytes | None:
        nonlocal number
        mine, number = number, number + 1
        if rate:
            wait = begun + mine / rate - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if time.perf_counter() >= end:
                return None
        return requests[mine % len(requests)]

    await asyncio.gather(*(_client(host, int(port), turns, seen, end) for _ in range(clients)))
    took = time.perf_counter() - begun
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "seconds": took,
                "latencies_ms": [round(each, 3) for each in seen.latencies],
                "statuses": dict(seen.statuses),
                "bundles": dict(seen.bundles),
                "mixed": seen.mixed,
                "own_cpu": (usage.ru_utime + usage.ru_stime) / took,
            }
        )
    )


if __name__ == "__main__":
    _, where, bodies_file, count, long, *more = sys.argv
    asyncio.run(_main(where, bodies_file, int(count), float(long), float(more[0]) if more else 0.0))
