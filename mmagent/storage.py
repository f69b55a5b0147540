"""Where state lies: one root (`MMAGENT_STORAGE`, default ``~/mmagent``), and how files are published in it.

Every path in a command or a recipe is absolute or relative to the root, never to the working directory, which is a
copy when a job is submitted. A file appears whole or not at all: it is written beside its place and renamed.

The root is a folder that all machines see, or object storage (``s3://bucket/prefix``). Then paths are those of a folder
of this machine that mirrors it (`mmagent.mirror`): `refresh` and `fetched` bring what others wrote, `send` what others
wait for, and `source` reads a shard where it lies. Where the root is a folder they do nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from mmagent.mirror import Mirror

ROOT_VARIABLE = "MMAGENT_STORAGE"
MIRROR_VARIABLE = "MMAGENT_MIRROR"
# What reaching object storage takes beside credentials, which a job gets where `ray start` was called.
_REACH = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class StorageError(ValueError):
    """A name or path in the storage root that cannot be used."""


def root() -> Path:
    """The storage root, made if it does not exist; of object storage the folder that mirrors it.

    Raises:
        StorageError: the variable holds no folder of this machine and no URL that is known, or storage that cannot be
            reached, read or written.
    """
    if (mirror := _mirror()) is not None:
        return mirror.folder
    value = _value()
    path = Path(os.path.expanduser(value.removeprefix("file://")))
    if not path.is_absolute():
        raise StorageError(f"{ROOT_VARIABLE} is {value!r}, but an absolute path is wanted")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the storage root {path} ({ROOT_VARIABLE}): {error.strerror}") from error
    return path


def is_remote() -> bool:
    """Whether the root is object storage."""
    value = _value()
    return "://" in value and not value.startswith("file://")


def variables() -> dict[str, str]:
    """What a process needs in its environment to have the same root; not the credentials."""
    if not is_remote():
        return {ROOT_VARIABLE: str(root())}
    reach = {name: os.environ[name] for name in _REACH if os.environ.get(name)}
    return {ROOT_VARIABLE: _value(), MIRROR_VARIABLE: str(root()), **reach}


def use(variables: Mapping[str, str]) -> None:
    """Gives this process the root of another, by its `variables`: a worker may have been started with another one."""
    os.environ.update(variables)


def _value() -> str:
    return os.environ.get(ROOT_VARIABLE) or "~/mmagent"


_mirrors: dict[tuple[str, str, int], Mirror] = {}


def _mirror() -> Mirror | None:
    """Of this process; none where the root is a folder.

    Raises:
        StorageError: storage that cannot be reached, read or written.
    """
    if not is_remote():
        return None
    url, place = _value().rstrip("/"), os.environ.get(MIRROR_VARIABLE, "")
    known = (url, place, os.getpid())
    if known not in _mirrors:
        from mmagent.mirror import Mirror

        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmagent" / name
        _mirrors[known] = Mirror(url, Path(place) if place else cache)
    return _mirrors[known]


def leave() -> None:
    """Sends what waits, and forgets the mirrors of this process: what a process does at its end."""
    while _mirrors:
        _, mirror = _mirrors.popitem()
        mirror.close()


def _mirrored(path: Path) -> Mirror | None:
    """The mirror, where a path lies in it."""
    mirror = _mirror()
    return mirror if mirror is not None and path.is_relative_to(mirror.folder) else None


def refresh(path: Path) -> None:
    """Brings what others wrote: a file, or the small files of a folder (configs, metrics, manifests)."""
    if (mirror := _mirrored(path)) is not None:
        mirror.refresh(path)


def watch(path: Path) -> None:
    """Has a thread `refresh` a path every few seconds."""
    if (mirror := _mirrored(path)) is not None:
        mirror.watch(path)


def fetched(path: Path) -> Path:
    """The path, once all of it is here."""
    if (mirror := _mirrored(path)) is not None:
        mirror.fetch(path)
    return path


def send(path: Path, patience_s: float = 120.0) -> None:
    """Returns when what was changed of a file or folder is where others find it.

    Raises:
        StorageError: storage refuses it, or is away for so long.
    """
    if (mirror := _mirrored(path)) is not None:
        mirror.send(path, patience_s)


def moved(source: Path, target: Path) -> None:
    """Tells storage that a folder has another name, once it has it here."""
    if (mirror := _mirrored(target)) is not None:
        mirror.move(source, target)
        mirror.send(target)


def removed(path: Path) -> None:
    """Tells storage that a file or folder is gone, once it is gone here."""
    if (mirror := _mirrored(path)) is not None:
        mirror.remove(path)


def source(file: str | Path) -> Any:
    """What pyarrow reads a file from: its path, or where it lies in storage."""
    path = Path(file)
    mirror = None if path.is_file() else _mirrored(path)
    return str(path) if mirror is None else mirror.open(path)


def size(file: str | Path) -> int:
    """A file's bytes.

    Raises:
        OSError: it is not there.
    """
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        if (mirror := _mirrored(Path(file))) is None:
            raise
        return mirror.size(Path(file))


@contextlib.contextmanager
def lease(path: Path) -> Iterator[None]:
    """Holds a name for this process among all machines; within one, see `jobs.lock`.

    Raises:
        StorageError: another process holds it.
    """
    mirror = _mirrored(path)
    if mirror is None:
        yield
        return
    from mmagent import lease as leases

    with leases.held(mirror.objects, path.relative_to(mirror.folder).as_posix(), mirror.ahead_s):
        yield


def portable(path: str | Path) -> str:
    """A path as others can use it: below the root where that is object storage, else as it is."""
    mirror = _mirrored(Path(path))
    return str(path) if mirror is None else Path(path).relative_to(mirror.folder).as_posix()


def folder(kind: str, name: str) -> Path:
    """``ROOT/kind/name``: a data set, a run, a search. The folder need not exist.

    Raises:
        StorageError: a name that is not letters, digits, ``.``, ``_`` and ``-``.
    """
    if not _NAME.fullmatch(name):
        raise StorageError(f"{name!r} is no name: letters, digits, '.', '_' and '-' are wanted, 100 at most")
    place = root() / kind / name
    refresh(place)
    return place


def resolve(path: str | Path) -> Path:
    """An absolute path as it is; a relative one below the root."""
    path = Path(os.path.expanduser(path))
    place = path if path.is_absolute() else root() / path
    refresh(place)
    return place


def digest(file: Path) -> str:
    """A file's sha256, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: beside its place, flushed to the disk, then renamed.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the old file, if any, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def publish_json(path: Path, value: Any) -> None:
    publish(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def publish_parquet(path: Path, table: pa.Table) -> None:
    # Imported here: the doctor asks for the root where no package is there yet.
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    publish(path, bytes(sink.getvalue()))
