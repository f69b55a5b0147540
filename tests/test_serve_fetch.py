"""Fetching pictures of allowed hosts from a real server on loopback, and every trick that must not work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mmagent.media import Limits
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.fetch import FetchError, check, fetch
from serve.parts import Draft
from serve.questions import ChatRequest


class Pages(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/moved":
            self._answer(302, b"", Location="http://169.254.169.254/")
        elif self.path == "/long":
            self._answer(200, b"x" * 50_000)
        elif self.path == "/lie":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"x" * 50_000)
            self.close_connection = True
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif self.path.startswith("/picture"):
            self._answer(200, b"the host was " + self.headers["Host"].encode())
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url: str, *allowed: str, timeout_s: float = 5.0, max_bytes: int = 10_000) -> bytes:
    return fetch(url, allowed, timeout_s=timeout_s, max_bytes=max_bytes)


def test_an_allowed_host_is_fetched(host: str) -> None:
    assert get(f"http://{host}/picture?a=b", host) == f"the host was {host}".encode()


def test_the_right_port_is_part_of_the_permission(host: str) -> None:
    with pytest.raises(FetchError, match="not allowed"):
        get(f"http://{host}/picture", "127.0.0.1")


@pytest.mark.parametrize(
    ("path", "says"), [("moved", "redirects"), ("none", "answered 404"), ("long", "max_media_bytes is 10000")]
)
def test_what_is_not_an_answer(host: str, path: str, says: str) -> None:
    with pytest.raises(FetchError, match=says):
        get(f"http://{host}/{path}", host)


def test_a_body_without_a_length_is_limited_too(host: str) -> None:
    with pytest.raises(FetchError, match="max_media_bytes") as error:
        get(f"http://{host}/lie", host)
    assert error.value.too_large


def test_a_dripping_server_is_cut_off(host: str) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError, match="fetch_timeout_s"):
        get(f"http://{host}/slow", host, timeout_s=0.5)
    assert time.monotonic() - started < 3


def test_nobody_there() -> None:
    with pytest.raises(FetchError, match="could not be fetched"):
        get("http://127.0.0.1:9/x", "127.0.0.1:9")


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://127.0.0.1/x", "*.0.0.1"),  # loopback by a pattern
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254"),  # link-local even by name
        ("http://0.0.0.0/x", "0.0.0.0"),
        ("http://224.0.0.1/x", "224.0.0.1"),
        ("http://[fe80::1]/x", "[fe80::1]"),
        ("http://[::ffff:169.254.169.254]/x", "[::ffff:169.254.169.254]"),
    ],
)
def test_harmful_addresses_are_refused_after_resolving(url: str, allowed: str) -> None:
    with pytest.raises(FetchError, match="not fetched from") as error:
        get(url, allowed)
    assert error.value.refused


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.com/x", "http://example.com.evil.com/x", "http://notexample.com/x", "http://example.com@evil.com/x",
        "http://user@example.com/x", "http://example.com:81/x", "http:///x", "http://[broken/x", "http://example.com:x/",
        "https://2130706433/x", "//example.com/x",
    ],
)  # fmt: skip
def test_addresses_that_only_look_allowed(url: str) -> None:
    with pytest.raises(FetchError, match=r"allowed now: example\.com"):
        check(url, ["example.com"])


def test_patterns() -> None:
    assert check("https://a.b.example.com/x", ["*.example.com"]).hostname == "a.b.example.com"
    assert check("https://EXAMPLE.com./x", ["example.com"])
    with pytest.raises(FetchError, match="not allowed"):
        check("https://example.com/x", ["*.example.com"])


def test_in_a_request(host: str) -> None:
    def build(url: str, *allowed: str) -> Any:
        part = {"type": "image_url", "image_url": {"url": url}}
        request = ChatRequest.model_validate({"messages": [{"role": "user", "content": [part]}]})
        draft = Draft(ServeConfig(allow_media_hosts=allowed), Limits(max_media_bytes=10_000))
        return draft.build(request, "classify", "id")

    record = build(f"http://{host}/picture", host)
    assert record.images[0].read().startswith(b"the host was")
    for url, status, code in (
        (f"http://{host}/long", 413, "media_too_large"),
        (f"http://{host}/none", 422, "media_not_fetched"),
        ("http://example.com/x", 422, "media_host_not_allowed"),
    ):
        with pytest.raises(ApiError) as error:
            build(url, host)
        assert (error.value.status_code, error.value.code) == (status, code)
        assert error.value.param == "messages[0].content[0]"
