"""The service as its users meet it: `python -m serve.start` into a real Ray, a real socket, OpenAI's own client."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from jobs import cluster, processes
from serve.switches import environment, free_ports
from tests import machines

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "what color is the shape?"


def start(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve.start", *arguments],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Served:
    port: int
    bundle: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="unused", max_retries=0)

    def raw(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body=body, headers=headers, encode_chunked=not isinstance(body, (bytes, str)))
        answer = connection.getresponse()
        out = answer.status, json.loads(answer.read())
        connection.close()
        return out


@pytest.fixture(scope="module")
def served(ray_cluster: cluster.Cluster, tiny_bundle: Path) -> Iterator[Served]:
    [port] = free_ports(1)
    done = start("--bundle", str(tiny_bundle), "--port", str(port), "--max-body-bytes", "3000000")
    assert done.returncode == 0, done.stderr
    assert f"http://127.0.0.1:{port}" in done.stdout
    yield Served(port, tiny_bundle)
    done = start("--stop")
    assert done.returncode == 0, done.stderr
    with pytest.raises(OSError):  # noqa: PT011 - refused: nobody listens any more
        http.client.HTTPConnection("127.0.0.1", port, timeout=5).connect()


def picture(data: bytes) -> Any:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def sound(data: bytes) -> Any:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def asked(*parts: Any) -> Any:
    return [{"role": "user", "content": list(parts)}]


WORDS: Any = {"type": "text", "text": QUESTION}


def test_openais_client_works_unchanged(served: Served, make_png: Any, make_wav: Any) -> None:
    client = served.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mmagent"
    messages = asked(picture(make_png()), sound(make_wav()), WORDS)
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=10)
    extension = (answer.model_extra or {})["mmagent"]
    assert answer.choices[0].message.content == extension["label"]
    assert extension["channel"] is None
    assert answer.usage is not None
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(model="tiny", messages=messages, stream=True, stream_options=options)
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    named = client.chat.completions.create(model="tiny", messages=messages, extra_body={"task": "classify"})
    assert named.choices[0].message.content == answer.choices[0].message.content
    with pytest.raises(openai.UnprocessableEntityError, match="its tasks are: 'classify'") as unknown:
        client.chat.completions.create(model="tiny", messages=messages, extra_body={"task": "tag"})
    assert unknown.value.param == "task"


def test_openais_client_raises_its_own_errors(served: Served, make_png: Any) -> None:
    create = served.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="these are: 'tiny'") as missing:
        create(model="gpt-9", messages=asked(WORDS))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="not a picture") as bad:
        create(model="tiny", messages=asked(WORDS, picture(b"no")))
    assert bad.value.param == "messages[0].content[1]"
    with pytest.raises(openai.APIStatusError, match="max_image_pixels") as large:
        create(model="tiny", messages=asked(picture(make_png(size=(2000, 600)))))
    assert large.value.status_code == 413
    with pytest.raises(openai.APIStatusError, match="max_body_bytes") as body:
        create(model="tiny", messages=asked({"type": "text", "text": "x" * 3_100_000}))
    assert body.value.status_code == 413


def test_errors_pass_the_proxy_in_their_shape(served: Served) -> None:
    json_type = {"Content-Type": "application/json"}
    long = "x" * 10_000_000
    for (status, answer), wanted in (
        (served.raw("POST", "/v1/chat/completions", b"{", **json_type), 400),
        (served.raw("POST", "/v1/chat/completions", b"{}", **json_type), 422),
        (served.raw("GET", "/nothing"), 404),
        (served.raw("GET", "/v1/predict"), 405),
        (served.raw("POST", "/v1/predict", (long[:100_000].encode() for _ in range(40)), **json_type), 413),
    ):
        assert status == wanted
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    status, health = served.raw("GET", "/healthz")
    assert (status, health["status"]) == (200, "ready")


def test_many_at_once_are_batched_and_a_bad_one_costs_only_itself(served: Served, make_png: Any) -> None:
    bodies = [
        {"text": QUESTION, "image": base64.b64encode(make_png((n, 0, 0)) if n % 5 else b"no picture").decode()}
        for n in range(60)
    ]

    def ask(body: Any) -> tuple[int, Any]:
        return served.raw("POST", "/v1/predict", json.dumps(body), **{"Content-Type": "application/json"})

    alone = [ask(body) for body in bodies[:6]]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, bodies))
    assert [status for status, _ in together] == [200 if n % 5 else 422 for n in range(60)]
    for (status, one), (_, other) in zip(alone, together[:6], strict=True):
        if status == 200:
            assert one["mmagent"]["probabilities"] == pytest.approx(other["mmagent"]["probabilities"], abs=1e-4)
    ids = [answer["id"] for status, answer in together if status == 200]
    assert len(set(ids)) == len(ids)


def test_nothing_listens_beyond_loopback(served: Served, ray_cluster: cluster.Cluster) -> None:
    listening = listeners(ray_cluster)
    assert any("ServeReplica" in name for name, _ in listening), listening
    assert any(port == served.port for _, (_, port) in listening), listening
    beyond = [(name, address) for name, address in listening if not loopback(address[0])]
    assert not beyond, beyond


def listeners(of: cluster.Cluster) -> list[tuple[str, tuple[str, int]]]:
    """Every listening TCP socket of the cluster's processes, Ray's own, proxies and replicas alike."""
    return [
        (" ".join(process.cmdline())[:60] or process.name(), (found.laddr.ip, found.laddr.port))
        for process in processes.marked(cluster.MARK, of.id)
        for found in process.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    ]


def loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.long
def test_the_same_command_replaces_the_bundle_or_says_why_not(served: Served, tmp_path: Path) -> None:
    other = start("--bundle", str(served.bundle), "--port", str(served.port + 1))
    assert other.returncode == 2
    assert f"use --host 127.0.0.1 --port {served.port}" in other.stderr
    root = tmp_path / "storage"
    history = root / "channels" / "production.jsonl"
    history.parent.mkdir(parents=True)
    history.write_text(f'{{"bundle": "gone"}}\n{json.dumps({"bundle": str(served.bundle)})}\n')
    done = start("--channel", "production", "--port", str(served.port), MMAGENT_STORAGE=str(root))
    assert done.returncode == 0, done.stderr
    assert [model.id for model in served.client.models.list()] == ["tiny", "production"]


def test_a_voice_and_operators_pass_the_proxy(served: Served) -> None:
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{served.port}/v1/voice", open_timeout=20) as socket:
        socket.send(json.dumps({"type": "start", "speak": False, "sample_rate_hz": 8000}))
        assert json.loads(socket.recv(20)) == {"type": "listening"}
        socket.send(b"\x00\x10" * 4000)
        socket.send(json.dumps({"type": "commit"}))
        kinds = [json.loads(socket.recv(20))["type"] for _ in range(3)]
        assert kinds in (["speech_started", "speech_ended", "answer"], ["speech_ended", "answer", "listening"])
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("GET", "/metrics")
    assert b"mmagent_requests_total" in connection.getresponse().read()
    connection.close()
    status, answer = served.raw(
        "POST", "/v1/predict", json.dumps({"text": QUESTION}), **{"Content-Type": "application/json"}
    )
    assert status == 200
    status, trace = served.raw("GET", f"/v1/answers/{answer['id']}")
    assert (status, trace["understood"]["label"]) == (200, answer["mmagent"]["label"])
    _, state = served.raw("GET", "/admin/status")
    assert len(state["replicas"]) == 1


@pytest.mark.slow
def test_tls(tiny_bundle: Path, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    [port] = free_ports(1)
    own = cluster.start(num_cpus=2, object_store_bytes=100_000_000)
    arguments = ["--bundle", str(tiny_bundle), "--port", str(port), "--tls-cert", cert, "--tls-key"]
    try:
        wrong = start(*arguments, cert, **own.environment)
        assert (wrong.returncode, "belong together" in wrong.stderr) == (2, True)
        done = start(*arguments, key, **own.environment)
        assert done.returncode == 0, done.stderr
        assert f"https://127.0.0.1:{port}" in done.stdout
        trusted = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection("localhost", port, timeout=20, context=trusted)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises((http.client.HTTPException, OSError)):
            Served(port, tiny_bundle).raw("GET", "/healthz")
    finally:
        cluster.stop(own)


@pytest.mark.slow
def test_on_two_machines_sqlite_is_refused_and_redis_serves_both(tiny_bundle: Path, tmp_path: Path) -> None:
    """A second raylet that is really there: each would keep conversations of its own in a file of its own."""
    own = cluster.start(num_cpus=2, object_store_bytes=100_000_000)
    [port, redis] = free_ports(2)
    arguments = ["--bundle", str(tiny_bundle), "--port", str(port)]
    try:
        machines.join(own, cpus=2)
        refused = start(*arguments, **own.environment)
        assert refused.returncode == 2
        assert "this Ray has 2 nodes" in refused.stderr
        assert "--store redis://HOST:PORT/0" in refused.stderr
        with pytest.raises(OSError, match="refused"):
            http.client.HTTPConnection("127.0.0.1", port, timeout=5).connect()
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
        command = [binary, "--port", str(redis), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as store:
            try:
                more = ["--store", f"redis://127.0.0.1:{redis}/0", "--min-replicas", "2", "--cpus", "1.5"]
                done = start(*arguments, *more, **own.environment)
                assert done.returncode == 0, done.stderr
                _one_conversation_on_all_replicas(Served(port, tiny_bundle))
            finally:
                store.terminate()
    finally:
        cluster.stop(own)


def _one_conversation_on_all_replicas(served: Served) -> None:
    """Each of two replicas, whichever machine it is on, knows what was said to the other."""
    end = time.monotonic() + 60
    while len(served.raw("GET", "/admin/status")[1]["replicas"]) < 2:
        assert time.monotonic() < end
        time.sleep(0.5)
    for turn in range(1, 11):
        body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "conversation": "shared"})
        assert served.raw("POST", "/v1/chat/completions", body, **{"Content-Type": "application/json"})[0] == 200
        kept = served.raw("GET", "/v1/conversations/shared")[1]
        assert len(kept["messages"]) == 2 * turn


def certificate(folder: Path) -> tuple[str, str]:
    """PEM files of a certificate for localhost that signs itself, and of its key."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.mark.slow
