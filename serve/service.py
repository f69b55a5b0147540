"""Bundles in service: requests in, answers out. It knows no HTTP and no Ray; `serve.app` gives it both."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmagent import channels, explain, storage, succession
from mmagent.agent import policy as policies
from mmagent.agent import tools as agent_tools
from mmagent.agent.mcp import Server
from mmagent.agent.openapi import of_file
from mmagent.agent.policy import Policy
from mmagent.agent.tools import Tool
from mmagent.agent.turn import Passage
from mmagent.answer import Answer
from mmagent.batch import Sample
from mmagent.evidence import ExplainError
from mmagent.golden import TOLERANCE
from mmagent.predictor import Predictor
from mmagent.record import Record
from serve import engine as engines
from serve import logs, parity
from serve.answers import Answers
from serve.bundles import Bundles
from serve.config import ServeConfig
from serve.conversations import Conversations
from serve.engine import Engine, Here
from serve.errors import ApiError
from serve.feedback import FeedbackLog, replica_name
from serve.handover import Handovers
from serve.keys import ANYONE, Key, Keys
from serve.limits import Limits
from serve.loaded import Loaded, seal_of
from serve.metrics import Metrics
from serve.parity import Verdict
from serve.parts import Draft
from serve.questions import ChatRequest, PredictRequest
from serve.sentinel import Sentinel
from serve.store import Store, open_store
from serve.turns import Answered, TurnTaker

if TYPE_CHECKING:
    from mmagent.knowledge import KnowledgeBase

_DRIFT_EVERY = 25  # answers
_T = TypeVar("_T")

logger = logging.getLogger("mmagent.serve")


class Service:
    """Belongs to one event loop.

    Args:
        predictor: the loaded bundle.
        channel: the channel that the bundle was taken from, if any.
        policy: what the agent is told; none: the model's answers are given as they are.
        policy_file: where it was read, for files that it names.
        metrics: none: this process counts for itself.
        model: the deployment that computes (`serve.apart`); none: this process does.
    """

    def __init__(
        self,
        predictor: Predictor,
        config: ServeConfig,
        channel: str | None = None,
        *,
        policy: Policy | None = None,
        policy_file: Path | None = None,
        metrics: Metrics | None = None,
        store: Store | None = None,
        model: Any = None,
    ) -> None:
        self.config, self.channel, self._model = config, channel, model
        self.policy, self.has_policy = policy or Policy(unsure=("answer",)), policy is not None
        self.metrics = metrics or Metrics()
        self.waiting = 0
        self.replica = replica_name()
        self._decoders = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._fetchers = ThreadPoolExecutor(8, thread_name_prefix="fetch")
        self._storing = ThreadPoolExecutor(4, thread_name_prefix="store")
        self.store = store or open_store(config.store, storage.root() / "serve")
        self.keys = Keys(config.key_file, config.key_hashes)
        self.bundles = Bundles(self._loaded(predictor), channel, self._load, self.store, self.replica, self._storing)
        self.limits = Limits(config.per_minute, lambda: self.bundles.replicas, self.store.count)
        self.answers = Answers(self.store, config)
        self.conversations = Conversations(self.store, config, self._storing)
        self.feedback = FeedbackLog(self.store, self.replica, self._storing, config.keep_days)
        self.handovers = Handovers(
            self.store, self.policy.handover.webhook, config.keep_days, self._storing,
            on_delivery=lambda ended: self.metrics.webhook.labels(ended).inc(),
        )  # fmt: skip
        self.tools: dict[str, Tool] = {}
        self.knowledge: KnowledgeBase | None = None
        self._servers: list[Server] = []
        self._policy_file = policy_file
        self.sentinel = Sentinel(config.rollback_at)
        self._observed = 0
        self._taking_back: asyncio.Task[None] | None = None
        self._ready = False

    # -- its life --------------------------------------------------------------------------------------------------

    @property
    def predictor(self) -> Predictor:
        """The present bundle's."""
        return self.bundles.current.predictor

    @property
    def names(self) -> list[str]:
        """What `model` may be."""
        named = [*(each.name for each in self.bundles.all), *([self.channel] if self.channel else [])]
        return list(dict.fromkeys(named))

    @property
    def is_warm(self) -> bool:
        return self._ready and self.bundles.current.is_warm

    @property
    def is_ill(self) -> bool:
        """Whether only a new process may help."""
        return self.bundles.current.is_ill

    @property
    def trouble(self) -> str | None:
        """Why the service is not ready; none when it is."""
        if not self.is_warm:
            return "the model is warming up"
        if self.is_ill:
            failed = self.bundles.current.failed_in_a_row
            return f"the last {failed} forward passes failed; the log says why"
        if self.waiting >= self.config.max_waiting:
            return f"{self.waiting} requests wait; the limit max_waiting is {self.config.max_waiting}"
        return None

    async def warm_up(self) -> None:
        """Gets everything ready that a first request would wait for. Raises what the bundle raises.

        Raises:
            ToolError, PolicyError: an agent that does not fit the bundle, or whose tools are not there.
        """
        await self._find_tools()
        predictor = self.predictor
        labels = {name: task.labels for name, task in predictor.tasks.items()}
        policies.check(self.policy, labels, predictor.task, set(self.tools))
        if self.policy.knowledge is not None:
            from mmagent.knowledge import KnowledgeBase

            self.knowledge = await self.stored(KnowledgeBase.open, self.policy.knowledge.name)
        await self.bundles.current.warm_up()
        self.bundles.start()
        self.handovers.start()
        self._ready = True

    async def close(self) -> None:
        await self.bundles.close()
        await self.answers.close()
        await self.handovers.close()
        for server in self._servers:
            await server.close()
        for pool in (self._decoders, self._fetchers):
            pool.shutdown(wait=False)
        # SQLite does not bear that a connection is closed while a thread still reads from it.
        await asyncio.get_running_loop().run_in_executor(None, self._storing.shutdown)
        self.store.close()

    async def _find_tools(self) -> None:
        self.tools.clear()  # of an attempt that failed
        for source in self.policy.tools:
            limits: dict[str, Any] = {"timeout_s": source.timeout_s, "max_bytes": source.max_bytes}
            if source.python is not None:
                found = [agent_tools.of_path(source.python, **limits)]
            elif source.openapi is not None:
                assert source.base_url is not None
                beside = self._policy_file.parent if self._policy_file is not None else Path()
                found = of_file(
                    beside / source.openapi,
                    base_url=source.base_url,
                    allow=source.allow,
                    headers=source.headers,
                    **limits,
                )
            else:
                assert source.mcp is not None
                server = Server(source.mcp.command, source.mcp.url, source.mcp.environment)
                self._servers.append(server)
                found = await server.tools(source.allow, **limits)
            for tool in found:
                if tool.name in self.tools:
                    raise agent_tools.ToolError(f"two tools have the name {tool.name!r}")
                self.tools[tool.name] = tool

    def _loaded(self, predictor: Predictor) -> Loaded:
        seal = seal_of(predictor.path) if predictor.path is not None else ""
        config, observe = self.config, self.metrics.batch.observe
        engine: Engine
        if self._model is not None:
            from serve.apart import Far, Place  # Ray is imported where it is there alone

            place = Place(str(predictor.path), seal)
            engine = Far(self._model, place, batch_size=config.batch_size, on_batch=observe)
        else:
            engine = Here(
                predictor, batch_size=config.batch_size, batch_wait_s=config.batch_wait_ms / 1000,
                on_the_way=lambda: self.waiting, on_batch=observe,
            )  # fmt: skip
        return Loaded(predictor, engine, seal=seal)

    def _load(self, folder: Path) -> Loaded:
        return self._loaded(load(folder, self.config))

    # -- what a request may name -----------------------------------------------------------------------------------

    def check_model(self, name: str | None) -> None:
        """Raises:
        ApiError: a model that is not here.
        """
        if name is not None and name not in self.names:
            here = ", ".join(repr(known) for known in self.names)
            message = f"the model {name!r:.100} is not here; these are: {here}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def task_of(self, loaded: Loaded, name: str | None, key: Key) -> str:
        """The task that a request names, or the bundle's own.

        Raises:
            ApiError: a task that the bundle has not, or that the key may not ask.
        """
        predictor = loaded.predictor
        if name is not None and name not in predictor.tasks:
            here = ", ".join(repr(known) for known in predictor.tasks)
            message = f"this bundle has no task {name!r:.100}; its tasks are: {here}"
            raise ApiError(422, message, code="task_not_found", param="task")
        task = name or predictor.task
        allowed = key.profile.skills
        if allowed is not None and task not in allowed:
            message = f"this API key may not ask the task {task!r}; it may ask: {', '.join(allowed)}"
            raise ApiError(403, message, code="skill_not_allowed", param="task")
        return task

    def threshold(self, answer: Answer, task: str) -> float:
        """The confidence below which an answer of a task counts as abstained; above 1 where validation came to the
        wanted accuracy at no confidence, so that no answer is sure enough."""
        loaded = next((each for each in self.bundles.all if each.name == answer.bundle), self.bundles.current)
        calibration = loaded.predictor.calibration[task]
        if self.config.target_accuracy is not None:
            found = calibration.threshold(self.config.target_accuracy)
            return math.nextafter(1.0, 2.0) if found is None else found
        return calibration.abstain_below

    # -- requests --------------------------------------------------------------------------------------------------

    async def ask(
        self,
        question: ChatRequest | PredictRequest,
        key: Key = ANYONE,
        request_id: str = "",
        *,
        only: Loaded | None = None,
        hear: Callable[[str], None] | None = None,
        id: str = "",
    ) -> Answered:
        """
        Args:
            only: the bundle to ask: of the gate.
            hear: is told a text while it is written, in another thread.
            id: of the answer; none: it gets one.

        Raises:
            ApiError: what is wrong with the request, or the service is full.
        """
        if self.waiting >= self.config.max_waiting:
            message = f"{self.waiting} requests wait already; try again in a second"
            raise ApiError(503, message, code="overloaded", headers={"Retry-After": "1"})
        self.waiting += 1
        self.metrics.waiting.inc()
        try:
            return await TurnTaker(self, question, key, request_id, id).take(only, hear)
        finally:
            self.waiting -= 1
            self.metrics.waiting.dec()

    async def built(self, build: Callable[[], Record]) -> Record:
        """A record of a request; slow hosts may hold their own threads, not the decoders."""
        pool = self._fetchers if self.config.allow_media_hosts else self._decoders
        return await asyncio.get_running_loop().run_in_executor(pool, build)

    async def decoded(self, decode: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, decode)

    async def stored(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Something of the store's, or another that waits for a disk."""
        return await asyncio.get_running_loop().run_in_executor(self._storing, functools.partial(function, *arguments))

    async def explain(self, loaded: Loaded, draft: Draft, sample: Sample, answer: Answer) -> dict[str, Any]:
        """Raises:
        ApiError: no evidence can be found for this model or task.
        """

        method = None if self.config.explain == "auto" else self.config.explain
        try:
            found = await loaded.aside(explain.explain, replace(sample, hear=None), answer, method)
        except ExplainError as error:
            raise ApiError(422, f"explain: {error}", code="not_supported", param="explain") from error

        def drawn() -> dict[str, Any]:
            limits = loaded.predictor.limits
            seconds = [_seconds(audio.read(), limits) for audio in draft.audios]
            pictures = [image.read() for image in draft.images]
            return found.to_dict(seconds[: len(found.audios)], pictures[: len(found.images)], limits)

        return await self.decoded(drawn)

    async def retrieve(self, question: str, count: int) -> tuple[Sequence[Passage], float]:
        """What the knowledge says of a question, the best first, and how long that took in ms."""
        started = time.perf_counter()
        assert self.knowledge is not None
        found: Sequence[Passage] = await self.stored(self.knowledge.search, question, count)
        return found, round(1000 * (time.perf_counter() - started), 1)

    # -- afterwards ------------------------------------------------------------------------------------------------

    def observe(self, answered: Answered) -> None:
        """Counts an answer."""
        answer, metrics = answered.answer, self.metrics
        metrics.confidence.labels(answer.task, answer.bundle).observe(answer.confidence)
        unsure = answer.confidence < self.threshold(answer, answer.task)
        if unsure:
            metrics.abstained.labels(answer.task, answer.bundle).inc()
        metrics.outcomes.labels(answered.turn.outcome).inc()
        for stage, ms in answered.timings_ms.items():
            metrics.stage.labels(stage).observe(ms / 1000)
        if answer.novelty is not None:
            metrics.novelty.labels(answer.task, answer.bundle).observe(answer.novelty)
        loaded = answered.loaded
        loaded.drift.add(answer, answered.record.modalities)
        self._observed += 1
        if self._observed % _DRIFT_EVERY == 0:
            for kind, found in loaded.drift.told().items():
                for of, value in found.items():
                    metrics.drift.labels(loaded.name, of, kind).set(value)
        self.sentinel.answered(loaded.seal, unsure=unsure)
        self._guard()
        if self.config.log_content:
            said = {
                "answer": answered.id,
                "said": answered.words,
                "record": [m.content for m in answered.record.messages],
            }
            logger.info(json.dumps(said, ensure_ascii=False))

    def judged(self, trace: Mapping[str, Any], says: str) -> None:
        """Counts what a user says of an answer."""
        self.metrics.feedback.labels(says, str(trace["bundle"])).inc()
        loaded = next((each for each in self.bundles.known if each.name == trace["bundle"]), None)
        if loaded is not None:
            self.sentinel.judged(loaded.seal, str(trace["id"]), says)
            self._guard()

    def _guard(self) -> None:
        """Takes a bundle back that does worse in life than the one before it."""
        if self.channel is None or (self._taking_back is not None and not self._taking_back.done()):
            return
        new = self.bundles.canary or self.bundles.current
        old = self.bundles.current if self.bundles.canary is not None else self.bundles.former
        if old is not None and (words := self.sentinel.complaint(new.seal, old.seal)):
            self._taking_back = asyncio.get_running_loop().create_task(self._take_back(new, words))

    async def _take_back(self, new: Loaded, words: str) -> None:
        try:
            await self.stored(functools.partial(logs.audit, "taken back", "service", "", bundle=new.name, why=words))
            await self.rollback(f"service: {words}")
            self.sentinel.forget(new.seal)
            self.metrics.taken_back.labels(new.name).inc()
            logger.warning("%s was taken back: %s", new.name, words)
        except Exception:
            logger.exception("%s does worse (%s), and could not be taken back", new.name, words)

    async def hand_over(self, answered: Answered, key: Key) -> None:
        """Puts a request into the queue of those that a person answers; who asked is told so when it is there.

        Raises:
            StoreError: it is not.
        """
        words = [message.content for message in answered.record.messages if message.role == "user"]
        await self.handovers.put(
            {
                "answer": answered.id,
                "conversation": answered.conversation,
                "key": key.id,
                "asked": words[-1] if words else "",
                "understood": answered.answer.words,
                "confidence": answered.answer.confidence,
            }
        )

    # -- deploying -------------------------------------------------------------------------------------------------

    async def deploy(
        self, bundle: str, share: float, by: str, *, other_task: bool = False
    ) -> tuple[Verdict, tuple[int, int] | None]:
        """Loads a bundle beside what answers, asks its golden examples, and where they hold writes the channel. The
        verdict, and of how many replicas how many follow (none: the verdict was no).

        Args:
            other_task: also one that was built for something else than the present bundle.

        Raises:
            BundleError, ChannelError: see `mmagent.bundle.load` and `mmagent.channels.read`.
            MisfitError: it was built for something else.
        """
        from mmagent import bundle as bundle_folders

        assert self.channel is not None
        place = await self.stored(bundle_folders.find, bundle)
        if not other_task:
            offered = succession.of_bundle(await self.stored(bundle_folders.load, place))
            succession.check(succession.of_predictor(self.predictor), offered)
        staged = await self.bundles.stage(place)
        try:
            golden = await self.stored(lambda: bundle_folders.load(place).golden())
            tolerance = TOLERANCE[self.config.precision]
            verdict = await parity.judge(golden, lambda request: self._extension(request, staged), tolerance)
        except BaseException:
            await self.bundles.drop(staged)
            raise
        if not verdict.passed:
            await self.bundles.drop(staged)
            return verdict, None
        act = "promote" if share >= 1 else "canary"
        write = functools.partial(
            channels.append, self.channel, place, share=share, act=act, by=by, golden=verdict.asked, seal=staged.seal
        )
        await self.stored(write)
        await self.bundles.follow()
        return verdict, await self.bundles.everywhere(timeout_s=60)

    async def rollback(self, by: str) -> tuple[str, tuple[int, int]]:
        """Ends the canary where there is one, else goes back to the bundle before; which bundle answers now.

        Raises:
            ApiError: there is nothing to go back to.
        """
        assert self.channel is not None
        state = await self.stored(channels.read, self.channel)
        target = state.back()
        if target is None:
            raise ApiError(409, "there is no bundle before the present one", code="nothing_before")
        await self.stored(functools.partial(channels.append, self.channel, target, share=1.0, act="rollback", by=by))
        await self.bundles.follow()
        return self.bundles.current.name, await self.bundles.everywhere(timeout_s=60)

    async def _extension(self, request: PredictRequest, staged: Loaded) -> Mapping[str, Any]:
        answered = await self.ask(request, only=staged)
        return answered.answer.to_dict()


def _seconds(data: bytes, limits: Any) -> float:
    from mmagent.media import check_audio

    return float(check_audio(data, limits).duration_s)


def load(folder: Path, config: ServeConfig) -> Predictor:
    """The bundle as one process of the service has it: where another one computes, for what stands beside the weights
    alone, which then are neither read nor kept."""
    if config.apart:
        return Predictor.load(folder, device="cpu", threads=config.threads, cache_mb=config.cache_mb)
    return engines.load(folder, config)
