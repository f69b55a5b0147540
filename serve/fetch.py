"""Fetching a picture from an http(s) address: only of hosts that the operator listed, and never by way of a trick.

The name is resolved once and the connection goes to that very address, so the name cannot change its mind in between.
Addresses of link-local (cloud metadata), multicast and reserved ranges are refused always; private and loopback ones
unless the host is listed by its own name. Redirects are not followed. Time and bytes are limited from start to end.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

_CHUNK_BYTES = 65_536
_PORTS = {"http": 80, "https": 443}


class FetchError(ValueError):
    """An address that is not fetched, or could not be. `too_large`: over the byte limit."""

    def __init__(self, message: str, *, too_large: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large
        self.refused = refused


def check(url: str, allowed: Sequence[str]) -> SplitResult:
    """The parts of an address that may be fetched.

    Raises:
        FetchError: says which setting allows which hosts.
    """
    setting = "--allow-media-host HOST lets the service fetch http(s) pictures of a host; allowed now: "
    setting += ", ".join(allowed) or "none"
    advice = f"send the picture as a data URI (data:image/png;base64,...). {setting}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchError(f"not an address ({error}); {advice}", refused=True) from error
    if parts.scheme not in _PORTS:
        raise FetchError(f"addresses of the kind {parts.scheme[:20]!r} are never read; {advice}", refused=True)
    if not parts.hostname or parts.username is not None:
        raise FetchError(f"the address has no host, or a user name in it; {advice}", refused=True)
    if _entry(parts.hostname, port or _PORTS[parts.scheme], parts.scheme, allowed) is None:
        raise FetchError(f"the host {_netloc(parts)!r} is not allowed; {advice}", refused=True)
    return parts


def fetch(url: str, allowed: Sequence[str], *, timeout_s: float, max_bytes: int) -> bytes:
    """The body of an allowed address.

    Raises:
        FetchError: refused, unreachable, not 200, too slow or too large.
    """
    parts = check(url, allowed)
    assert parts.hostname is not None
    port = parts.port or _PORTS[parts.scheme]
    by_name = not (_entry(parts.hostname, port, parts.scheme, allowed) or "").startswith("*")
    deadline = time.monotonic() + timeout_s
    try:
        address = _resolve(parts.hostname, port, by_name)
        with _connect(address, parts, timeout_s) as sock:
            # Each read has its own time-out; a sender of one byte a second is cut off by the clock.
            watchdog = threading.Timer(timeout_s, sock.shutdown, [socket.SHUT_RDWR])
            watchdog.start()
            try:
                if isinstance(sock, ssl.SSLSocket):
                    sock.do_handshake()
                connection = http.client.HTTPConnection(parts.hostname, port)
                connection.sock = sock
                return _get(connection, parts, deadline, max_bytes)
            finally:
                watchdog.cancel()
                watchdog.join()
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{_netloc(parts)} could not be fetched: {error or type(error).__name__}") from error


def _entry(host: str, port: int, scheme: str, allowed: Sequence[str]) -> str | None:
    """The entry of the list that allows a host; one without a port means the usual one of http and https."""
    host = host.lower().rstrip(".")
    for entry in allowed:
        name, wanted = _split(entry)
        if port != (wanted or _PORTS[scheme]):
            continue
        if name == host or (name.startswith("*.") and host.endswith(name[1:])):
            return entry
    return None


def _split(entry: str) -> tuple[str, int | None]:
    name, colon, port = entry.rpartition(":")
    if colon and port.isdigit():
        return name.strip("[]"), int(port)
    return entry.strip("[]"), None


def _resolve(host: str, port: int, by_name: bool) -> tuple[str, int]:
    """The address to connect to; all addresses of a name must be harmless, not just the first."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        harmful = address.is_link_local or address.is_multicast or address.is_unspecified
        if harmful or not (address.is_global or (by_name and (address.is_private or address.is_loopback))):
            raise FetchError(f"{host} resolves to {text}, an address that is not fetched from", refused=True)
    return found[0], port


def _connect(address: tuple[str, int], parts: SplitResult, timeout_s: float) -> socket.socket:
    plain = socket.create_connection(address, timeout=timeout_s)
    if parts.scheme == "http":
        return plain
    context = ssl.create_default_context()
    try:
        return context.wrap_socket(plain, server_hostname=parts.hostname, do_handshake_on_connect=False)
    except BaseException:
        plain.close()
        raise


def _get(connection: http.client.HTTPConnection, parts: SplitResult, deadline: float, max_bytes: int) -> bytes:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request("GET", target, headers={"Accept": "image/*,audio/*", "Accept-Encoding": "identity"})
    response = connection.getresponse()
    if response.status in (301, 302, 303, 307, 308):
        raise FetchError(f"{_netloc(parts)} redirects; redirects are not followed: give the final address")
    if response.status != 200:
        raise FetchError(f"{_netloc(parts)} answered {response.status}, but 200 is wanted")
    too_large = FetchError(f"more than {max_bytes} bytes; the limit max_media_bytes is {max_bytes}", too_large=True)
    if int(response.headers.get("Content-Length") or 0) > max_bytes:
        raise too_large
    body = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    if time.monotonic() >= deadline:  # cut off by the watchdog, which looks like an end
        raise FetchError(f"{_netloc(parts)} took longer than the limit fetch_timeout_s")
    return bytes(body)


def _netloc(parts: SplitResult) -> str:
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
