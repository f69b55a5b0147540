"""Worker groups that stay: runs take turns in them, and find torch, Transformers and DeepSpeed imported, the processes
joined, and the validation rows read. A search's trials are such runs.

A *lane* is one group under Ray Train (`jobs.workers.stay`). The *desk* is an actor between those who want something
trained and the lanes: it keeps who waits, hands each rank of a lane the same job, and carries what a run reports to
whoever asked for it, who says whether the run goes on. A run waits for that word: nobody trains what is not wanted any
more, and a search takes the same course every time, whatever the timing.

A job whose workers die is started again in the lane's next group, from its last checkpoint, as often as
`cluster.max_failures` says; then it is given up, with its reason, and the lane goes on with the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle

from jobs import placement, stream, workers
from jobs.cluster import ClusterError
from jobs.loop import STOP_FILE
from jobs.recording import Recording
from jobs.run import Stream
from jobs.workers import Final, Group
from mmagent.config import Config

_STOP_TIMEOUT_S = 60.0  # a step, its validation and its checkpoint
_WORD_TIMEOUT_S = 5.0  # for who asked for a run to say whether it goes on, where another job wants its lane
_OF = "#"  # between a run's name and a job's number


class LaneError(RuntimeError):
    """A job that failed, or lanes that are gone; the message is the workers'."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a lane is to do."""

    name: str  # RUN#NUMBER
    work: Callable[[Group], None]
    streams: Mapping[str, Stream]
    config: Config
    folder: Path  # of the run


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there is to know of a job: a report of its run, after which it waits; or its end, with words where it
    failed."""

    report: Mapping[str, float] | None = None
    failed: str = ""
    put_off: bool = False  # it gave its lane to another: asked for again, it goes on from its last checkpoint


@dataclass(slots=True)
class _Standing:
    """A job at the desk."""

    name: str
    given: bytes  # the job, which only workers open
    failures_left: int
    outcomes: asyncio.Queue[Outcome] = field(default_factory=asyncio.Queue)
    words: asyncio.Queue[bool] = field(default_factory=asyncio.Queue)  # whether to go on, one for each report
    reported: bool = False  # and nobody has said yet whether it goes on
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Lane:
    starts: int = 0
    taken: list[_Standing] = field(default_factory=list)  # by the present group, in order
    again: deque[_Standing] = field(default_factory=deque)  # that the group before did not finish


class Desk:
    """See the module. An actor; all methods return soon but those that wait for somebody."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Standing] = {}  # that are not over
        self._waiting: deque[_Standing] = deque()
        self._lanes: dict[int, _Lane] = {}
        self._open = True
        self._changed = asyncio.Condition()

    # -- who wants something trained -------------------------------------------------------------------------------

    async def submit(self, name: str, given: bytes, failures: int) -> None:
        self._jobs[name] = standing = _Standing(name, given, failures)
        self._waiting.append(standing)
        await self._notify()

    async def outcome(self, name: str) -> Outcome:
        """The next of a job's outcomes; to ask for it tells a run that waits to go on."""
        standing = self._jobs.get(name)
        if standing is None:
            return Outcome(put_off=True)
        if standing.reported:
            standing.reported = False
            standing.words.put_nowait(True)
        outcome = await standing.outcomes.get()
        if outcome.report is None:
            self._jobs.pop(name, None)
        return outcome

    async def stop(self, run: str | None = None) -> None:
        """Ends the jobs of a run, or all, in whatever state; returns when their lanes are free. One that waits after a
        report ends at once."""
        for standing in [each for each in self._jobs.values() if run in (None, each.name.partition(_OF)[0])]:
            del self._jobs[standing.name]
            if standing in self._waiting:
                self._waiting.remove(standing)
                continue
            standing.failures_left = -1
            standing.words.put_nowait(False)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(standing.over.wait(), _STOP_TIMEOUT_S)

    async def close(self) -> None:
        """No more jobs: the groups end when theirs are over."""
        self._open = False
        await self._notify()

    # -- the workers -----------------------------------------------------------------------------------------------

    async def began(self, lane: int) -> int:
        """A group of a lane starts; its number. What the group before had in hand is done again, or given up."""
        found = self._lanes.setdefault(lane, _Lane())
        found.starts += 1
        self._drop(found, "its workers were gone")
        found.taken = []
        await self._notify()
        return found.starts

    async def take(self, lane: int, start: int, number: int) -> bytes | None:
        """The job of a number, from 0, of a group: the same for every rank; none: the group's work is done."""
        found = self._lanes[lane]
        async with self._changed:
            while True:
                if found.starts != start:
                    return None  # another group has this lane now
                if number < len(found.taken):
                    return found.taken[number].given
                source = found.again or self._waiting
                if source:
                    found.taken.append(source.popleft())
                    self._changed.notify_all()
                elif not self._open:
                    return None
                else:
                    await self._changed.wait()

    async def report(self, name: str, metrics: Mapping[str, float]) -> bool:
        """Whether the run goes on; returns when somebody has said so."""
        standing = self._jobs.get(name)
        if standing is None:
            return False
        standing.reported = True
        standing.outcomes.put_nowait(Outcome(dict(metrics)))
        while True:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(standing.words.get(), _WORD_TIMEOUT_S)
            if self._waiting:  # who asked has put it aside, or is gone
                self._jobs.pop(name, None)
                return False

    async def finished(self, lane: int, number: int, words: str) -> None:
        standing = self._lanes[lane].taken[number]
        standing.over.set()
        standing.outcomes.put_nowait(Outcome(failed=words))

    # -- who watches the groups ------------------------------------------------------------------------------------

    async def failed(self, lane: int, words: str) -> None:
        """The workers of a lane failed; Ray starts them again."""
        self._drop(self._lanes.setdefault(lane, _Lane()), words)
        await self._notify()

    async def in_hand(self, lane: int) -> bytes | None:
        """The job that a lane is at."""
        found = self._lanes.get(lane)
        return next((each.given for each in found.taken if not each.over.is_set()), None) if found else None

    async def gone(self, lane: int, words: str) -> None:
        """A lane has ended; what waits and has no lane left is given up."""
        await self.failed(lane, words)
        self._lanes.pop(lane, None)
        if not self._lanes:
            self._open = False
            for standing in self._waiting:
                standing.outcomes.put_nowait(Outcome(failed=words or "the worker groups have ended"))
            self._waiting.clear()

    def _drop(self, lane: _Lane, words: str) -> None:
        """What a lane has in hand is lost."""
        for standing in lane.taken:
            if not standing.over.is_set() and standing not in lane.again:
                self._lost(lane, standing, words)

    def _lost(self, lane: _Lane, standing: _Standing, words: str) -> None:
        standing.reported = False
        standing.words = asyncio.Queue()
        if standing.failures_left > 0:
            standing.failures_left -= 1
            lane.again.append(standing)
            return
        standing.over.set()
        standing.outcomes.put_nowait(Outcome(failed=words))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class Lanes:
    """So many worker groups and their desk, for as long as the block lasts.

    with Lanes(config, folder, count) as groups:
        groups.run(jobs, lambda name, report: print(name, report))
    """

    def __init__(self, config: Config, folder: Path, count: int) -> None:
        self._config, self._folder, self._count = config, folder, count
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Lanes:
        placement.check_storage()
        actor: Any = ray.remote(Desk)
        self.desk = actor.options(num_cpus=0, max_concurrency=1000).remote()
        cpus = workers.cpus_of_a_worker(self._config, self._config.cluster.workers * self._count)
        for lane in range(self._count):
            thread = threading.Thread(target=self._hold, args=(lane, cpus), daemon=True, name=f"lane-{lane}")
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        ray.get(self.desk.close.remote())
        ray.get(self.desk.stop.remote())
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        ray.kill(self.desk)

    def run(self, jobs: Sequence[Job], hear: Callable[[str, Mapping[str, float]], None]) -> None:
        """Has lanes do jobs to their ends.

        Args:
            hear: is given a run's name and its report for each validation.

        Raises:
            LaneError: one failed.
        """
        with ThreadPoolExecutor(len(jobs)) as threads:
            for _ in threads.map(functools.partial(self._follow, hear=hear), jobs):
                pass

    def _follow(self, job: Job, hear: Callable[[str, Mapping[str, float]], None]) -> None:
        submit(self.desk, job)
        while (outcome := ray.get(self.desk.outcome.remote(job.name))).report is not None:
            hear(job.name.partition(_OF)[0], outcome.report)
        if outcome.failed or outcome.put_off:
            raise LaneError(outcome.failed or f"{job.name} was stopped")

    def _hold(self, lane: int, cpus: float) -> None:
        words = ""
        try:
            workers.stay(
                _serve, {"desk": self.desk, "lane": lane}, self._config, self._folder / f"lane_{lane}", cpus,
                _Watch(self.desk, lane),
            )  # fmt: skip
        except (workers.WorkersFailed, ClusterError) as error:
            words = str(error)
        with contextlib.suppress(ray.exceptions.RayError):  # the desk may be gone: then nobody waits any more
            ray.get(self.desk.gone.remote(lane, words))