def test_without_haproxy_nothing_listens_beyond_loopback_either(tiny_bundle: Path) -> None:
    own = cluster.start(num_cpus=2, object_store_bytes=100_000_000, env={"RAY_SERVE_ENABLE_HA_PROXY": "0"})
    try:
        [port] = free_ports(1)
        done = start("--bundle", str(tiny_bundle), "--port", str(port), **own.environment)
        assert done.returncode == 0, done.stderr
        found = listeners(own)
        assert not any("haproxy" in name for name, _ in found)
        assert not [item for item in found if not loopback(item[1][0])]
        messages = asked(WORDS)
        assert Served(port, tiny_bundle).client.chat.completions.create(model="tiny", messages=messages).id
    finally:
        cluster.stop(own)


# ---- what is refused before anything is started ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bundel", "x"], "did you mean --bundle?"),
        ([], "one of the arguments"),
        (["--bundle", "none-of-this-name"], "no bundle 'none-of-this-name'"),
        (["--channel", "none"], "no channel 'none'"),
        (["--channel", "../x"], "is no name"),
        (["--bundle", "x", "--host", "0.0.0.0"], "MMAGENT_API_KEYS"),
        (["--bundle", "x", "--host", "localhost.example.com"], "MMAGENT_API_KEYS"),
        (["--bundle", "x", "--port", "0"], "--port is 0"),
        (["--bundle", "x", "--min-replicas", "9"], "max_replicas=2 is less"),
        (["--bundle", "x", "--allow-media-host", "http://h/"], "is no host"),
    ],
)
def test_a_wrong_command_says_what_to_do(storage: Path, arguments: list[str], says: str) -> None:
    done = start(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_no_ray(storage: Path, tiny_bundle: Path) -> None:
    [port] = free_ports(1)
    done = start("--bundle", str(tiny_bundle), RAY_ADDRESS=f"127.0.0.1:{port}")
    assert done.returncode == 2
    assert "ray start --head" in done.stderr
    done = start("--bundle", str(tiny_bundle), RAY_ADDRESS=f"http://127.0.0.1:{port}")
    assert "HOST:PORT is wanted" in done.stderr


def test_a_missing_token_is_named(ray_cluster: cluster.Cluster, tiny_bundle: Path, tmp_path: Path) -> None:
    done = start("--bundle", str(tiny_bundle), RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"), HOME=str(tmp_path))
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr


def test_switches_are_complete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="28 characters"):
        environment(tmp_path / ("x" * 40))
