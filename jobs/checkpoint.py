"""Checkpoints of a run: to resume, disposable, read only from the run's own folder.

    checkpoints/step_00000120/   each rank's part, loop.json (the loop's named state), marker.json (hashes; last)

A folder is filled under a draft name and renamed when its marker is in it; one without a marker, or whose files are
not what the marker says, is torn and passed over. A full disk costs the checkpoint being written, never an older one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent import storage

MARKER = "marker.json"
_FULL_BYTES = 1 << 20  # a disk with less room is full


class CheckpointError(OSError):
    """A checkpoint that could not be written; names the folder, and what is still usable."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    loop: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.loop["step"])


class Checkpoints:
    """The checkpoints of one run, seen from one rank.

    Args:
        folder: ``runs/NAME/checkpoints``.
        rank: this worker's; rank 0 seals and clears away.
        barrier: returns when every rank has called it, with True where all passed True.
        keep_last: newest ones kept, beside the best.
    """

    def __init__(self, folder: Path, *, rank: int, barrier: Callable[[bool], bool], keep_last: int) -> None:
        self._folder, self._rank, self._barrier, self._keep_last = folder, rank, barrier, keep_last

    def save(self, write: Callable[[Path], None], loop: Mapping[str, Any]) -> Path:
        """Writes a checkpoint; every rank calls it, with its own `write`.

        Raises:
            CheckpointError: on every rank, where any rank could not write.
        """
        final = self._folder / f"step_{loop['step']:08d}"
        draft = self._folder / f".draft_{final.name}"
        try:
            self._agree(self._attempt(lambda: _fresh(draft)) if self._rank == 0 else "")
            self._agree(self._attempt(lambda: write(draft)))
            self._agree(self._attempt(lambda: self._seal(draft, final, loop)) if self._rank == 0 else "")
        except CheckpointError:
            if self._rank == 0:
                shutil.rmtree(draft, ignore_errors=True)  # what is left of it would keep the disk full
            raise
        return final

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint."""
        for path in sorted(self._folder.glob("step_*"), reverse=True):
            if (found := _read(path)) is not None:
                return found
        return None

    def best(self) -> Checkpoint | None:
        """The whole checkpoint of the best validation score, of equal ones that of the lowest loss; the newest where
        none was scored."""
        found = [checkpoint for path in sorted(self._folder.glob("step_*")) if (checkpoint := _read(path))]
        return max(found, key=lambda each: (each.loop["score"], -each.loop["loss"], each.step), default=None)

    def _agree(self, fault: str) -> None:
        if not self._barrier(not fault):
            kept = self.latest()
            usable = f"the last good checkpoint is {kept.path}" if kept else "there is no earlier checkpoint"
            what = fault or "another rank could not write its part"
            raise CheckpointError(f"cannot write a checkpoint into {self._folder}: {what}; {usable}")

    def _attempt(self, action: Callable[[], None]) -> str:
        """Runs it; what went wrong in words, or nothing. torch reports a full disk as a RuntimeError of other words."""
        try:
            action()
        except (OSError, RuntimeError) as error:
            full = shutil.disk_usage(self._folder.parent).free < _FULL_BYTES
            return f"the disk is full ({error})" if full else str(error)
        return ""

    def _seal(self, draft: Path, final: Path, loop: Mapping[str, Any]) -> None:
        storage.publish_json(draft / "loop.json", dict(loop))
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        storage.publish_json(draft / MARKER, {str(file.relative_to(draft)): _sha256(file) for file in files})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
        self._clear()

    def _clear(self) -> None:
        best = self.best()
        for path in sorted(self._folder.glob("step_*"))[: -self._keep_last]:
            if best is None or path != best.path:
                shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> Checkpoint | None:
    try:
        marker = json.loads((path / MARKER).read_text())
        if any(_sha256(path / file) != digest for file, digest in marker.items()):
            return None
        return Checkpoint(path, json.loads((path / "loop.json").read_text()))
    except (OSError, ValueError):
        return None


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
