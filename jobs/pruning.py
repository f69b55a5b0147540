"""Deleting old runs and searches, but none that somebody needs.

What goes is first moved aside by a rename, under ROOT/.gone: a deletion that is interrupted leaves nothing half, and
the next one clears away what lies there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.lock import LockError, held, locked
from mmagent import channels, storage

GONE = ".gone"
KINDS = ("runs", "search")
_CHANGES = 3  # lines of a channel's history: the bundle that answers, and those of its last two changes
_LINEAGE = ("start.bundle", "model.backbone", "model.image.start", "model.audio.start", "model.image.checkpoint",
            "model.audio.checkpoint")  # fmt: skip


class PruneError(ValueError):
    """What is not deleted; the message says who holds it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A run or search, and what is known of it."""

    folder: Path
    used_s: float  # of the epoch: when it was last written to
    size: int  # bytes
    held: str  # why it stays, or nothing

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"


def found() -> list[Kept]:
    """All runs and searches, the oldest first."""
    folders = [place for kind in KINDS for place in (storage.root() / kind).glob("[!.]*") if place.is_dir()]
    holders = _holders(folders)
    made = [Kept(place, _used_s(place), _size(place), holders.get(place, "")) for place in folders]
    return sorted(made, key=lambda each: (each.used_s, each.name))


def over(quota_bytes: float, there: list[Kept]) -> list[Kept]:
    """What must go so that the rest fits, the oldest first; less where what stays is held."""
    total, going = sum(each.size for each in there), []
    for each in there:
        if total <= quota_bytes:
            break
        if not each.held:
            going.append(each)
            total -= each.size
    return going


def one(name: str) -> Kept:
    """The run or search of a name: NAME, runs/NAME or search/NAME.

    Raises:
        PruneError: there is none, or there are two.
    """
    there = [each for each in found() if name in (each.folder.name, each.name)]
    if len(there) != 1:
        known = ", ".join(each.name for each in there)
        raise PruneError(
            f"{name!r} is both: give one of {known}" if there else f"there is no run and no search {name!r} in "
            f"{storage.root()}; `python -m jobs.status` lists them"
        )  # fmt: skip
    return there[0]


def delete(each: Kept) -> None:
    """
    Raises:
        PruneError: somebody holds it.
    """
    if each.held:
        raise PruneError(f"{each.name} is not deleted: {each.held}")
    aside = storage.root() / GONE / f"{each.folder.parent.name}-{each.folder.name}-{time.time_ns()}"
    aside.parent.mkdir(exist_ok=True)
    try:
        with locked(each.folder):  # nobody goes on with it meanwhile
            os.rename(each.folder, aside)
    except LockError as error:
        raise PruneError(f"{each.name} is not deleted: {error}") from error
    shutil.rmtree(aside)


def sweep() -> None:
    """Clears away what an interrupted deletion left."""
    shutil.rmtree(storage.root() / GONE, ignore_errors=True)


# -- who holds what ----------------------------------------------------------------------------------------------------


def _holders(folders: list[Path]) -> dict[Path, str]:
    """Why a folder stays, for those that do."""
    out: dict[Path, str] = {}
    known = {place.resolve(): place for place in folders}

    def hold(path: str, why: str, by: Path | None = None) -> None:
        place = _owner(path, known)
        if place is not None and place != by:
            out.setdefault(place, why)

    for place in folders:
        if held(place):
            out[place] = f"process {held(place)} is working on it"
    for file in sorted((storage.root() / "channels").glob("*.jsonl")):
        try:
            state = channels.read(file.stem)
        except channels.ChannelError as error:  # nothing is deleted where it is not known what is served
            raise PruneError(f"nothing is deleted: {error}") from error
        hold(state.bundle, f"the channel {state.name} serves it")
        if state.canary:
            hold(state.canary, f"it is the canary of the channel {state.name}")
        for line in state.lines[-_CHANGES:]:
            hold(str(line["bundle"]), f"the channel {state.name} served it before one of its last two changes")
        if (before := state.before()) is not None:
            hold(before, f"a rollback of the channel {state.name} goes back to it")
    for place in folders:
        for path in _named(place):
            hold(path, f"{place.parent.name}/{place.name} began with it", by=place)
    for file in storage.root().glob("refine/*/r*/round.json"):
        told = json.loads(file.read_text())
        round_name = f"{told['channel']}-{file.parent.name}"
        hold(str(told["bundle"]), f"the round {round_name} began with it")
        if told["state"] == "begun":
            hold(str(storage.root() / "runs" / round_name), f"the round {round_name} goes on with it")
    searches = [place for place in folders if place.parent.name == "search"]
    if searches:
        out.setdefault(max(searches, key=_used_s), "it is the newest search")
    return out


def _owner(path: str, known: dict[Path, Path]) -> Path | None:
    """The run or search that a path lies in, or that a bundle's name means."""
    root = storage.root()
    given = Path(os.path.expanduser(path))
    tries = [given] if given.is_absolute() else [root / given, *(root / kind / given for kind in KINDS)]
    for each in tries:
        whole = each.resolve()
        for place in (whole, *whole.parents):
            if place in known:
                return known[place]
    return None


def _named(place: Path) -> Iterator[str]:
    """The bundles and backbones that a run, or a search's trials, began with."""
    for file in (place / "config.yaml", place / "search.yaml", place / "bundle" / "config.yaml"):
        if file.is_file():
            raw = yaml.safe_load(file.read_text()) or {}
            raw = raw.get("recipe", raw)
            for dotted in _LINEAGE:
                value: Any = raw
                for part in dotted.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
                if isinstance(value, str) and not re.match(r"\w+:", value):
                    yield value


def _used_s(place: Path) -> float:
    return max((each.stat().st_mtime for each in (place, *place.iterdir()) if each.exists()), default=0.0)


def _size(place: Path) -> int:
    total = 0
    for folder, _, files in os.walk(place):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # a run goes on while it is looked at
                continue
    return total
