"""A channel: a name that serving follows. Its file is an append-only history, `channels/NAME.jsonl`.

    {"bundle": PATH, "share": 1.0, "act": "promote", "at_ms": ..., "by": ...}

A line with a share of 1 says which bundle answers from now on; one with less begins a canary beside it, which ends with
the next line of a share of 1.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent import storage


class ChannelError(ValueError):
    """A channel that does not exist or cannot be read."""


@dataclass(frozen=True, slots=True)
class Channel:
    """Where a channel stands.

    Args:
        lines: its history, the oldest first.
    """

    name: str
    bundle: str
    canary: str | None
    share: float  # of conversations that the canary answers
    lines: tuple[Mapping[str, Any], ...]

    def back(self) -> str | None:
        """What a rollback makes answer: the present bundle where there is a canary, else the one before."""
        return self.bundle if self.canary is not None else self.before()

    def before(self) -> str | None:
        """The bundle that answered before the present one; none: there was none."""
        past = [str(line["bundle"]) for line in self.lines if float(line.get("share", 1.0)) >= 1]
        return next((bundle for bundle in reversed(past) if bundle != self.bundle), None)


def file(name: str) -> Path:
    """Raises:
    StorageError: no name.
    """
    return storage.folder("channels", name).with_name(f"{name}.jsonl")


def read(name: str) -> Channel:
    """
    Raises:
        ChannelError: no such channel, or a line of its file names no bundle.
        StorageError: no name.
    """
    place = file(name)
    storage.refresh(place)
    try:
        text = place.read_text()
    except FileNotFoundError as error:
        known = ", ".join(sorted(other.stem for other in place.parent.glob("*.jsonl"))) or "none"
        raise ChannelError(
            f"there is no channel {name!r} ({place}); channels are: {known}. `python -m jobs.promote --bundle B "
            f"--channel {name}` makes it; --bundle serves a bundle without a channel"
        ) from error
    lines: list[dict[str, Any]] = []
    bundle, canary, share = "", None, 0.0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            named, part = str(found["bundle"]), float(found.get("share", 1.0))
        except (ValueError, KeyError, TypeError) as error:
            raise ChannelError(f'{place}, line {number}: names no bundle; {{"bundle": PATH, ...}} is wanted') from error
        if part >= 1:
            bundle, canary, share = named, None, 0.0
        else:
            canary, share = named, part
        lines.append(found)
    if not bundle:
        raise ChannelError(f'{place}: its last line names no bundle; {{"bundle": PATH, ...}} is wanted')
    return Channel(name, bundle, canary, share, tuple(lines))


def append(name: str, bundle: str | Path, *, share: float, act: str, by: str, **facts: Any) -> None:
    """Adds to the history, on the disk when it returns; writers take turns."""
    place = file(name)
    storage.refresh(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    line = {
        "bundle": storage.portable(bundle),
        "share": share,
        "act": act,
        "at_ms": int(time.time() * 1000),
        "by": by,
        **facts,
    }
    with open(place, "ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
        storage.send(place)
