"""A name is worked on by one process at a time; and how the last one left it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mmagent import storage

_FILE = ".lock"
_LEFT, _FAILED, _STOPPED = "left", "failed", "stopped"  # behind the process's number, when it is done


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
    with open(folder / _FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise LockError(
                f"{folder.name!r} is being worked on by process {_number(file.read())}: "
                "wait for it, stop it, or give another --name"
            ) from error

        def write(words: str) -> None:
            file.truncate(0)
            file.write(words)
            file.flush()

        write(str(os.getpid()))
        try:
            with storage.lease(folder):
                yield
        except BaseException as error:
            reason = " ".join(str(error).split())[:300]
            stopped = isinstance(error, KeyboardInterrupt)
            write(f"{os.getpid()} {_STOPPED if stopped else f'{_FAILED} {type(error).__name__}: {reason}'}")
            raise
        write(f"{os.getpid()} {_LEFT}")


def held(folder: Path) -> str:
    """The number of the process that works on a name; empty where nobody does."""
    try:
        with open(folder / _FILE) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look are in nobody's way
            except OSError:
                return _number(file.read())
    except FileNotFoundError:
        pass
    return ""


def ended(folder: Path) -> tuple[str, str]:
    """How the last process left a name that nobody works on: "left" (by itself), "stopped" (Ctrl-C) or "failed" (with
    its words; also one that was killed); empty where that is not known."""
    try:
        words = (folder / _FILE).read_text().split(maxsplit=2)
    except FileNotFoundError:
        return "", ""
    if len(words) < 2:
        return (_FAILED, "it was killed") if words else ("", "")
    return words[1], words[2] if len(words) > 2 else ""


def _number(words: str) -> str:
    return words.split()[0] if words.split() else "?"