def submit(desk: Any, job: Job) -> None:
    """Gives a job to the desk."""
    (job.folder / STOP_FILE).unlink(missing_ok=True)
    failures = job.config.cluster.max_failures
    ray.get(desk.submit.remote(job.name, cloudpickle.dumps(job), failures))


class _Watch:
    """Tells the desk why workers failed; it lives in the group's controller."""

    def __init__(self, desk: Any, lane: int) -> None:
        self._desk, self._lane = desk, lane

    def __call__(self, worker_exceptions: Mapping[int, Exception]) -> None:
        given = ray.get(self._desk.in_hand.remote(self._lane))
        if given is None:
            return
        job: Job = cloudpickle.loads(given)
        ray.get(self._desk.failed.remote(self._lane, workers.reason(worker_exceptions, job.folder, job.config)))


def _serve(group: Group, spec: Mapping[str, Any]) -> None:
    """One rank's whole life in a lane."""
    desk, lane = spec["desk"], spec["lane"]
    start = group.gather(ray.get(desk.began.remote(lane)) if group.rank == 0 else None)[0]
    streams, number = _Streams(group, spec["reserved_cpus"]), 0
    while (given := ray.get(desk.take.remote(lane, start, number))) is not None:
        words = _do(desk, cloudpickle.loads(given), group, streams)
        if group.rank == 0:
            ray.get(desk.finished.remote(lane, number, words))
        number += 1
    streams.close()


