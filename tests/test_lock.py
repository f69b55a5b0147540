"""A name is held by one process, as long as it lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.lock import LockError, locked
from mmagent import storage as storages

CHECKOUT = Path(__file__).parents[1]


def test_a_name_is_one_processes_at_a_time(storage: Path) -> None:
    folder = storages.folder("runs", "r")
    code = """
import sys; from pathlib import Path; from jobs.lock import locked
with locked(Path(sys.argv[1])): print("held", flush=True); input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline().strip() == "held"
        words = f"'r' is being worked on by process {holder.pid}: wait for it"
        with pytest.raises(LockError, match=words), locked(folder):
            pass
        with locked(storages.folder("runs", "other")):  # another name is free
            pass
    finally:
        holder.kill()  # the lock ends with its process, however it ends
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with locked(folder):
        pass
    with locked(folder):
        pass
