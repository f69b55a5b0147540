"""Pictures and sounds as a user's row names them: a path, base64, a data URI, raw bytes, or ``{"bytes", "path"}``.

Files are read here, so that a record stands alone, but none above a limit.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmagent.record import Media, RecordError


def attached(row: Mapping[str, Any], kind: str, root: Path | None, limit: int | None) -> tuple[Media, ...]:
    """The media of one kind: of the column ``images`` (a list, or JSON text of one), or else of ``image``.

    Args:
        kind: image or audio.
        root: paths are relative to it.
        limit: bytes of the largest file that is read.

    Raises:
        RecordError: what cannot be read, and its place in the row.
    """
    many = row.get(f"{kind}s")
    if many is None or many == "":
        one = row.get(kind)
        return () if one is None or one == "" else (media_of(one, kind, root, limit),)
    many = unpacked(many, f"{kind}s")
    if isinstance(many, (str, bytes, Mapping)):
        many = [many]
    if not isinstance(many, Sequence):
        raise RecordError(f"{kind}s is {many!r:.80}, but a list is wanted", f"{kind}s")
    return tuple(media_of(value, f"{kind}s[{index}]", root, limit) for index, value in enumerate(many))


def media_of(value: Any, place: str, root: Path | None, limit: int | None) -> Media:
    """One picture or sound; `place` is what an error calls it.

    Raises:
        RecordError: it cannot be read.
    """
    if isinstance(value, bytes):
        return Media(value)
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            raw = value["bytes"]
            return Media(raw if isinstance(raw, bytes) else decode_base64(raw, place), value.get("path"))
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise RecordError(f"{place} is {value!r:.80}, but a path, base64 or {{bytes, path}} is wanted", place)
    if value.startswith("data:"):
        return Media(decode_base64(value.partition(",")[2], place))
    file = Path(value) if root is None else root / value
    # Base64 of any real picture or sound is far longer than a path may be, so a short value is always a path.
    if len(value) < 1024 or file.suffix:
        try:
            return Media(_read_file(file, place, limit), file.name if Path(value).is_absolute() else value)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            if isinstance(error, RecordError):
                raise
            if len(value) < 1024:
                reason = getattr(error, "strerror", None) or error
                raise RecordError(f"{place}: cannot read the file {file}: {reason}", place) from error
    return Media(decode_base64(value, place))


def decode_base64(text: str, place: str) -> bytes:
    """Strict base64 (white space allowed).

    Raises:
        RecordError: naming `place`.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"{place} is not valid base64: {error}", place) from error


def unpacked(value: Any, place: str) -> Any:
    """A cell that holds JSON text of a list or an object (all a CSV can do), as what it says; else as it is.

    Raises:
        RecordError: it begins like JSON and is none.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{place} begins like JSON, but is none: {error}", place) from error


def _read_file(file: Path, place: str, limit: int | None) -> bytes:
    size = file.stat().st_size
    if not file.is_file():
        raise RecordError(f"{place}: {file} is a folder or a device, but a file is wanted", place)
    if limit is not None and size > limit:
        raise RecordError(f"{place}: {file} has {size} bytes; the limit max_media_bytes is {limit}", place)
    return file.read_bytes()
