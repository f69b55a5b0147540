"""What a service writes down: a JSON object a line, without what was asked and answered; and what administrators did.

Content is written only where ``--log-content`` says so. The audit log is a file of its own below the storage root
(``serve/audit.jsonl``), flushed to the disk before the act is answered.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from mmagent import storage

_requests = logging.getLogger("mmagent.requests")


def to_stderr() -> None:
    """Has this process write its lines to its standard error, which Ray keeps in a file for each replica."""
    logger = logging.getLogger("mmagent")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def request(**facts: Any) -> None:
    """One request that was answered."""
    _requests.info(json.dumps({"time_ms": int(time.time() * 1000), **facts}, ensure_ascii=False))


def audit_file() -> Path:
    return storage.root() / "serve" / "audit.jsonl"


def audit(act: str, key: str, request_id: str, **facts: Any) -> None:
    """One act of an administrator. Lines of several replicas do not mix: each is written at once, at the end.

    Raises:
        OSError: it cannot be written; then the act must not happen either.
    """
    line = json.dumps(
        {"time_ms": int(time.time() * 1000), "act": act, "key": key, "request_id": request_id, **facts},
        ensure_ascii=False,
    )
    append(audit_file(), line.encode() + b"\n")


def append(file: Path, data: bytes) -> None:
    """Adds to a file and waits until it is on the disk.

    Raises:
        OSError: it cannot be written whole.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        if os.write(handle, data) != len(data):
            raise OSError(f"{file} could not be written: is the disk full?")
        os.fsync(handle)
    finally:
        os.close(handle)
