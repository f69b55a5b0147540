"""A name is worked on by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mmagent import storage


class LockError(RuntimeError):
    """Another process has the name; the message says which."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a name, that of a run, a search or predictions, for this process; the lock ends with it, however it ends.

    Raises:
        LockError: another process of this machine has it.
        StorageError: one of another machine has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise LockError(
                f"{folder.name!r} is being worked on by process {file.read().strip() or '?'}: "
                "wait for it, stop it, or give another --name"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        with storage.lease(folder):
            yield