def _do(desk: Any, job: Job, group: Group, streams: _Streams) -> str:
    """A job; what its ranks raised together, or nothing. What one of them raises alone ends the group."""
    began = time.monotonic()
    first: list[float] = []

    def asked() -> str:
        """The loop asks at every step: the first time its start is over."""
        if not first:
            first.append(time.monotonic() - began)
        return group.asked()

    def report(metrics: dict[str, float]) -> bool:
        startup_s = first[0] if first else 0.0
        times = {"seconds": time.monotonic() - began - startup_s, "startup_s": startup_s}
        told = metrics | {key: round(value, 2) for key, value in times.items()}
        return bool(ray.get(desk.report.remote(job.name, told))) if group.rank == 0 else True

    own = replace(group, blocks=lambda name: streams.blocks(name, job.streams[name]), report=report, asked=asked)
    try:
        job.work(own)
    except Final as error:
        return str(error)
    finally:
        gc.collect()  # an engine's hooks hold each other: its memory goes before the next is made
    return ""


class _Streams:
    """The streams of one rank, read once for all jobs that want the same."""

    def __init__(self, group: Group, reserved_cpus: float) -> None:
        self._group, self._reserved_cpus = group, reserved_cpus
        self._kept: dict[str, tuple[str, Recording]] = {}  # by split: what it is of, and what was read

    def blocks(self, name: str, wanted: Stream) -> Iterator[pa.Table]:
        """The tables of this rank from where the job stands. All ranks ask, or none."""
        key, step = wanted.key(self._group.world), wanted.first()
        of, recording = self._kept.get(name, ("", None))
        if not self._group.all(recording is not None and of == key and recording.holds(step)):
            if recording is not None:
                recording.close()  # first: a stream holds CPUs, also while nobody reads
            recording = Recording(self._tables(wanted), step)
            self._kept[name] = (key, recording)
        assert recording is not None
        return recording.read(step)

    def _tables(self, wanted: Stream) -> Iterator[pa.Table]:
        world, given = self._group.world, None
        if self._group.rank == 0:
            given = cloudpickle.dumps(stream.split_in_turn(wanted(world), world, self._reserved_cpus))
        return stream.rank_steps(cloudpickle.loads(self._group.gather(given)[0])[self._group.rank], self._group.rank)

    def close(self) -> None:
        for _, recording in self._kept.values():
            recording.close()
        self._kept.clear()
