"""Checkpoints of a run: to resume, disposable, read only from the run's own folder.

    checkpoints/step_00000120/   each rank's part, loop.json (the loop's named state), marker.json (hashes; last)

A checkpoint is begun at a step and finished beside the steps that follow. First every rank writes its part into a
staging folder: in the temporary folder of its machine, or beside the checkpoints where that is the same disk. Then a
thread on each rank hashes the files and brings them into a draft (by rename on the same disk, else by copy), and rank
0's seals it: when the hashes of all ranks are there it writes the marker and renames the draft. So a slow shared folder
costs the run nothing but the time of writing to a local disk. A folder without a marker, or whose files are not what
the marker says, is torn and passed over. A full disk costs the checkpoint being written, never an older one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent import storage

MARKER = "marker.json"
_HASHES = ".hashes"  # in a draft: a file for each rank whose part is whole
_FULL_BYTES = 1 << 20  # a disk with less room is full
_BLOCK_BYTES = 4 << 20
_LOOK_S = 0.05


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
    """The checkpoints of one run, seen from one rank. One at most is being written.

    Args:
        folder: ``runs/NAME/checkpoints``.
        rank: this worker's; rank 0 seals and clears away.
        barrier: returns when every rank has called it, with True where all passed True; never called by a thread.
        keep_last, keep_best: newest ones kept, and best ones beside them.
        world: how many ranks there are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        barrier: Callable[[bool], bool],
        keep_last: int,
        keep_best: int = 1,
        world: int = 1,
    ) -> None:
        self._folder, self._rank, self._world, self._barrier = folder, rank, world, barrier
        self._keep_last, self._keep_best = keep_last, keep_best
        self._thread: threading.Thread | None = None
        self._fault = ""  # of the thread, in words
        self._given_up = threading.Event()
        self._draft = self._staging = folder
        self.torn: list[str] = []  # what `latest` passed over: a line for each

    def begin(self, write: Callable[[Path], None], loop: Mapping[str, Any]) -> None:
        """Writes this rank's part into a staging folder and lets a thread bring it home; waits for the one before.
        Every rank calls it, with its own `write`, and gets a folder of its own; no two may write a file of one name.

        Raises:
            CheckpointError: on every rank, where any rank could not write.
        """
        self.wait()
        final = self._folder / f"step_{loop['step']:08d}"
        self._draft = self._folder / f".draft_{final.name}"
        try:
            self._agree(self._attempt(self._prepare) if self._rank == 0 else "")
            self._agree(self._attempt(lambda: self._stage(write)))
        except CheckpointError:
            self._sweep()
            raise
        self._fault, self._given_up = "", threading.Event()
        self._thread = threading.Thread(
            target=self._finish, args=(final, dict(loop)), daemon=True, name="checkpoint"
        )  # fmt: skip
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank's thread met an error, which the next `wait` raises on every rank."""
        return bool(self._fault)

    def wait(self) -> None:
        """Returns when the checkpoint that is being written, if any, is sealed. Every rank calls it.

        Raises:
            CheckpointError: on every rank, where any rank could not write.
        """
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            if self._rank != 0:
                thread.join()
            try:  # rank 0's thread waits for the parts of the others: first it is known whether they come
                self._agree(self._fault)
            except CheckpointError:
                self._given_up.set()
                thread.join()
                raise
            thread.join()
            self._agree(self._fault)
        except CheckpointError:
            self._sweep()
            raise

    def save(self, write: Callable[[Path], None], loop: Mapping[str, Any]) -> Path:
        """Writes a checkpoint and waits until it is sealed; every rank calls it.

        Raises:
            CheckpointError: as `begin` and `wait`.
        """
        self.begin(write, loop)
        self.wait()
        return self._folder / f"step_{loop['step']:08d}"

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; `torn` says which newer ones are not."""
        self.torn = []
        storage.refresh(self._folder)
        for path in sorted(self._folder.glob("step_*"), reverse=True):
            fault = _fault_of(storage.fetched(path))
            if not fault:
                return Checkpoint(path, _loop_of(path))
            self.torn.append(f"the checkpoint {path} is torn and passed over: {fault}")
        return None

    def best(self) -> Checkpoint | None:
        """The whole checkpoint of the best validation score, of equal ones that of the lowest loss; the newest where
        none was scored."""
        storage.refresh(self._folder)
        return next((found for found in self._by_score() if not _fault_of(storage.fetched(found.path))), None)

    # -- one rank's thread -------------------------------------------------------------------------------------

    def _finish(self, final: Path, loop: Mapping[str, Any]) -> None:
        fault = self._attempt(self._bring)
        if not fault and self._rank == 0:
            fault = self._attempt(lambda: self._seal(final, loop))
        shutil.rmtree(self._staging, ignore_errors=True)
        self._fault = fault

    def _bring(self) -> None:
        """Moves this rank's part into the draft, and says so by its hashes."""
        hashes = {}
        for file in sorted(file for file in self._staging.rglob("*") if file.is_file()):
            place = file.relative_to(self._staging)
            (self._draft / place).parent.mkdir(parents=True, exist_ok=True)
            hashes[str(place)] = _carry(file, self._draft / place)
        # A rank of another machine has no draft here: it brings its part by way of storage.
        storage.send(self._draft)
        told = self._draft / _HASHES / f"rank_{self._rank}.json"
        storage.publish_json(told, hashes)
        storage.send(told)

    def _seal(self, final: Path, loop: Mapping[str, Any]) -> None:
        told = [self._draft / _HASHES / f"rank_{rank}.json" for rank in range(self._world)]
        while not all(file.exists() for file in told):
            if self._given_up.wait(_LOOK_S):
                return
            for file in told:
                storage.refresh(file)
        hashes: dict[str, str] = {}
        for part in (json.loads(file.read_text()) for file in told):
            if twice := hashes.keys() & part.keys():
                raise OSError(f"two ranks wrote {min(twice)}")
            hashes |= part
        storage.publish_json(self._draft / "loop.json", dict(loop))
        hashes["loop.json"] = storage.digest(self._draft / "loop.json")
        shutil.rmtree(self._draft / _HASHES)
        storage.removed(self._draft / _HASHES)
        storage.publish_json(self._draft / MARKER, hashes)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(self._draft, final)
        storage.moved(self._draft, final)
        self._clear()

    def _clear(self) -> None:
        newest = sorted(self._folder.glob("step_*"))[-self._keep_last :]
        best = [found.path for found in self._by_score()[: self._keep_best]]
        for path in self._folder.glob("step_*"):
            if path not in (*newest, *best):
                shutil.rmtree(path, ignore_errors=True)
                storage.removed(path)

    # ----------------------------------------------------------------------------------------------------------

    def _by_score(self) -> list[Checkpoint]:
        """The best first. Their files are not read, which would cost as much as writing them."""
        found = []
        for path in self._folder.glob("step_*"):
            try:
                json.loads((path / MARKER).read_text())
                found.append(Checkpoint(path, _loop_of(path)))
            except (OSError, ValueError):
                continue
        return sorted(found, key=lambda each: (each.loop["score"], -each.loop["loss"], each.step), reverse=True)

    def _prepare(self) -> None:
        """An empty draft, in the place of what killed attempts left."""
        for path in self._folder.glob(".draft*"):
            shutil.rmtree(path, ignore_errors=True)
            storage.removed(path)
        self._draft.mkdir(parents=True)

    def _stage(self, write: Callable[[Path], None]) -> None:
        local = Path(tempfile.gettempdir())
        if local.stat().st_dev == self._folder.stat().st_dev:
            self._staging = self._draft.with_name(f"{self._draft.name}.rank_{self._rank}")
        else:  # of one name for each run and rank: what a killed one left is cleared away by the next
            run = hashlib.sha256(str(self._folder).encode()).hexdigest()[:16]
            self._staging = local / f"mmagent-checkpoint-{run}-rank_{self._rank}"
            shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(mode=0o700)
        try:
            write(self._staging)
        except BaseException:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise

    def _sweep(self) -> None:
        """What is left of a checkpoint that failed would keep the disk full."""
        if self._staging != self._folder:
            shutil.rmtree(self._staging, ignore_errors=True)
        if self._rank == 0:
            shutil.rmtree(self._draft, ignore_errors=True)

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
        except storage.StorageError as error:
            return str(error)
        except (OSError, RuntimeError) as error:
            full = shutil.disk_usage(self._folder.parent).free < _FULL_BYTES
            return f"the disk is full ({error})" if full else str(error)
        return ""


def _fault_of(path: Path) -> str:
    """Why a checkpoint cannot be trusted; empty where it can."""
    try:
        marker = json.loads((path / MARKER).read_text())
        for file, digest in marker.items():
            if storage.digest(path / file) != digest:
                return f"{file} is not what was written"
        _loop_of(path)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"{MARKER} or a file that it names cannot be read ({error})"
    return ""


def _loop_of(path: Path) -> dict[str, Any]:
    loop: dict[str, Any] = json.loads((path / "loop.json").read_text())
    return loop


def _carry(source: Path, target: Path) -> str:
    """Brings a file to its place, on the disk for good; its hash, made while it is read."""
    if source.stat().st_dev == target.parent.stat().st_dev:
        digest = storage.digest(source)
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        os.replace(source, target)
        return digest
    made = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            made.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    return made.hexdigest()
