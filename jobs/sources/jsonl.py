"""JSON Lines: an object a line, with media as paths relative to the file, or base64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.sources import SourceError
from jobs.sources.readers import RawRow, digest

_MAX_LINE_BYTES = 256 << 20


class JsonLines:
    shuffled = False

    def __init__(self, file: Path, prefix: str = "") -> None:
        self._file, self._prefix = file, prefix

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        name, root = str(self._file), self._file.parent
        with open(self._file, "rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MAX_LINE_BYTES), b""), 1):
                if len(line) == _MAX_LINE_BYTES:
                    raise SourceError(
                        f"{name} row {number} is longer than {_MAX_LINE_BYTES >> 20} MB: is it JSON Lines?"
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.lstrip().startswith(b"["):
                        raise SourceError(
                            f"{name} begins with '[': one JSON array, but an object a line is wanted; "
                            f"convert it, for instance by `jq -c '.[]' {self._file.name} > rows.jsonl`"
                        )
                if not line.strip():
                    continue
                default_id = f"{self._prefix}{self._file.stem}-{number}"
                try:
                    values = json.loads(line.decode())
                except UnicodeDecodeError as error:
                    bad = ("not UTF-8", f"the bytes at {error.start} are not UTF-8")
                except (ValueError, RecursionError) as error:
                    bad = ("not JSON", f"not JSON: {error}")
                else:
                    if isinstance(values, dict):
                        yield RawRow(name, number, default_id, values, root)
                        continue
                    bad = ("not an object", f"the line holds {type(values).__name__}, but an object is wanted")
                yield RawRow(name, number, default_id, None, root, line.decode(errors="backslashreplace"), *bad)

    def fingerprint(self) -> dict[str, Any]:
        return {self._file.name: digest(self._file)}
