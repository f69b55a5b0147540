"""Where state lies: one root (`MMAGENT_STORAGE`, default ``~/mmagent``), and how files are published in it.

Every path in a command or a recipe is absolute or relative to the root, never to the working directory, which is a
copy when a job is submitted. A file appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

ROOT_VARIABLE = "MMAGENT_STORAGE"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class StorageError(ValueError):
    """A name or path in the storage root that cannot be used."""


def root() -> Path:
    """The storage root, made if it does not exist.

    Raises:
        StorageError: the variable holds something that is not a folder of this machine.
    """
    value = os.environ.get(ROOT_VARIABLE) or "~/mmagent"
    if "://" in value and not value.startswith("file://"):
        raise StorageError(
            f"{ROOT_VARIABLE} is {value!r}; only folders are supported, e.g. {ROOT_VARIABLE}=/data/mmagent"
        )
    path = Path(os.path.expanduser(value.removeprefix("file://")))
    if not path.is_absolute():
        raise StorageError(f"{ROOT_VARIABLE} is {value!r}, but an absolute path is wanted")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the storage root {path} ({ROOT_VARIABLE}): {error.strerror}") from error
    return path


def use(root: Path) -> None:
    """Makes a folder the storage root of this process: a worker may have been started with another."""
    os.environ[ROOT_VARIABLE] = str(root)


def folder(kind: str, name: str) -> Path:
    """``ROOT/kind/name``: a data set, a run, a search. The folder need not exist.

    Raises:
        StorageError: a name that is not letters, digits, ``.``, ``_`` and ``-``.
    """
    if not _NAME.fullmatch(name):
        raise StorageError(f"{name!r} is no name: letters, digits, '.', '_' and '-' are wanted, 100 at most")
    return root() / kind / name


def resolve(path: str | Path) -> Path:
    """An absolute path as it is; a relative one below the root."""
    path = Path(os.path.expanduser(path))
    return path if path.is_absolute() else root() / path


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
