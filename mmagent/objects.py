"""Object storage behind one URL: listed, read, written, with patience, and with errors that say what to do.

    Objects("s3://bucket/prefix")      also gs://, abfs://, hdfs://, or any URL that fsspec knows

An S3 server of one's own is named by ``AWS_ENDPOINT_URL``, or in the URL: ``?endpoint_override=http://HOST:PORT``.
Keys are paths below the URL. An object appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from mmagent.storage import StorageError

if TYPE_CHECKING:
    import pyarrow.fs as pafs

PATIENCE_S = 60.0
_BLOCK_BYTES = 4 << 20
_LONGEST_PAUSE_S = 15.0
# What storage says when it is busy or away, in the words of AWS' client, of sockets and of fsspec's file systems.
_TRANSIENT = (
    "slow_down", "slowdown", "503", "500", "internal_failure", "internalerror", "unavailable", "throttl", "timed out",
    "timeout", "connect", "curlcode", "reset by peer", "broken pipe",
)  # fmt: skip
_T = TypeVar("_T")


class ObjectsError(OSError, StorageError):
    """Storage that cannot be reached, read or written; the message says what it answered and what to do."""


@dataclass(frozen=True, slots=True)
class Object:
    key: str
    size: int
    mtime_ns: int  # by storage's clock; 0 where it tells none


class Objects:
    """
    Raises:
        ObjectsError: a URL that nothing here speaks.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, self._base = _connect(url)
        except (ValueError, ImportError, OSError) as error:
            raise ObjectsError(_explained(error, url, "cannot be used")) from error

    def list(self, key: str) -> list[Object]:
        """The objects below a key, or the one that it names; none where nothing is there."""
        from pyarrow import fs as pafs

        def look() -> list[Any]:
            below = pafs.FileSelector(self._path(key), recursive=True, allow_not_found=True)
            with contextlib.suppress(NotADirectoryError):
                if found := self._fs.get_file_info(below):
                    return list(found)
            return list(self._fs.get_file_info([self._path(key)]))

        infos = self._tried(look, "cannot be listed")
        return [self._of(info) for info in infos if info.type == pafs.FileType.File]

    def about(self, key: str, patience_s: float = PATIENCE_S) -> Object:
        """
        Raises:
            FileNotFoundError: there is none.
        """
        from pyarrow import fs as pafs

        [info] = self._tried(lambda: self._fs.get_file_info([self._path(key)]), "cannot be read", patience_s)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(2, f"not in {self.url}", key)
        return self._of(info)

    def open(self, key: str) -> Any:
        """For pyarrow, to read pieces of."""
        return self._tried(lambda: self._fs.open_input_file(self._path(key)), "cannot be read")

    def read(self, key: str) -> bytes:
        """
        Raises:
            FileNotFoundError: there is none.
        """

        def copy() -> bytes:
            with self._fs.open_input_stream(self._path(key)) as stream:
                return bytes(stream.read())

        return self._tried(copy, "cannot be read")

    def fetch(self, found: Object, target: Path) -> None:
        """Copies an object into a file.

        Raises:
            FileNotFoundError: it is gone.
        """

        def copy() -> None:
            with self._fs.open_input_stream(self._path(found.key)) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, _BLOCK_BYTES)
            if (size := target.stat().st_size) != found.size:
                raise OSError(f"timeout: {size} of {found.size} bytes of {found.key} came")

        self._tried(copy, "cannot be read")

    def put(self, file: Path, key: str, patience_s: float = PATIENCE_S) -> int:
        """Copies a file, as long as it is when this begins, into an object; its bytes.

        Raises:
            FileNotFoundError: the file is gone.
            ObjectsError: also where what arrived is not as long as what was sent.
        """

        def copy() -> int:
            size, sent = file.stat().st_size, 0
            with open(file, "rb") as source, self._fs.open_output_stream(self._path(key)) as target:
                while block := source.read(min(_BLOCK_BYTES, size - sent)):
                    target.write(block)
                    sent += len(block)
            self._check(key, sent)
            return sent

        return self._tried(copy, "cannot be written", patience_s)

    def write(self, key: str, data: bytes, patience_s: float = PATIENCE_S) -> None:
        def copy() -> None:
            with self._fs.open_output_stream(self._path(key)) as stream:
                stream.write(data)
            self._check(key, len(data))

        self._tried(copy, "cannot be written", patience_s)

    def _check(self, key: str, sent: int) -> None:
        if (arrived := self.about(key).size) != sent:
            raise OSError(f"timeout: {arrived} of {sent} bytes of {key} arrived")

    def delete(self, key: str) -> None:
        """No error where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self._fs.delete_file(self._path(key)), "cannot be written")

    def move(self, key: str, to: str) -> None:
        self._tried(lambda: self._fs.move(self._path(key), self._path(to)), "cannot be written")

    def _tried(self, act: Callable[[], _T], what: str, patience_s: float = PATIENCE_S) -> _T:
        """Again where storage is busy or away, with pauses that double.

        Raises:
            FileNotFoundError: no such object or file.
            ObjectsError: it refuses, or is away for longer than `patience_s`.
        """
        end, pause_s = time.monotonic() + patience_s, 0.25
        while True:
            try:
                return act()
            except (FileNotFoundError, ObjectsError) as error:
                if isinstance(error, ObjectsError) or not _lacks_bucket(error):
                    raise
                raise ObjectsError(_explained(error, self.url, what)) from error
            except OSError as error:
                lasting = not any(sign in str(error).lower() for sign in _TRANSIENT)
                if lasting or time.monotonic() + pause_s > end:
                    raise ObjectsError(_explained(error, self.url, what)) from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}".rstrip("/")

    def _of(self, info: pafs.FileInfo) -> Object:
        return Object(info.path.removeprefix(self._base).lstrip("/"), int(info.size), int(info.mtime_ns or 0))


def _connect(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URL and the path in it: pyarrow's own where it has one, else fsspec's."""
    import pyarrow as pa
    from pyarrow import fs as pafs

    parts = urlsplit(url)
    if parts.scheme == "s3":
        asked = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if unknown := set(asked) - {"endpoint_override", "region", "scheme"}:
            raise ValueError(f"it says {min(unknown)!r}; endpoint_override, region and scheme are known")
        s3 = pafs.S3FileSystem(
            endpoint_override=asked.get("endpoint_override") or _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
            scheme=asked.get("scheme"),
            region=asked.get("region") or _variable("AWS_REGION", "AWS_DEFAULT_REGION"),
            connect_timeout=5,
            request_timeout=60,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=2),
            allow_delayed_open=True,  # a small file in one request
        )
        return s3, f"{parts.netloc}{parts.path}".strip("/")
    try:
        made, path = pafs.FileSystem.from_uri(url)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec

        other, path = fsspec.core.url_to_fs(url)
        made = pafs.PyFileSystem(pafs.FSSpecHandler(other))
    return made, str(path).rstrip("/")


