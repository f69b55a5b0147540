"""The model in a deployment of its own (`serve.start --apart`): processes that speak HTTP and decode are many and want
CPUs, those that compute are few and want GPUs, and each kind is scaled by itself. It costs a hop, which several
questions make together.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.deployment import Application

from mmagent import bundle as bundle_folders
from mmagent import channels, storage
from mmagent.batch import Sample
from mmagent.bundle import BundleError
from mmagent.predictor import Predictor
from serve import engine as engines
from serve import logs, narrow
from serve.bundles import LOOK_EVERY_S, stamp_of
from serve.config import ServeConfig
from serve.engine import FAILURES, Here, Passed
from serve.loaded import seal_of

_FLIGHTS = 4  # calls of one bundle and process that are under way together: while one computes, others travel
_BUSY = 2  # calls in a replica above which another one is started
_TRIES, _AGAIN_S = 5, 0.5  # of a call whose replica died
_IDLE_S = 120.0  # a bundle that nobody has asked for so long, and that no channel names, goes

logger = logging.getLogger("mmagent.serve")


class Place(NamedTuple):
    """A bundle as one process names it to another."""

    folder: str
    seal: str


class Model:
    """A replica of the model: bundles with their weights. Ray calls the constructor, then asks for its health."""

    def __init__(self, bundle: str, channel: str | None, config: dict[str, Any], root: dict[str, str]) -> None:
        narrow.replica_port()
        logs.to_stderr()
        storage.use(root)
        self._config = ServeConfig.model_validate(config)
        self._channel = channel
        self._first = channels.read(channel).bundle if channel is not None else bundle
        self._kept: dict[Place, asyncio.Task[Here]] = {}
        self._used_s: dict[Place, float] = {}
        self._named: set[Place] = set()
        self._calls = 0
        self._watching: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """A replica that raises is replaced."""
        if self._watching is None or self._watching.done():
            await self.ready(_place(self._first))
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        for task in self._kept.values():
            if (engine := _done(task)) is not None and engine.failed_in_a_row >= FAILURES:
                raise RuntimeError(f"the last {engine.failed_in_a_row} forward passes failed")

    async def ready(self, place: Place) -> None:
        """Has a bundle loaded and warm. Raises what the bundle raises."""
        await self._loaded(place)

    async def answer(self, place: Place, samples: Sequence[Sample]) -> list[Passed | Exception]:
        """An answer or an error for each, so that a bad one costs the others nothing."""
        self._calls += len(samples)
        try:
            engine = await self._loaded(place)
            found = await asyncio.gather(*map(engine.answer, samples), return_exceptions=True)
        finally:
            self._calls -= len(samples)
        return [each if isinstance(each, tuple | Exception) else RuntimeError(str(each)) for each in found]

    async def write(self, place: Place, sample: Sample) -> AsyncIterator[str | Passed]:
        """The pieces of a text as it is written, then the answer."""
        engine, loop = await self._loaded(place), asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def hear(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self._calls += 1
        try:
            whole = loop.create_task(engine.answer(replace(sample, hear=hear)))
            whole.add_done_callback(lambda _: hear(None))
            try:
                while (piece := await pieces.get()) is not None:
                    yield piece
                yield await whole
            finally:
                whole.cancel()
        finally:
            self._calls -= 1

    async def aside(self, place: Place, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        return await (await self._loaded(place)).aside(function, *arguments)

    async def _loaded(self, place: Place) -> Here:
        place = Place(*place)
        self._used_s[place] = time.monotonic()
        task = self._kept.get(place)
        if task is None or (task.done() and _done(task) is None):
            task = self._kept[place] = asyncio.get_running_loop().create_task(self._load(place))
        return await asyncio.shield(task)

    async def _load(self, place: Place) -> Here:
        folder, config = Path(place.folder), self._config

        def load() -> Predictor:
            if (seal := seal_of(bundle_folders.find(folder))) != place.seal:
                raise BundleError(f"the bundle {folder} is another one ({seal}) than was asked for ({place.seal})")
            return engines.load(folder, config)

        predictor = await asyncio.get_running_loop().run_in_executor(None, load)
        engine = Here(
            predictor, batch_size=config.batch_size, batch_wait_s=config.batch_wait_ms / 1000,
            on_the_way=lambda: self._calls,
        )  # fmt: skip
        try:
            await engine.warm_up()
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _watch(self) -> None:
        """Has what the channel names ready before anybody asks for it, and lets go of what nobody asks for."""
        seen: tuple[int, int] | None = None
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                if self._channel is not None and (stamp := stamp_of(self._channel)) != seen:
                    wanted = channels.read(self._channel)
                    named = {_place(each) for each in (wanted.bundle, wanted.canary) if each}
                    await asyncio.gather(*map(self._loaded, named))
                    self._named, seen = named, stamp
                await self._let_go()
            except Exception as error:  # noqa: BLE001 - what answers goes on
                logger.error("the channel %s is not followed: %s", self._channel, error)
                await asyncio.sleep(10 * LOOK_EVERY_S)

    async def _let_go(self) -> None:
        newest = max(self._used_s.values(), default=0.0)
        for place, used_s in [*self._used_s.items()]:
            idle = time.monotonic() - used_s > _IDLE_S
            if idle and used_s != newest and place not in self._named and place in self._kept:
                task = self._kept.pop(place)
                del self._used_s[place]
                if (engine := _done(task)) is not None:
                    await engine.close()


class Far:
    """The engine of a bundle whose weights are in `Model`. Belongs to one event loop."""

    failed_in_a_row = 0  # a new process of this kind would not help

    def __init__(self, model: Any, place: Place, *, batch_size: int, on_batch: Callable[[int], None]) -> None:
        """
        Args:
            model: the handle of the deployment.
        """
        self._model, self._place = model, place
        self._size, self._on_batch = batch_size, on_batch
        self._queue: deque[tuple[Sample, asyncio.Future[Passed], float]] = deque()
        self._flights: set[asyncio.Task[None]] = set()

    async def answer(self, sample: Sample) -> Passed:
        if sample.hear is not None:
            return await self._written(sample)
        future: asyncio.Future[Passed] = asyncio.get_running_loop().create_future()
        self._queue.append((sample, future, time.perf_counter()))
        self._fly()
        return await future

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._called(lambda: self._model.aside.remote(self._place, function, arguments))

    async def warm_up(self) -> None:
        await self._called(lambda: self._model.ready.remote(self._place))

    async def close(self) -> None:
        for flight in self._flights:
            flight.cancel()
        await asyncio.gather(*self._flights, return_exceptions=True)
        for _, future, _ in self._queue:
            future.cancel()

    def _fly(self) -> None:
        while self._queue and len(self._flights) < _FLIGHTS:
            flight = asyncio.get_running_loop().create_task(self._flight())
            self._flights.add(flight)
            flight.add_done_callback(self._landed)

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        if not flight.cancelled():
            self._fly()

    async def _flight(self) -> None:
        """One call, with all that wait when it starts."""
        taken: list[tuple[Sample, asyncio.Future[Passed], float]] = []
        while self._queue and len(taken) < self._size:
            each = self._queue.popleft()
            if not each[1].done():  # its client went away
                taken.append(each)
        if not taken:
            return
        self._on_batch(len(taken))
        samples = [sample for sample, _, _ in taken]
        try:
            found: list[Passed | Exception] = await self._called(
                lambda: self._model.answer.remote(self._place, samples)
            )
        except asyncio.CancelledError:
            for _, future, _ in taken:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are told
            found = [error] * len(taken)
        for (_, future, since_s), passed in zip(taken, found, strict=True):
            if future.done():
                continue
            if isinstance(passed, Exception):
                future.set_exception(passed)
            else:
                future.set_result(_with_the_way(passed[0], since_s))

    async def _written(self, sample: Sample) -> Passed:
        started, heard = time.perf_counter(), 0
        assert sample.hear is not None
        handle = self._model.options(stream=True)
        for left in reversed(range(_TRIES)):
            try:
                async for piece in handle.write.remote(self._place, replace(sample, hear=None)):
                    if not isinstance(piece, str):
                        return _with_the_way(piece[0], started)
                    sample.hear(piece)
                    heard += 1
            except RayActorError:
                if heard or not left:  # what a client has read cannot be taken back
                    raise
                await asyncio.sleep(_AGAIN_S)
        raise RuntimeError("the model ended without an answer")

    async def _called(self, call: Callable[[], Any]) -> Any:
        """What a call brings; one whose replica died is made again: a forward pass changes nothing."""
        for left in reversed(range(_TRIES)):
            try:
                return await call()
            except RayActorError:
                if not left:
                    raise
                await asyncio.sleep(_AGAIN_S)
        raise AssertionError


def deployment(bundle: str, channel: str | None, config: ServeConfig, placed: dict[str, Any]) -> Application:
    """
    Args:
        placed: options of the replicas' actors: on which machines they run.
    """
    made: Any = serve.deployment(
        name="model",
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus} | placed,
        max_ongoing_requests=64,
        autoscaling_config=AutoscalingConfig(
            min_replicas=min(config.min_replicas, config.max_models),
            max_replicas=config.max_models,
            target_ongoing_requests=_BUSY,
            upscale_delay_s=config.upscale_delay_s,
            look_back_period_s=15,
            downscale_delay_s=config.downscale_delay_s,
        ),
        graceful_shutdown_timeout_s=20,
    )(Model)
    return made.bind(bundle, channel, config.model_dump(), storage.variables())


def _place(folder: str) -> Place:
    found = bundle_folders.find(folder)
    return Place(str(found), seal_of(found))


def _done(task: asyncio.Task[Here]) -> Here | None:
    return task.result() if task.done() and not task.cancelled() and task.exception() is None else None


def _with_the_way(answer: Any, since_s: float) -> Passed:
    """What was no forward pass was waiting, the way there and back among it."""
    return answer, max(0.0, time.perf_counter() - since_s - float(answer.timings_ms.get("forward", 0.0)) / 1000)
