"""A name in object storage that one process of all machines holds at a time.

Storage of any kind can list, read and write, and no more. So who finds no fresh lease writes his own, waits a moment,
and has the name where the lease is still his. A thread renews it; one that was not renewed for 90 s is anybody's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from mmagent.objects import Objects
from mmagent.storage import StorageError

_FRESH_S, _RENEW_S, _LOOK_S, _SETTLE_S = 90.0, 20.0, 5.0, 0.5


class LeaseError(OSError, StorageError):
    """Another process holds the name; the message says which."""


@contextlib.contextmanager
def held(objects: Objects, name: str, ahead_s: float) -> Iterator[None]:
    """
    Args:
        name: a key, below which the lease lies.
        ahead_s: of storage's clock to this machine's.

    Raises:
        LeaseError: another process holds it, and renews it.
    """
    key = f"{name}/.lease.json"
    mine = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    _take(objects, key, mine, ahead_s)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEW_S):
            with contextlib.suppress(OSError):  # away: the next time
                objects.write(key, json.dumps(mine).encode())

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            objects.delete(key)


def _take(objects: Objects, key: str, mine: Mapping[str, Any], ahead_s: float) -> None:
    before, before_s = "", 0.0
    while True:
        holder, age_s = _holder(objects, key, ahead_s)
        if holder is None or age_s > _FRESH_S or _is_gone(holder):
            objects.write(key, json.dumps(mine).encode())
            time.sleep(_SETTLE_S)
            holder, age_s = _holder(objects, key, ahead_s)
            if holder is not None and holder["owner"] == mine["owner"]:
                return
            continue
        if before and (holder["owner"] != before or age_s < before_s):  # it was renewed
            raise LeaseError(
                f"{objects.url}/{key.removesuffix('/.lease.json')} is being worked on by process {holder['pid']} of "
                f"{holder['host']}: wait for it, stop it, or give another --name"
            )
        if not before:
            told = f"{holder['host']} held this name {age_s:.0f} s ago: waiting to see whether it still does"
            print(told, file=sys.stderr, flush=True)
        before, before_s = holder["owner"], age_s
        time.sleep(_LOOK_S)


def _holder(objects: Objects, key: str, ahead_s: float) -> tuple[dict[str, Any] | None, float]:
    """Who holds a name, and how many seconds ago he said so."""
    try:
        about = objects.about(key)
        holder: dict[str, Any] = json.loads(objects.read(key))
    except (FileNotFoundError, ValueError):
        return None, 0.0
    return holder, max(0.0, time.time() + ahead_s - about.mtime_ns / 1e9)


def _is_gone(holder: Mapping[str, Any]) -> bool:
    """Whether it was a process of this machine that has ended."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