def _variable(*names: str) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)


def _explained(error: Exception, url: str, what: str) -> str:
    """What storage said, with what to do."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"the storage root {url} {what}: {said:.300} ({_advice(error, url)})"


def _advice(error: Exception, url: str) -> str:
    lower = str(error).lower().replace("_", "")
    if isinstance(error, ImportError):
        return f"install the package that speaks {urlsplit(url).scheme}:// for fsspec: pip install gcsfs, adlfs, ..."
    if "nosuchbucket" in lower or "bucket does not exist" in lower or _lacks_bucket(error):
        return "make the bucket, or correct MMAGENT_STORAGE: none is made for you"
    if "timetooskewed" in lower:
        return "set this machine's clock: timedatectl set-ntp true"
    if any(sign in lower for sign in ("invalidaccesskey", "signature", "unrecognizedclient", "invalidclienttoken")):
        return "the credentials are wrong: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, where `ray start` was called"
    if any(sign in lower for sign in ("accessdenied", "access denied", "403", "forbidden", "no credentials")):
        return (
            "no credentials, or none with the right to list, read, write and delete there: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a role, where `ray start` was called"
        )
    if any(sign in str(error).lower() for sign in _TRANSIENT):
        return "it is away or busy: look at the address (AWS_ENDPOINT_URL), and try again"
    return "correct MMAGENT_STORAGE, or what it names"


def _lacks_bucket(error: Exception) -> bool:
    lower = str(error).lower()
    return "bucket" in lower and " key " not in lower and "path does not exist" in lower
