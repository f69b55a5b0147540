"""What `ray job submit --working-dir` would send: measured before anything is packed, by Ray's own rules of what is
left out (.rayignore, .gitignore and what Ray always leaves out)."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MOST_BYTES = 200_000_000  # of files as they are; Ray takes 512 MiB of them packed, after minutes of packing
_NAMED = 5  # folders and files


class ParcelError(ValueError):
    """A working directory that is none: the message says what is large in it."""


def check(folder: Path) -> int:
    """The bytes that would be sent.

    Raises:
        ParcelError: far more than code is.
    """
    sizes: Counter[str] = Counter()

    def weigh(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size

    folder = folder.absolute()
    _travel(folder, weigh)
    total = sizes.total()
    if total <= _MOST_BYTES:
        return total
    largest = sizes.most_common(_NAMED)
    named = ", ".join(f"{name} {_written(size)}" for name, size in largest)
    lines = " ".join(f"/{name}" for name, size in largest if size > _MOST_BYTES / _NAMED)
    ignore = folder / ".rayignore"
    does = "Add to" if ignore.exists() else "Write"
    raise ParcelError(
        f"the working directory {folder} would be sent to every node with {_written(total)}, and "
        f"{_written(_MOST_BYTES)} at most are sensible; the largest in it: {named}. {does} {ignore} a line for each "
        f"that a job does not need ({lines or '/NAME'}); data belongs into the storage root"
    )


def _travel(folder: Path, weigh: Callable[[Path], Any]) -> None:
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    quiet = logging.getLogger(__name__)
    quiet.setLevel(logging.ERROR)
    left_out = [packaging._get_excludes(folder, ray_constants.get_runtime_env_default_excludes())]
    gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(folder, left_out, weigh, include_gitignore=gitignore, logger=quiet)


def _written(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
