"""A real S3 server for tests: moto's, in a process of its own on the loopback, and a proxy that makes it misbehave."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

_HOP = ("host", "transfer-encoding", "content-length", "connection")
BUCKET = "models"
# moto takes any credentials.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of a server with one empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                httpx.put(f"{url}/{BUCKET}", timeout=30).raise_for_status()
                break
            except httpx.TransportError:
                assert process.poll() is None, "moto's server ended"
                assert time.monotonic() < end, "moto's server does not answer"
                time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


class Proxy:
    """Stands before a server and answers in its place while it is told to.

    Args:
        behind: the server's address.
    """

    def __init__(self, behind: str) -> None:
        self.behind = behind
        self.answers: list[tuple[int, str]] = []  # status and S3 error code, for the next requests, one each
        self.refuse_writes = ""  # an error code for every PUT and POST
        self.away = False  # connections are closed without an answer
        self.asked = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                proxy.asked += 1
                body = self._body()
                if proxy.away:
                    self.close_connection = True
                    return
                if self.command in ("PUT", "POST") and proxy.refuse_writes:
                    self._error(403, proxy.refuse_writes)
                elif proxy.answers:
                    self._error(*proxy.answers.pop(0))
                else:
                    self._ask(body)

            def _ask(self, body: bytes) -> None:
                headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
                with httpx.Client(timeout=60) as client:
                    got = client.request(self.command, f"{proxy.behind}{self.path}", content=body, headers=headers)
                self.send_response(got.status_code)
                for key, value in got.headers.items():
                    if key.lower() not in ("content-length", "transfer-encoding", "connection", "content-encoding"):
                        self.send_header(key, value)
                length = got.headers.get("content-length", "0") if self.command == "HEAD" else str(len(got.content))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(got.content)

            def _body(self) -> bytes:
                if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(parts)

            def _error(self, status: int, code: str) -> None:
                body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        return Handler
