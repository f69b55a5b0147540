"""Where replicas keep what outlives a request: conversations, traces of answers, what waits for a person, counts.

Everything is a list of items under (kind, id), with an owner and an end. On one node it is SQLite below the storage
root, which all replicas of the node open; on several it is Redis, by its address. Calls block: they belong in a thread.
"""

from __future__ import annotations

import functools
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_SWEEP_EVERY_S = 60.0
_PART = 500  # ids that are read at once


class StoreError(RuntimeError):
    """The store cannot be reached, or refuses; what it holds is as it was."""


class NotYoursError(ValueError):
    """An id that another owner has."""


@dataclass(frozen=True, slots=True)
class Held:
    """All items under an id, the oldest first."""

    owner: str
    items: tuple[bytes, ...]


class Store(Protocol):
    """Every method but `close` raises StoreError where the store cannot be reached."""

    def append(self, kind: str, id: str, owner: str, items: Sequence[bytes], keep_s: float) -> None:
        """Adds items; the whole list ends `keep_s` from now.

        Raises:
            NotYoursError: another owner has this id.
        """

    def put(self, kind: str, id: str, owner: str, item: bytes, keep_s: float) -> None:
        """One item in place of whatever was there, in one step: nobody finds nothing in between."""

    def read(self, kind: str, id: str) -> Held | None:
        """What is under an id; none: nothing, or it has ended."""

    def delete(self, kind: str, id: str) -> bool:
        """Whether there was something."""

    def ids(self, kind: str, limit: int, before: str = "") -> list[str]:
        """The newest ids of a kind; of those that sort before one, where it is given."""

    def count(self, kind: str, id: str, keep_s: float) -> int:
        """Adds one to a counter, and says how many there are; it ends `keep_s` after its first."""

    def close(self) -> None: ...


def open_store(address: str, folder: Path) -> Store:
    """The store of an address: ``redis://...``, or none for SQLite in a folder."""
    return RedisStore(address) if address else SqliteStore(folder / "store.sqlite")


