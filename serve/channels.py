"""A channel: a name that serving follows. Its file is an append-only history; the last line says which bundle it is."""

from __future__ import annotations

import json
from pathlib import Path

from mmagent import storage


class ChannelError(ValueError):
    """A channel that does not exist or cannot be read."""


def bundle_of(name: str) -> str:
    """The bundle that a channel points to now.

    Raises:
        ChannelError: no such channel, or its last line names no bundle.
        StorageError: no name.
    """
    file: Path = storage.folder("channels", name).with_name(f"{name}.jsonl")
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except FileNotFoundError as error:
        known = ", ".join(sorted(other.stem for other in file.parent.glob("*.jsonl"))) or "none"
        raise ChannelError(
            f"there is no channel {name!r} ({file}); channels are: {known}. --bundle serves a bundle without a channel"
        ) from error
    try:
        bundle = json.loads(lines[-1])["bundle"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise ChannelError(f'{file}: its last line names no bundle; {{"bundle": PATH, ...}} is wanted') from error
    return str(bundle)
