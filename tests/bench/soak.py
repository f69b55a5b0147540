"""Whether the service's memory stays what it is: ten minutes of steady mixed load.

    make bench-soak             (python -m tests.bench.soak [--bundle demo] [--minutes 10] [--per-second 8])

Questions with pictures and sounds, all different; conversations, streams, predictions of several, evidence, embeddings,
traces, feedback, and requests that are refused. Meanwhile the resident memory of the replica, the proxy and Serve's
controller is read every few seconds; the slope is the least squares' line through what comes after the warm-up, in
which caches fill. SCALE=small for a short one.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import soundfile
from PIL import Image

from jobs import cluster
from mmagent import bundle as bundles
from mmagent.arguments import Parser
from mmagent.measurement import Row, publish, table
from tests.bench import rays, serve

SMALL = os.environ.get("SCALE") == "small"
MINUTES = 0.4 if SMALL else 10.0
WARM_SHARE = 0.2  # of the time, in which caches fill
LOOK_S = 1.0 if SMALL else 5.0
CLIENTS = 8
CACHE_MB = 1  # full before the warm-up ends, also where what is kept of a question are some kilobytes
GOAL = "" if SMALL else "<= 1"  # MB/min; seconds tell no slope
# Each of a kind does so much of the load; what follows an answer (trace, feedback) is among it.
KINDS = {
    "predict": 6, "chat": 4, "conversation": 3, "stream": 3, "several": 1, "explain": 1, "trace": 2, "feedback": 2,
    "embeddings": 1, "refused": 2,
}  # fmt: skip


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.soak", __doc__)
    parser.add_argument("--bundle", default="demo", help="what is served (%(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--per-second", type=float, default=8.0, help="requests (%(default)s)")
    args = parser.parse_args(argv)
    folder = bundles.load(args.bundle).path
    flags = ("--cache-mb", str(CACHE_MB), "--keep", "all", "--max-waiting", "64")
    with rays.borrowed(), serve.served(folder, *flags) as address:
        watched = {
            "replica": serve.replica_pid(address),
            "proxy": serve.proxy_pid(address),
            "controller": serve.controller_pid(address),
        }
        sizes, load = asyncio.run(_soak(address, watched, 60 * args.minutes, args.per_second))
    found = [_row(name, sizes[name], load, args.minutes) for name in watched]
    known = ", ".join(f"{kind} {count}" for kind, count in sorted(load.answered.items()))
    found.append(Row("soak.lost", float(sum(load.wrong.values())), "count", f"beside {known}", "<= 0"))
    publish("soak", found, checkout)
    print(table(found))
    if load.wrong:
        print(f"lost: {dict(load.wrong)}", file=sys.stderr)
    return 0


Sizes = list[tuple[float, float]]  # minutes since the beginning, MB


def slope(sizes: Sizes) -> float:
    """MB a minute of the line through what comes after the warm-up."""
    end = sizes[-1][0]
    late = [(at, size) for at, size in sizes if at >= WARM_SHARE * end]
    return float(np.polyfit([at for at, _ in late], [size for _, size in late], 1)[0])


def _row(name: str, sizes: Sizes, load: _Load, minutes: float) -> Row:
    rate = sum(load.answered.values()) / (60 * minutes)
    what = (
        f"resident memory of the {name} under {rate:.0f} requests/s of all kinds over {minutes:g} min, from "
        f"{sizes[0][1]:.0f} to {sizes[-1][1]:.0f} MB"
    )
    return Row(f"soak.{name}_mb_per_min", slope(sizes), "MB/min", what, GOAL)


async def _soak(address: str, watched: dict[str, int], seconds: float, per_s: float) -> tuple[dict[str, Sizes], _Load]:
    processes = {name: psutil.Process(pid) for name, pid in watched.items()}
    sizes: dict[str, Sizes] = {name: [] for name in watched}
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        load = _Load(client)
        turns = load.turns()
        numbers = itertools.count()

        async def ask() -> None:
            while True:
                number = next(numbers)
                await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))
                if time.monotonic() - began > seconds:
                    return
                await load.ask(next(turns), number)

        async def look() -> None:
            while time.monotonic() - began < seconds:
                for name, process in processes.items():
                    sizes[name].append(((time.monotonic() - began) / 60, process.memory_info().rss / 2**20))
                await asyncio.sleep(LOOK_S)

        await asyncio.gather(look(), *(ask() for _ in range(CLIENTS)))
    return sizes, load


@dataclass
class _Load:
    """Asks every kind of question; every one is different."""

    client: httpx.AsyncClient
    answered: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    last: str = ""  # the id of an answer

    def turns(self) -> Any:
        mixed = [kind for kind, share in KINDS.items() for _ in range(share)]
        return itertools.cycle(np.random.default_rng(0).permutation(mixed).tolist())

    async def ask(self, kind: str, number: int) -> None:
        if kind in ("trace", "feedback") and not self.last:
            return
        how: Callable[[int], Awaitable[httpx.Response]] = getattr(self, f"_{kind}")
        try:
            answer = await how(number)
        except httpx.HTTPError as error:
            self.wrong[f"{kind} {type(error).__name__}"] += 1
            return
        wanted = 422 if kind == "refused" else 200
        if answer.status_code == wanted or (wanted == 200 and answer.is_success):
            self.answered[kind] += 1
        else:
            self.wrong[f"{kind} {answer.status_code}"] += 1

    async def _predict(self, number: int) -> httpx.Response:
        body = {"text": f"what color is shape {number}?", "image": _picture(number)}
        answer = await self.client.post("/v1/predict", json=body)
        if answer.status_code == 200:
            self.last = answer.json()["id"]
        return answer

    async def _several(self, number: int) -> httpx.Response:
        rows = [{"text": f"is there a circle {number} {n}?"} for n in range(4)]
        return await self.client.post("/v1/predict", json={"inputs": rows})

    async def _chat(self, number: int) -> httpx.Response:
        sound = {"type": "input_audio", "input_audio": {"data": _sound(number), "format": "wav"}}
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_picture(number)}"}}
        return await self._chatted([sound, picture])

    async def _conversation(self, number: int) -> httpx.Response:
        return await self._chatted([_words(number)], conversation=f"soak-{number % 400}-{number // 4000}")

    async def _stream(self, number: int) -> httpx.Response:
        return await self._chatted([_words(number)], stream=True)

    async def _explain(self, number: int) -> httpx.Response:
        return await self._chatted([_words(number)], explain=True)

    async def _chatted(self, parts: list[Any], **more: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": parts}], **more}
        return await self.client.post("/v1/chat/completions", json=body)

    async def _embeddings(self, number: int) -> httpx.Response:
        return await self.client.post("/v1/embeddings", json={"input": f"a text {number}"})

    async def _trace(self, _: int) -> httpx.Response:
        return await self.client.get(f"/v1/answers/{self.last}")

    async def _feedback(self, _: int) -> httpx.Response:
        return await self.client.post("/v1/feedback", json={"answer": self.last, "verdict": "right"})

    async def _refused(self, number: int) -> httpx.Response:
        return await self.client.post("/v1/predict", json={"text": "x", "image": _encoded(b"none %d" % number)})


def _words(number: int) -> dict[str, str]:
    return {"type": "text", "text": f"what color is the shape of number {number}?"}


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _picture(number: int) -> str:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (number % 256, number // 256 % 256, number // 65_536)).save(out, "PNG")
    return _encoded(out.getvalue())


def _sound(number: int) -> str:
    out = io.BytesIO()
    time_s = np.arange(8_000) / 16_000
    soundfile.write(out, 0.3 * np.sin(2 * np.pi * (200 + number % 2_000) * time_s), 16_000, format="WAV")
    return _encoded(out.getvalue())


if __name__ == "__main__":
    sys.exit(main())
