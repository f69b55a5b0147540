"""A folder of pictures, sounds or texts with a sub-folder for each label; above them there may be folders of splits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.sources import SourceError
from jobs.sources.readers import SPLITS, RawRow, outlines

_KINDS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"), "audio"),
    ".txt": "text",
}
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})  # what file managers leave behind


class Folder:
    shuffled = True

    def __init__(self, folder: Path, *, seed: int, prefix: str = "") -> None:
        self._folder, self._prefix = folder, prefix
        if not folder.is_dir():
            raise SourceError(f"{folder} is no folder, but one with a sub-folder for each label is wanted")
        tops = _folders(folder)
        others = [top.name for top in tops if top.name.lower() not in SPLITS]
        named = bool(tops) and not others
        if others and len(others) < len(tops) and any(SPLITS.get(top.name.lower()) == "train" for top in tops):
            splits = ", ".join(top.name for top in tops if top.name not in others)
            raise SourceError(
                f"{folder} has the folders {splits}, which name splits, beside {', '.join(others)}: a folder for each "
                "split and none else, or a folder for each label and none else, is wanted; move or rename the others"
            )
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
    found = (inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    return sorted(inner for inner in found if inner.name.lower() not in _LITTER)


def _wanted(file: Path, above: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(above).parts)
    return file.is_file() and not hidden and file.name.lower() not in _LITTER