def _told(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose store's own errors become StoreError."""

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except self.errors as error:
            raise StoreError(f"{type(error).__name__}: {error}") from error

    return run


class SqliteStore:
    """One connection for each thread; readers never wait for writers (write-ahead log)."""

    errors = (sqlite3.Error, OSError)

    _SCHEMA = """
        create table if not exists items (
            number integer primary key autoincrement, kind text not null, id text not null, owner text not null,
            item blob not null, ends_s real not null
        );
        create index if not exists items_by_id on items (kind, id, number);
        create index if not exists items_by_end on items (ends_s);
        create table if not exists counts (
            kind text not null, id text not null, count integer not null, ends_s real not null, primary key (kind, id)
        );
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._swept_s = time.time()
        self._connection().executescript(self._SCHEMA)

    @_told
    def append(self, kind: str, id: str, owner: str, items: Sequence[bytes], keep_s: float) -> None:
        now = time.time()
        with _Transaction(self._connection()) as database:
            found = database.execute(
                "select owner from items where kind = ? and id = ? and ends_s > ? limit 1", (kind, id, now)
            ).fetchone()
            if found is not None and found[0] != owner:
                raise NotYoursError(f"{kind} {id!r} belongs to another key")
            if found is None:
                database.execute("delete from items where kind = ? and id = ?", (kind, id))
            self._insert(database, kind, id, owner, items, now + keep_s)
            database.execute("update items set ends_s = ? where kind = ? and id = ?", (now + keep_s, kind, id))
            if now - self._swept_s > _SWEEP_EVERY_S:
                self._swept_s = now
                database.execute("delete from items where ends_s < ?", (now,))
                database.execute("delete from counts where ends_s < ?", (now,))

    @_told
    def put(self, kind: str, id: str, owner: str, item: bytes, keep_s: float) -> None:
        with _Transaction(self._connection()) as database:
            database.execute("delete from items where kind = ? and id = ?", (kind, id))
            self._insert(database, kind, id, owner, [item], time.time() + keep_s)

    @staticmethod
    def _insert(
        database: sqlite3.Connection, kind: str, id: str, owner: str, items: Sequence[bytes], ends_s: float
    ) -> None:
        rows = [(kind, id, owner, item, ends_s) for item in items]
        database.executemany("insert into items (kind, id, owner, item, ends_s) values (?, ?, ?, ?, ?)", rows)

    @_told
    def read(self, kind: str, id: str) -> Held | None:
        query = "select owner, item from items where kind = ? and id = ? and ends_s > ? order by number"
        rows = self._connection().execute(query, (kind, id, time.time())).fetchall()
        return Held(rows[0][0], tuple(row[1] for row in rows)) if rows else None

    @_told
    def delete(self, kind: str, id: str) -> bool:
        with _Transaction(self._connection()) as database:
            return database.execute("delete from items where kind = ? and id = ?", (kind, id)).rowcount > 0

    @_told
    def ids(self, kind: str, limit: int, before: str = "") -> list[str]:
        query = (
            "select id from items where kind = ? and ends_s > ? and (? = '' or id < ?) group by id "
            "order by max(number) desc limit ?"
        )
        return [row[0] for row in self._connection().execute(query, (kind, time.time(), before, before, limit))]

    @_told
    def count(self, kind: str, id: str, keep_s: float) -> int:
        now = time.time()
        with _Transaction(self._connection()) as database:
            database.execute("delete from counts where kind = ? and id = ? and ends_s < ?", (kind, id, now))
            row = database.execute(
                "insert into counts values (?, ?, 1, ?) on conflict (kind, id) do update set count = count + 1 "
                "returning count",
                (kind, id, now + keep_s),
            ).fetchone()
        return int(row[0])

    def close(self) -> None:
        for connection in self._opened:
            connection.close()
        self._opened.clear()

    def _connection(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = sqlite3.connect(self._file, timeout=10, isolation_level=None, check_same_thread=False)
            found.execute("pragma journal_mode = wal")
            found.execute("pragma synchronous = normal")
            found.execute("pragma secure_delete = on")  # what is deleted is not left on the disk
            self._local.connection = found
            self._opened.append(found)
        return found


class _Transaction:
    """A write transaction that begins at once: two of them never both read before one writes."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("begin immediate")
        return self._connection

    def __exit__(self, kind: Any, *_: object) -> None:
        self._connection.execute("rollback" if kind else "commit")


class RedisStore:
    """
    Args:
        address: ``redis://[:PASSWORD@]HOST:PORT/DATABASE`` or ``rediss://`` with TLS.
    """

    # Owner and items in one step, so that two first turns of one id cannot both win.
    _APPEND = """
        local owner = redis.call('get', KEYS[1])
        if ARGV[3] == 'replace' then redis.call('del', KEYS[2])
        elseif owner and owner ~= ARGV[1] then return 0 end
        redis.call('set', KEYS[1], ARGV[1], 'PX', ARGV[2])
        for i = 4, #ARGV do redis.call('rpush', KEYS[2], ARGV[i]) end
        redis.call('pexpire', KEYS[2], ARGV[2])
        return 1
    """

    def __init__(self, address: str) -> None:
        import redis

        self.errors = (redis.exceptions.RedisError, OSError)
        self._redis: Any = redis.Redis.from_url(address, socket_timeout=5)
        self._append = self._redis.register_script(self._APPEND)

    @_told
    def append(self, kind: str, id: str, owner: str, items: Sequence[bytes], keep_s: float) -> None:
        self._add(kind, id, owner, items, keep_s, "append")

    @_told
    def put(self, kind: str, id: str, owner: str, item: bytes, keep_s: float) -> None:
        self._add(kind, id, owner, [item], keep_s, "replace")

    def _add(self, kind: str, id: str, owner: str, items: Sequence[bytes], keep_s: float, how: str) -> None:
        keys = [f"mmagent:{kind}:{{{id}}}:owner", f"mmagent:{kind}:{{{id}}}:items"]
        if not self._append(keys=keys, args=[owner, int(keep_s * 1000), how, *items]):
            raise NotYoursError(f"{kind} {id!r} belongs to another key")
        index = f"mmagent:{kind}"
        self._redis.zadd(index, {id: time.time() + keep_s})
        self._redis.zremrangebyscore(index, "-inf", time.time())

    @_told
    def read(self, kind: str, id: str) -> Held | None:
        owner = self._redis.get(f"mmagent:{kind}:{{{id}}}:owner")
        if owner is None:
            return None
        return Held(owner.decode(), tuple(self._redis.lrange(f"mmagent:{kind}:{{{id}}}:items", 0, -1)))

    @_told
    def delete(self, kind: str, id: str) -> bool:
        self._redis.zrem(f"mmagent:{kind}", id)
        return bool(self._redis.delete(f"mmagent:{kind}:{{{id}}}:owner", f"mmagent:{kind}:{{{id}}}:items"))

    @_told
    def ids(self, kind: str, limit: int, before: str = "") -> list[str]:
        out: list[str] = []
        start = 0
        while len(out) < limit and (part := self._redis.zrevrange(f"mmagent:{kind}", start, start + _PART - 1)):
            out += [id for id in (each.decode() for each in part) if not before or id < before]
            start += _PART
        return out[:limit]

    @_told
    def count(self, kind: str, id: str, keep_s: float) -> int:
        key = f"mmagent:count:{kind}:{id}"
        found = int(self._redis.incr(key))
        if found == 1:
            self._redis.pexpire(key, int(keep_s * 1000))
        return found

    def close(self) -> None:
        self._redis.close()
