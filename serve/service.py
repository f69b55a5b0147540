"""A bundle in service: requests in, answers out. It knows no HTTP and no Ray; `serve.app` gives it both."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from mmagent.predictor import Answer, PartError, Predictor, Sample
from mmagent.record import Message, Record, Target
from mmagent.targets import HEAD, TAIL, kind
from serve.batcher import Batcher
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.parts import Draft
from serve.questions import ChatRequest, PredictRequest
from serve.replies import Extension

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_FAILURES = 3  # forward passes that fail in a row before the replica calls itself ill
_NOTHING = {"extract": "no answer", "tag": "none", "multilabel": "none"}  # said where the answer is that there is none
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Answered:
    id: str
    created_s: int
    extension: Extension
    words: str  # the answer as one would say it
    prompt_tokens: int
    completion_tokens: int


class Service:
    """Belongs to one event loop.

    Args:
        predictor: the loaded bundle.
        channel: the channel that the bundle was taken from, if any.
    """

    def __init__(self, predictor: Predictor, config: ServeConfig, channel: str | None = None) -> None:
        self.predictor = predictor
        self.config = config
        self.channel = channel
        self.created_s = int(predictor.manifest.get("created_ms", 0)) // 1000
        self.waiting = 0
        self.is_warm = False
        self._decoders = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._fetchers = ThreadPoolExecutor(8, thread_name_prefix="fetch")
        self._batcher: Batcher[Sample, Answer] = Batcher(
            predictor.answer,
            size=config.batch_size,
            wait_s=config.batch_wait_ms / 1000,
            on_the_way=lambda: self.waiting,
        )

    @property
    def names(self) -> list[str]:
        """What `model` may be."""
        return [self.predictor.name] + ([self.channel] if self.channel not in (None, self.predictor.name) else [])

    @property
    def trouble(self) -> str | None:
        """Why the service is not ready; none when it is."""
        if not self.is_warm:
            return "the model is warming up"
        if self.is_ill:
            return f"the last {self._batcher.failed_in_a_row} forward passes failed; the log says why"
        if self.waiting >= self.config.max_waiting:
            return f"{self.waiting} requests wait; the limit max_waiting is {self.config.max_waiting}"
        return None

    @property
    def is_ill(self) -> bool:
        """Whether only a new process may help."""
        return self._batcher.failed_in_a_row >= _FAILURES

    async def warm_up(self) -> None:
        """The first passes of a process are slow: they are nobody's request. Raises what the bundle raises."""
        samples = [self.predictor.prepare(_first_question(task)) for task in self.predictor.tasks]
        for sample in samples:
            await self._batcher.submit(sample)
        full = [samples[index % len(samples)] for index in range(self.config.batch_size)]
        await asyncio.gather(*map(self._batcher.submit, full))
        self.is_warm = True

    async def close(self) -> None:
        await self._batcher.close()
        self._decoders.shutdown(wait=False)
        self._fetchers.shutdown(wait=False)

    def check_model(self, name: str | None) -> None:
        """Raises:
        ApiError: a model that is not here.
        """
        if name is not None and name not in self.names:
            here = ", ".join(repr(known) for known in self.names)
            message = f"the model {name!r:.100} is not here; these are: {here}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def task_of(self, name: str | None) -> str:
        """The task that a request names, or the bundle's own.

        Raises:
            ApiError: a task that the bundle has not.
        """
        if name is not None and name not in self.predictor.tasks:
            here = ", ".join(repr(known) for known in self.predictor.tasks)
            message = f"this bundle has no task {name!r:.100}; its tasks are: {here}"
            raise ApiError(422, message, code="task_not_found", param="task")
        return name or self.predictor.task

    async def ask(self, question: ChatRequest | PredictRequest) -> Answered:
        """Raises:
        ApiError: what is wrong with the request, or the service is full.
        """
        task = self.task_of(question.task)
        if self.waiting >= self.config.max_waiting:
            message = f"{self.waiting} requests wait already; try again in a second"
            raise ApiError(503, message, code="overloaded", headers={"Retry-After": "1"})
        started, id = time.perf_counter(), new_id()
        draft = Draft(self.config, self.predictor.limits)
        self.waiting += 1
        try:
            sample = await self._sample(draft, lambda: draft.build(question, task, id))
            decoded = time.perf_counter()
            answer, queued_s = await self._batcher.submit(sample)
        finally:
            self.waiting -= 1
        answer = draft.as_written(answer)
        words = answer.words or _NOTHING.get(kind(task), "")
        timings = {
            "decode": _ms(decoded - started),
            "queue": _ms(queued_s),
            **answer.timings_ms,
            "total": _ms(time.perf_counter() - started),
        }
        extension = Extension(**{**answer.to_dict(), "timings_ms": timings, "channel": self.channel})
        read = sample.tokens
        return Answered(id, int(time.time()), extension, words, read, self.predictor.inputs.count(words))

    async def _sample(self, draft: Draft, build: Callable[[], Record]) -> Sample:
        if self.config.allow_media_hosts:  # slow hosts may hold their own threads, not the decoders
            record = await self._in(self._fetchers, build)
            return await self._in(self._decoders, lambda: self._decode(draft, record))
        return await self._in(self._decoders, lambda: self._decode(draft, build()))

    def _decode(self, draft: Draft, record: Record) -> Sample:
        try:
            self.predictor.check(record)
            sample = self.predictor.prepare(record)
        except PartError as error:
            place = draft.places.get(error.field, error.field)
            reason = str(error).removeprefix(f"{error.field}: ")
            status, code = (413, "media_too_large") if error.too_large else (422, _code(error.field))
            raise ApiError(status, f"{place}: {reason}", code=code, param=place) from error
        if not record.candidates and len(sample.views) > self.config.max_views:  # those are counted as they come
            message = f"the text is read in {len(sample.views)} strides; the limit max_views is {self.config.max_views}"
            raise ApiError(413, message, code="text_too_long")
        return sample

    @staticmethod
    async def _in(pool: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _first_question(task: str) -> Record:
    """A small one that every model can answer."""
    ends = ({"start": 0, "end": 2, "label": HEAD}, {"start": 3, "end": 5, "label": TAIL})
    more: dict[str, dict[str, Any]] = {
        "match": {"candidates": ({"content": "yes"}, {"content": "no"})},
        "relate": {"target": Target(spans=ends)},
    }
    return Record("warm-up", (Message("user", "is it there?"),), task=task, **more.get(kind(task), {}))


def _code(field: str) -> str:
    return "missing_field" if field in ("candidates", "spans") else "invalid_media"


def new_id() -> str:
    """``ans_`` and a ULID (github.com/ulid/spec): 48 bits of milliseconds, 80 random ones, in Crockford's base 32."""
    number = int(time.time() * 1000) << 80 | secrets.randbits(80)
    return "ans_" + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
