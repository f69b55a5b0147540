"""Which bundles answer in this replica: the present one, and beside it a canary for a share of conversations.

The channel's file is the truth, and every replica follows it by itself: a bundle is loaded and warm before any request
meets it, an answer is one bundle's from its beginning to its end, and an old bundle goes when its last answer is given.
Ray Serve splits no traffic between versions; which bundle a request meets hangs on a hash of its conversation's name
(or its own id), so that a conversation does not change its mind between turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mmagent import bundle as bundle_folders
from mmagent import channels
from mmagent.bundle import BundleError
from mmagent.channels import Channel, ChannelError
from serve.loaded import Loaded, seal_of
from serve.store import Store

LOOK_EVERY_S = 0.5
_BEAT_S, _DEAD_S = 1.0, 5.0  # a replica says that it lives, and is taken for gone
_RETIRE_TIMEOUT_S = 120.0
_BEATS = "replica"

logger = logging.getLogger("mmagent.serve")


class Known(NamedTuple):
    """A bundle by what tells it from others."""

    name: str
    seal: str


class Bundles:
    """Belongs to one event loop.

    Args:
        current: what answers at first.
        channel: that is followed; none: the bundle never changes.
        load: makes a loaded bundle of a folder; slow, runs in a thread.
        replica: a name that no other process has.
    """

    def __init__(
        self,
        current: Loaded,
        channel: str | None,
        load: Callable[[Path], Loaded],
        store: Store,
        replica: str,
        thread: ThreadPoolExecutor,
    ) -> None:
        self.current, self.share = current, 0.0
        self.canary: Loaded | None = None
        self.former: Known | None = None  # that a promotion took out of service while this replica looked on
        self.channel, self.replica = channel, replica
        self._load, self._store, self._thread = load, store, thread
        self._users: dict[int, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._following = asyncio.Lock()
        self._stamp: tuple[int, int] | None = None
        self._spare: dict[tuple[str, str], Loaded] = {}  # staged, and not in service yet
        self._alive = 1
        self.trouble = ""  # why the channel's last line is not followed

    # -- requests --------------------------------------------------------------------------------------------------

    def pick(self, sticky: str, model: str | None) -> Loaded:
        """The bundle for a request.

        Args:
            sticky: the conversation's name, or the request's own id.
            model: a bundle's name: that one is meant, whatever the share.
        """
        if self.canary is None:
            return self.current
        if (
            model is not None
            and model in (self.current.name, self.canary.name)
            and self.current.name != self.canary.name
        ):
            return self.current if model == self.current.name else self.canary
        return self.canary if part_of(sticky) < self.share else self.current

    @contextlib.contextmanager
    def used(self, loaded: Loaded) -> Iterator[None]:
        """While a request is with a bundle, it stays."""
        self._users[id(loaded)] = self._users.get(id(loaded), 0) + 1
        try:
            yield
        finally:
            self._users[id(loaded)] -= 1

    @property
    def all(self) -> list[Loaded]:
        return [self.current] + ([self.canary] if self.canary is not None else [])

    @property
    def known(self) -> list[Known]:
        """Those whose answers may still be spoken of."""
        return [*(Known(each.name, each.seal) for each in self.all), *([self.former] if self.former else [])]

    @property
    def replicas(self) -> int:
        """How many replicas live, by what was heard last."""
        return self._alive

    # -- the channel -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to follow the channel, and to say that this replica lives."""
        loops = [self._beat(), *([self._watch()] if self.channel is not None else [])]
        self._tasks = [asyncio.get_running_loop().create_task(each) for each in loops]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for loaded in {id(each): each for each in (*self.all, *self._spare.values())}.values():
            await loaded.close()

    async def stage(self, folder: Path) -> Loaded:
        """A bundle, loaded and warm, that answers nobody yet.

        Raises:
            BundleError: see `mmagent.bundle.load`.
        """
        found = await self._ready(folder)
        self._spare[str(folder), found.seal] = found
        return found

    async def drop(self, loaded: Loaded) -> None:
        """A staged bundle is not wanted."""
        for key, held in list(self._spare.items()):
            if held is loaded:
                del self._spare[key]
        if loaded not in self.all:
            await loaded.close()

    async def follow(self) -> None:
        """Does what the channel's file says now.

        Raises:
            ChannelError, BundleError: it says nothing that can be done; what answered goes on.
        """
        assert self.channel is not None
        async with self._following:
            stamp = stamp_of(self.channel)
            wanted = channels.read(self.channel)
            current = await self._ready(Path(wanted.bundle))
            canary = await self._ready(Path(wanted.canary)) if wanted.canary else None
            before, was = self.all, Known(self.current.name, self.current.seal)
            if current.seal != was.seal:
                self.former = None if wanted.lines[-1].get("act") == "rollback" else was
            # No await between these: a request sees the one state or the other.
            self.current, self.canary, self.share = current, canary, wanted.share
            self._stamp, self.trouble = stamp, ""
            self._spare = {key: held for key, held in self._spare.items() if held not in self.all}
            for old in before:
                if old not in self.all:
                    self._tasks.append(asyncio.get_running_loop().create_task(self._retire(old)))
        await self._tell()

    async def everywhere(self, timeout_s: float) -> tuple[int, int]:
        """Waits until all replicas follow the channel's file as it is; how many do, and how many live."""
        end = time.monotonic() + timeout_s
        while True:
            beats = await self.heard()
            wanted = list(stamp_of(self.channel or "") or ())
            done = sum(beat["stamp"] == wanted for beat in beats)
            if done == len(beats) or time.monotonic() > end:
                return done, len(beats)
            await asyncio.sleep(0.2)

    def history(self) -> Channel | None:
        """The channel as its file has it; none: there is none, or it cannot be read."""
        try:
            return channels.read(self.channel) if self.channel is not None else None
        except (ChannelError, OSError):
            return None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            assert self.channel is not None
            if stamp_of(self.channel) == self._stamp:
                continue
            try:
                await self.follow()
            except (ChannelError, BundleError, OSError) as error:
                if self.trouble != str(error):
                    logger.error("the channel %s is not followed: %s", self.channel, error)
                self.trouble = str(error)
                await asyncio.sleep(5 * LOOK_EVERY_S)

    async def _ready(self, folder: Path) -> Loaded:
        """A bundle of a folder, loaded and warm: one that is here already, where its manifest is the same."""
        place = bundle_folders.find(folder)
        seal = seal_of(place)
        here = {(str(each.predictor.path), each.seal): each for each in (*self._spare.values(), *self.all)}
        if (known := here.get((str(place), seal))) is not None:
            return known
        loaded: Loaded = await self._run(self._load, place)
        try:
            await loaded.warm_up()
        except BaseException:
            await loaded.close()
            raise
        return loaded

    async def _retire(self, loaded: Loaded) -> None:
        end = time.monotonic() + _RETIRE_TIMEOUT_S
        while self._users.get(id(loaded), 0) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self._users.pop(id(loaded), None)
        await loaded.close()

    # -- other replicas --------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            try:
                await self._tell()
                self._alive = max(1, len(await self.heard()))
            except Exception:
                logger.exception("the store cannot be reached")
            await asyncio.sleep(_BEAT_S)

    async def _tell(self) -> None:
        beat = {
            "replica": self.replica,
            "pid": os.getpid(),
            "bundle": self.current.name,
            "canary": self.canary.name if self.canary else None,
            "share": self.share,
            "stamp": list(self._stamp or ()),
            "trouble": self.trouble,
        }
        await self._run(self._store.put, _BEATS, self.replica, "service", json.dumps(beat).encode(), _DEAD_S)

    async def heard(self) -> list[dict[str, Any]]:
        """What living replicas say of themselves."""

        def read() -> list[dict[str, Any]]:
            held = [self._store.read(_BEATS, id) for id in self._store.ids(_BEATS, 1000)]
            return [json.loads(each.items[0]) for each in held if each is not None]

        return list(await self._run(read))

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def part_of(sticky: str) -> float:
    """A number in [0, 1) that hangs on a name alone, evenly spread."""
    return int.from_bytes(hashlib.blake2b(sticky.encode(), digest_size=7).digest()) / 2**56


def stamp_of(channel: str) -> tuple[int, int] | None:
    """What changes with a channel's file; none: there is none."""
    try:
        state = channels.file(channel).stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size
