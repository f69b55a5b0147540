"""WebDataset: tar files in which neighbours of one name and several endings are one row (arXiv:2001.01858).

``.txt`` is the text, ``.cls`` the label, ``.json`` an object of further fields, ``.jpg .png ...`` a picture and
``.wav .flac ...`` a sound; ``--map answer=text`` makes the text the answer (captions, transcripts). Other endings are
left alone. Several tars are a folder or a pattern; ``train-000.tar``, ``test/000.tar`` name their split.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jobs.sources import SourceError
from jobs.sources.readers import RawRow, outlines, split_of

_FIELDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "images"),
    **dict.fromkeys(("wav", "flac", "ogg", "mp3"), "audios"),
    **dict.fromkeys(("txt", "text"), "text"),
    **dict.fromkeys(("cls", "cls2"), "label"),
    "json": "json",
}


class WebDataset:
    shuffled = False

    def __init__(self, files: list[Path], place: Path, prefix: str = "") -> None:
        """`place`: the one file, or the folder that all of them are in."""
        self._files, self._place, self._prefix = files, place, prefix

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        for file in self._files:
            split = split_of(file, self._place)
            inner = file.name if file == self._place else file.relative_to(self._place).as_posix()
            for number, (key, members) in enumerate(_groups(file, light), 1):
                default_id = f"{self._prefix}{inner}/{key}"
                values: dict[str, Any] = {} if split is None else {"split": split}
                for ending, data in members:
                    reason = _add(values, ending, data, light)
                    if reason:
                        told = ("not readable", f"{key}.{ending}: {reason}")
                        yield RawRow(str(file), number, default_id, None, None, f"{key}.{ending}", *told)
                        break
                else:
                    yield RawRow(str(file), number, default_id, values, file.parent)

    def fingerprint(self) -> dict[str, Any]:
        return outlines(self._files, self._place.parent if self._place.is_file() else self._place)


def _groups(file: Path, light: bool) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Each key with its members in their order: ending and data, no data for media where `light`."""
    key = ""
    members: list[tuple[str, bytes]] = []
    try:
        with tarfile.open(file, "r|*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                name, _, ending = path.name.partition(".")
                if not member.isfile() or not name or not ending:
                    continue
                new = str(path.with_name(name))
                if new != key and members:
                    yield key, members
                    members = []
                key, last = new, ending.lower().rpartition(".")[2]
                if last in _FIELDS:
                    wanted = not (light and _FIELDS[last] in ("images", "audios"))
                    stream = tar.extractfile(member) if wanted else None
                    members.append((ending.lower(), stream.read() if stream else b""))
        if members:
            yield key, members
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{file} cannot be read as a tar, after {key or 'nothing'}: {error}") from error


def _add(values: dict[str, Any], ending: str, data: bytes, light: bool) -> str:
    """Puts a member into the row; why not, or nothing."""
    field = _FIELDS[ending.rpartition(".")[2]]
    if field in ("images", "audios"):
        values.setdefault(field, []).append(None if light else {"bytes": data, "path": None})
        return ""
    try:
        text = data.decode("utf-8-sig")
        if field == "json":
            found = json.loads(text)
            if not isinstance(found, dict):
                return f"it holds {type(found).__name__}, but an object is wanted"
            values.update(found)
        else:
            values[field] = text.strip()
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""
