"""Object storage as the storage root: what is read is fetched, what is written is sent.

Everything works on a folder of this machine, the *mirror* (``MMAGENT_MIRROR``, default ``~/.cache/mmagent/HASH``).
Small text files of a name (configs, metrics, manifests) are fetched when the name is opened; bundles and checkpoints
when they are loaded; shards not at all: they are read where they lie, a row group at a time. What is written is sent
by a thread, in the order in which it was written, so that what seals a folder (its manifest, its marker) comes last;
what must be there before anything goes on (a checkpoint, feedback, a channel) is sent at once. Where storage is away,
what was written waits in the mirror, and the next process sends it.

Not sent: what begins with a dot (drafts, locks), and what belongs to one machine (`_OWN`).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import socket
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mmagent.objects import Object, Objects, ObjectsError

_LIGHT = (".json", ".jsonl", ".yaml", ".yml", ".html", ".md", ".txt", ".csv", "")  # fetched with their folder
_OWN = ("cluster.json", "serve/*.db*", "serve/*.sqlite*")
_SEND_EVERY_S = 3.0
_LIST_AGAIN_S = 2.0
_WARN_EVERY_S = 60.0
_SEND_PATIENCE_S = 120.0
_GREET_PATIENCE_S = 15.0
_MAX_SKEW_S = 300.0


class Mirror:
    """
    Args:
        url: of the storage root.
        folder: of this machine.

    Raises:
        ObjectsError: it cannot be reached, listed or written, or this machine's clock is minutes off.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.objects = Objects(url)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._index = _Index(folder / ".index.db")
        self._listed: dict[str, float] = {}  # when, by key
        self._sizes: dict[str, int] = {}
        self._watched: set[Path] = set()
        self._closing = threading.Event()
        self._warned_s = -_WARN_EVERY_S
        self._greet()
        threading.Thread(target=self._work, daemon=True, name="mirror").start()
        atexit.register(self.close)

    # -- reading ---------------------------------------------------------------------------------------------------

    def refresh(self, place: Path) -> None:
        """Fetches what is new of a file, or of the small files of a folder, but for what was looked at just now."""
        key, now = self._key(place), time.monotonic()
        if now - self._listed.get(key, -_LIST_AGAIN_S) < _LIST_AGAIN_S:
            return
        self._listed[key] = now
        for found in self._list(key):
            if found.key == key or Path(found.key).suffix in _LIGHT:
                self._bring(found)

    def fetch(self, place: Path) -> None:
        """Fetches a file, or all of a folder."""
        for found in self._list(self._key(place)):
            self._bring(found)

    def size(self, file: Path) -> int:
        """
        Raises:
            FileNotFoundError: it is neither here nor there.
        """
        if file.is_file():
            return file.stat().st_size
        key = self._key(file)
        if key not in self._sizes:
            self._sizes[key] = self.objects.about(key).size
        return self._sizes[key]

    def open(self, file: Path) -> Any:
        """A file that is there alone, for pyarrow to read pieces of."""
        return self.objects.open(self._key(file))

    def watch(self, place: Path) -> None:
        """Has the thread fetch a file, or a folder's small files, every few seconds."""
        self._watched.add(place)

    def _list(self, key: str) -> list[Object]:
        every = self.objects.list(key)
        found = [each for each in every if not _hidden(each.key.removeprefix(key)) and not _own(each.key)]
        self._sizes.update((each.key, each.size) for each in found)
        return found

    def _bring(self, found: Object) -> None:
        """What was changed here, and not sent yet, stays."""
        local = self.folder / found.key
        known, stat = self._index.get(found.key), _stat(local)
        if stat is not None and (known is None or known[2:] == (found.size, found.mtime_ns) or known[:2] != stat):
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        draft = local.with_name(f".{local.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            self.objects.fetch(found, draft)
            os.replace(draft, local)
            self._index.put(found.key, (*_known(local), found.size, found.mtime_ns))
        except FileNotFoundError:  # removed meanwhile
            return
        finally:
            draft.unlink(missing_ok=True)

    # -- writing ---------------------------------------------------------------------------------------------------

    def send(self, place: Path, patience_s: float = _SEND_PATIENCE_S) -> None:
        """Sends what was changed of a file or folder, the oldest first; returns when it is there.

        Raises:
            ObjectsError: storage refuses it, or is away for longer than `patience_s`.
        """
        for file in self.changed(place):
            key = self._key(file)
            try:
                stat = _known(file)
                self.objects.put(file, key, patience_s)
                self._remember(key, stat)
            except FileNotFoundError:  # removed or renamed meanwhile
                continue

    def changed(self, place: Path) -> list[Path]:
        """What of a file or folder is not there as it is here, the oldest first."""
        found = []
        for file in [place] if place.is_file() else place.rglob("*"):
            inner = file.name if file == place else file.relative_to(place).as_posix()
            if _hidden(inner) or _own(key := self._key(file)):
                continue
            stat, known = _stat(file), self._index.get(key)
            if stat is not None and (known is None or known[:2] != stat):
                found.append((stat[1], key, file))
        return [file for *_, file in sorted(found)]

    def remove(self, place: Path) -> None:
        """Removes a file or folder there; here it is the caller's to remove."""
        for found in sorted(self._list(self._key(place)), key=lambda each: -each.mtime_ns):  # what seals it goes first
            self.objects.delete(found.key)
            self._index.drop(found.key)
        self._listed.clear()

    def move(self, source: Path, target: Path) -> None:
        """Moves what was sent of a folder; here it was moved before."""
        here, there = self._key(source), self._key(target)
        for found in sorted(self._list(here), key=lambda each: each.mtime_ns):
            key = there + found.key.removeprefix(here)
            self.objects.move(found.key, key)
            self._index.drop(found.key)
            if (stat := _stat(self.folder / key)) is not None:
                self._remember(key, stat)
        self._listed.clear()

    def close(self) -> None:
        """Sends what is left when the process ends; ends it with status 1 where that cannot be done."""
        atexit.unregister(self.close)
        self._closing.set()
        try:
            self.send(self.folder)
        except OSError as error:
            left = len(self.changed(self.folder))
            told = f"{left} files wait in {self.folder}: the next command with this MMAGENT_STORAGE sends them"
            print(f"error: {error}\n{told}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)

    def _remember(self, key: str, stat: tuple[int, int]) -> None:
        about = self.objects.about(key)
        self._sizes[key] = about.size
        self._index.put(key, (*stat, about.size, about.mtime_ns))

    # -- underneath ------------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        """Whether storage can be written and read, and what time it has there."""
        key = f".machines/{socket.gethostname()}.json"
        self.objects.write(key, json.dumps({"pid": os.getpid()}).encode(), _GREET_PATIENCE_S)
        written_ns = self.objects.about(key, _GREET_PATIENCE_S).mtime_ns
        self.ahead_s = written_ns / 1e9 - time.time() if written_ns else 0.0  # of storage's clock
        if abs(self.ahead_s) > _MAX_SKEW_S:
            which = "behind" if self.ahead_s > 0 else "ahead of"
            raise ObjectsError(
                f"the clock of this machine is {abs(self.ahead_s) / 60:.0f} minutes {which} that of "
                f"{self.objects.url}: set it, timedatectl set-ntp true"
            )

    def _work(self) -> None:
        """The thread: sends what was written, fetches what is watched. Of a machine's processes one sends."""
        with open(self.folder / ".sender.lock", "w") as lock:
            sends = False
            while not self._closing.wait(_SEND_EVERY_S):
                with contextlib.suppress(OSError):
                    if not sends:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        sends = True
                try:
                    if sends:
                        self.send(self.folder, patience_s=1.0)
                    for place in tuple(self._watched):
                        self.refresh(place)
                except (OSError, sqlite3.Error) as error:
                    if time.monotonic() - self._warned_s > _WARN_EVERY_S:
                        self._warned_s = time.monotonic()
                        print(f"warning: {error}; trying again", file=sys.stderr, flush=True)

    def _key(self, place: Path) -> str:
        key = place.relative_to(self.folder).as_posix()
        return "" if key == "." else key


class _Index:
    """What was fetched or sent: of each place its size and time of change here, and those there. All processes of a
    machine share it."""

    def __init__(self, file: Path) -> None:
        self._file, self._mine = file, threading.local()
        self._db.execute(
            "create table if not exists files "
            "(place text primary key, size int, mtime_ns int, there_size int, there_mtime_ns int)"
        )

    @property
    def _db(self) -> sqlite3.Connection:
        """Of this thread and process."""
        if getattr(self._mine, "pid", None) != os.getpid():
            db = sqlite3.connect(self._file, timeout=60, isolation_level=None)
            db.execute("pragma journal_mode = wal")
            db.execute("pragma synchronous = normal")
            self._mine.db, self._mine.pid = db, os.getpid()
        found: sqlite3.Connection = self._mine.db
        return found

    def get(self, place: str) -> tuple[int, int, int, int] | None:
        found: tuple[int, int, int, int] | None = self._db.execute(
            "select size, mtime_ns, there_size, there_mtime_ns from files where place = ?", (place,)
        ).fetchone()
        return found

    def put(self, place: str, known: tuple[int, int, int, int]) -> None:
        self._db.execute("insert or replace into files values (?, ?, ?, ?, ?)", (place, *known))

    def drop(self, place: str) -> None:
        self._db.execute("delete from files where place = ?", (place,))


def _hidden(place: str) -> bool:
    return any(part.startswith(".") for part in place.split("/") if part)


def _own(place: str) -> bool:
    path = Path(place)
    return any(path.match(pattern) and len(path.parts) == pattern.count("/") + 1 for pattern in _OWN)


def _stat(file: Path) -> tuple[int, int] | None:
    """Size and time of change; none where it is no file."""
    try:
        return _known(file) if file.is_file() else None
    except FileNotFoundError:
        return None


def _known(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
