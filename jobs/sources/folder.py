"""A folder of pictures, sounds or texts with a sub-folder for each label; above them there may be folders of splits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.sources import SourceError
from jobs.sources.readers import SPLITS, RawRow, outlines

_KINDS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3"), "audio"),
    ".txt": "text",
}
_LITTER = frozenset({"thumbs.db", "desktop.ini"})  # what file managers leave behind


class Folder:
    shuffled = True

    def __init__(self, folder: Path, *, seed: int, prefix: str = "") -> None:
        self._folder, self._prefix = folder, prefix
        if not folder.is_dir():
            raise SourceError(f"{folder} is no folder, but one with a sub-folder for each label is wanted")
        tops = _folders(folder)
        named = bool(tops) and all(top.name.lower() in SPLITS for top in tops)
        # (file, split or None, label)
        self._files: list[tuple[Path, str | None, str]] = []
        for top in tops:
            for label in _folders(top) if named else [top]:
                split = SPLITS[top.name.lower()] if named else None
                self._files += [(file, split, label.name) for file in sorted(label.rglob("*")) if _wanted(file, label)]
        if not self._files:
            raise SourceError(f"{folder} has no files in sub-folders; {folder.name}/LABEL/FILE is wanted")
        random.Random(seed).shuffle(self._files)

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        for number, (file, split, label) in enumerate(self._files, 1):
            inner = file.relative_to(self._folder).as_posix()
            kind = _KINDS.get(file.suffix.lower())
            if kind is None:
                reason = ("unknown kind of file", f"{inner} is no picture, sound or text: {', '.join(_KINDS)}")
                yield RawRow(str(self._folder), number, self._prefix + inner, None, self._folder, inner, *reason)
                continue
            value: Any = {"bytes": None, "path": inner}
            if kind == "text":
                try:
                    value = "" if light else file.read_text(encoding="utf-8-sig")
                except UnicodeDecodeError as error:
                    reason = ("not UTF-8", f"{inner}: the bytes at {error.start} are not UTF-8")
                    yield RawRow(str(self._folder), number, self._prefix + inner, None, self._folder, inner, *reason)
                    continue
            values = {kind: value, "label": label}
            if split is not None:
                values["split"] = split
            yield RawRow(str(self._folder), number, self._prefix + inner, values, self._folder)

    def fingerprint(self) -> dict[str, Any]:
        return outlines((file for file, _, _ in self._files), self._folder)


def _folders(folder: Path) -> list[Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))


def _wanted(file: Path, above: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(above).parts)
    return file.is_file() and not hidden and file.name.lower() not in _LITTER
