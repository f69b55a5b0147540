"""One request on its way: what was said before, what the model understands, what the agent makes of it, what stays."""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmagent.agent import calls, turn
from mmagent.agent.policy import Policy
from mmagent.agent.tools import Tool, ToolError, run
from mmagent.agent.turn import Passage, Step, Turn, Understood
from mmagent.answer import Answer
from mmagent.batch import PartError, Sample
from mmagent.record import Message, Record, escape
from mmagent.targets import kind
from mmagent.writer import Writing
from serve import conversations
from serve.answers import Trace, now_ms
from serve.errors import ApiError
from serve.ids import new_id
from serve.keys import Key
from serve.loaded import Loaded
from serve.parts import Draft
from serve.questions import ChatMessage, ChatRequest, PredictRequest

if TYPE_CHECKING:
    from serve.service import Service

NOTHING = {"extract": "no answer", "tag": "none", "multilabel": "none"}  # said where the answer is that there is none


@dataclass(frozen=True, slots=True)
class Answered:
    """A request's answer, before it is put into HTTP.

    Args:
        others: further texts where several were asked for.
        calls: of the client's tools: id, name, arguments.
    """

    id: str
    created_s: int
    answer: Answer
    turn: Turn
    words: str
    timings_ms: Mapping[str, float]
    prompt_tokens: int
    completion_tokens: int
    loaded: Loaded
    record: Record
    conversation: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Answer, ...] = ()
    calls: tuple[tuple[str, str, str], ...] = ()
    finish_reason: str = "stop"
    evidence: Mapping[str, Any] | None = None


class TurnTaker:
    """Takes one request through the service; made for it alone."""

    def __init__(
        self, service: Service, question: ChatRequest | PredictRequest, key: Key, request_id: str, id: str = ""
    ) -> None:
        self._service, self._question, self._key, self._request_id = service, question, key, request_id
        self._chat = question if isinstance(question, ChatRequest) else None
        self._id = id or new_id("ans")
        self._started = time.perf_counter()
        self._steps: list[Step] = []
        self._queued_s = self._decode_s = self._forward_ms = 0.0
        self._hear: Callable[[str], None] | None = None

    async def take(self, only: Loaded | None = None, hear: Callable[[str], None] | None = None) -> Answered:
        """
        Args:
            only: the bundle to ask, whatever the share: of a gate, whose questions leave no trace.
            hear: is told a text while it is written, in another thread; not where a tool, a stop, several answers
                or a form that is asked for may yet change what is said.

        Raises:
            ApiError: what is wrong with the request.
        """
        service, question = self._service, self._question
        chat = self._chat
        if chat is not None and not (chat.offered or service.tools or chat.stops or (chat.n or 1) > 1 or chat.shaped):
            self._hear = hear
        conversation = self._chat.conversation if self._chat else None
        history: list[ChatMessage] = []
        if conversation is not None:
            kept = await service.conversations.continued(conversation, self._key)
            history = [ChatMessage.model_validate(each) for each in kept]
        loaded = only or service.bundles.pick(conversation or self._id, question.model)
        with service.bundles.used(loaded):
            asked = question
            if self._chat is not None and history:
                messages = [*history, *self._chat.messages]
                fitted = conversations.fitted(messages, service.config.max_media, service.config.max_messages)
                asked = self._chat.model_copy(update={"messages": fitted})
            answered = await self._answered(loaded, asked)
        answered = replace(answered, conversation=conversation)
        if only is None:
            await self._keep(answered)
        return answered

    # -- understanding ---------------------------------------------------------------------------------------------

    async def _answered(self, loaded: Loaded, asked: ChatRequest | PredictRequest) -> Answered:
        service, policy = self._service, self._service.policy
        task = service.task_of(loaded, asked.task or policy.skill, self._key)
        draft = Draft(service.config, loaded.predictor.limits)
        theirs = {tool.function.name: _client_tool(tool) for tool in self._chat.offered} if self._chat else {}
        writes = loaded.predictor.tasks[task].generates
        record = await service.built(lambda: draft.build(asked, task, self._id))
        if writes:
            record = self._instructed(loaded, record, {**service.tools, **theirs})
        sample, answer = await self._understood(loaded, draft, record)
        answer = draft.as_written(answer)
        slots: dict[str, str] = {}
        if writes:
            answer, record, told = await self._tool_calls(loaded, draft, record, answer, theirs)
        else:
            slots = await self._slots(loaded, asked, policy)
            told = await self._decided(answer, task, slots, record, theirs)
        words = told.words
        if not words and told.outcome == "answer":
            words = NOTHING.get(kind(task), "")
        words, finish = self._ended(words, answer, told)
        others = await self._others(loaded, sample, answer, writes)
        evidence = None
        if asked.explain:
            started = time.perf_counter()
            evidence = await service.explain(loaded, draft, sample, answer)
            self._steps.append(Step("explain", _ms(time.perf_counter() - started)))
        made = tuple(
            (f"call_{self._id[4:]}_{n}", name, json.dumps(given)) for n, (name, given) in enumerate(told.calls)
        )
        return Answered(
            self._id, int(time.time()), answer, replace(told, steps=(*self._steps, *told.steps)), words,
            self._timings(told), sample.tokens, loaded.count(words), loaded, record, slots=slots, others=others,
            calls=made, finish_reason=finish, evidence=evidence,
        )  # fmt: skip

    async def _understood(self, loaded: Loaded, draft: Draft, record: Record) -> tuple[Sample, Answer]:
        started = time.perf_counter()
        sample = await self._service.decoded(lambda: self._decode(loaded, draft, record))
        decoded_s = time.perf_counter() - started
        answer, queued_s = await loaded.answer(sample)
        self._decode_s += decoded_s
        self._queued_s += queued_s
        forward_ms = float(answer.timings_ms.get("forward", 0.0))
        self._forward_ms += forward_ms
        facts = {"task": record.task, "queued_ms": _ms(queued_s), "decode_ms": _ms(decoded_s)}
        self._steps.append(Step("model", forward_ms, facts))
        return sample, answer

    def _decode(self, loaded: Loaded, draft: Draft, record: Record) -> Sample:
        predictor, config = loaded.predictor, self._service.config
        try:
            predictor.check(record)
            sample = predictor.prepare(record)
        except PartError as error:
            place = draft.places.get(error.field, error.field)
            reason = str(error).removeprefix(f"{error.field}: ")
            status, code = (413, "media_too_large") if error.too_large else (422, _code(error.field))
            raise ApiError(status, f"{place}: {reason}", code=code, param=place) from error
        if not record.candidates and len(sample.views) > config.max_views:  # those are counted as they come
            message = f"the text is read in {len(sample.views)} strides; the limit max_views is {config.max_views}"
            raise ApiError(413, message, code="text_too_long")
        if not predictor.tasks[record.task].generates:
            return sample
        return replace(sample, writing=self._writing(loaded), hear=self._hear)

    def _writing(self, loaded: Loaded) -> Writing | None:
        if self._chat is None:
            return None
        most = loaded.predictor.config.data.max_answer_tokens
        wanted = self._chat.max_completion_tokens or self._chat.max_tokens or most
        temperature = self._chat.temperature
        if temperature is None:
            temperature = 1.0 if (self._chat.n or 1) > 1 else 0.0
        # Without a seed each request draws for itself. What draws nothing is written together, so it has one seed.
        seed = secrets.randbits(63) if self._chat.seed is None else self._chat.seed % 2**63
        return Writing(
            min(wanted, most), temperature=temperature, top_p=self._chat.top_p or 1.0, seed=seed if temperature else 0
        )

    async def _slots(self, loaded: Loaded, asked: ChatRequest | PredictRequest, policy: Policy) -> dict[str, str]:
        """What the tasks that fill slots find: the first span of each label."""
        found: dict[str, str] = {}
        for task in policy.slots:
            own = Draft(self._service.config, loaded.predictor.limits)
            record = await self._service.built(functools.partial(own.build, asked, task, self._id))
            _, answer = await self._understood(loaded, own, record)
            for span in own.as_written(answer).spans or ():
                found.setdefault(span["label"], span["text"])
            if kind(task) == "extract" and answer.text:
                found.setdefault(task.partition(":")[2] or "answer", answer.text)
        return found

    # -- deciding --------------------------------------------------------------------------------------------------

    async def _decided(
        self, answer: Answer, task: str, slots: Mapping[str, str], record: Record, theirs: Mapping[str, Tool]
    ) -> Turn:
        service, policy = self._service, self._service.policy
        threshold = policy.threshold
        if threshold is None:
            threshold = service.threshold(answer, task)
        understood = Understood(
            answer.words, answer.label, answer.confidence, threshold, tuple(answer.probabilities), slots, _asked(record)
        )
        if (named := self._named_call(answer, slots, theirs)) is not None:
            return named
        if not service.has_policy or (policy.skill is not None and task != policy.skill):
            return Turn(answer.words, "answer")
        return await turn.take(
            policy, understood, service.tools, retrieve=service.retrieve if service.knowledge else None, theirs=theirs
        )

    def _named_call(self, answer: Answer, slots: Mapping[str, str], theirs: Mapping[str, Tool]) -> Turn | None:
        """A model that classifies chooses the client's tool of its label's name; arguments are slots of their names."""
        if self._chat is None or not theirs:
            return None
        choice = self._chat.tool_choice
        named = choice.function.name if choice is not None and not isinstance(choice, str) else None
        if named is None and choice == "required":
            named = next((label for label in answer.probabilities if label in theirs), None)
            if named is None:
                raise ApiError(
                    422, "tool_choice is required, but none of the tools has the name of one of this bundle's labels",
                    code="not_supported", param="tool_choice",
                )  # fmt: skip
        sure = answer.confidence >= self._service.threshold(answer, answer.task)
        if named is None and answer.label in theirs and sure:
            named = answer.label
        if named is None:
            return None
        fields = theirs[named].parameters.get("properties", {})
        arguments = {key: slots[key] for key in fields if key in slots}
        return Turn("", "call", calls=((named, arguments),))

    # -- models that write -----------------------------------------------------------------------------------------

    def _instructed(self, loaded: Loaded, record: Record, tools: Mapping[str, Tool]) -> Record:
        """With the agent's instructions, and the tools that the chat template offers."""
        policy = self._service.policy
        if policy.instructions:
            system = Message("system", policy.instructions)
            record = replace(record, messages=(system, *record.messages))
        if not tools:
            return record
        if not loaded.predictor.offers_tools:
            raise ApiError(
                422, "the chat template of this bundle's model has no place for tools: leave them out",
                code="not_supported", param="tools",
            )  # fmt: skip
        return replace(record, meta={**record.meta, "tools": json.dumps([each.as_openai() for each in tools.values()])})

    async def _tool_calls(
        self, loaded: Loaded, draft: Draft, record: Record, answer: Answer, theirs: Mapping[str, Tool]
    ) -> tuple[Answer, Record, Turn]:
        """Has the agent's tools called as the model writes it, and the model read what they say, until it answers."""
        own = self._service.tools
        steps: list[Step] = []
        for _ in range(self._service.policy.max_steps):
            said, wanted = calls.parse(answer.text or "", {*own, *theirs})
            if not wanted:
                break
            client = [call for call in wanted if call.name in theirs]
            if client:
                made = tuple((call.name, call.arguments) for call in client)
                return answer, record, Turn(said, "call", tuple(steps), calls=made)
            results = [await run(own[call.name], call.arguments) for call in wanted]
            steps += [turn.tool_step(c.name, c.arguments, r) for c, r in zip(wanted, results, strict=True)]
            asked = tuple(
                {"id": f"call_{n}", "name": call.name, "arguments": json.dumps(dict(call.arguments))}
                for n, call in enumerate(wanted)
            )
            told = tuple(Message("tool", escape(r.words), (), f"call_{n}") for n, r in enumerate(results))
            record = replace(record, messages=(*record.messages, Message("assistant", said, asked), *told))
            _, answer = await self._understood(loaded, draft, record)
        said, left = calls.parse(answer.text or "", {*own, *theirs})
        if left:
            message = f"the model called tools {self._service.policy.max_steps} times and did not come to an answer"
            return answer, record, Turn(message, "handover", tuple(steps))
        outcome: Any = "tool" if steps else "answer"
        return answer, record, Turn(said, outcome, tuple(steps))

    async def _others(self, loaded: Loaded, sample: Sample, answer: Answer, writes: bool) -> tuple[Answer, ...]:
        """Further answers: texts drawn anew, or the labels that are next in likelihood."""
        more = ((self._chat.n or 1) if self._chat else 1) - 1
        if not more:
            return ()
        if writes:
            how = sample.writing
            assert how is not None
            drawn = [replace(sample, writing=how._replace(seed=how.seed + number)) for number in range(1, more + 1)]
            return tuple([found for found, _ in await asyncio.gather(*map(loaded.answer, drawn))])
        if answer.label is None or len(answer.probabilities) <= more:
            raise ApiError(
                422, f"n is {more + 1}: this task has {max(1, len(answer.probabilities))} answers to choose from",
                code="invalid_value", param="n",
            )  # fmt: skip
        return tuple(
            replace(answer, label=label, words=label, confidence=chance)
            for label, chance in list(answer.probabilities.items())[1 : more + 1]
        )

    def _ended(self, words: str, answer: Answer, told: Turn) -> tuple[str, str]:
        """Words up to the first stop, and why they end."""
        if told.calls:
            return words, "tool_calls"
        places = [place for stop in (self._chat.stops if self._chat else ()) if (place := words.find(stop)) >= 0]
        if places:
            return words[: min(places)].rstrip(), "stop"
        return words, "stop" if answer.stopped else "length"

    # -- afterwards ------------------------------------------------------------------------------------------------

    def _timings(self, told: Turn) -> dict[str, float]:
        stages = {
            "decode": _ms(self._decode_s), "queue": _ms(self._queued_s), "forward": round(self._forward_ms, 3),
        }  # fmt: skip
        for step in (*self._steps, *told.steps):
            if step.kind in ("tool", "retrieve", "explain"):
                stages[step.kind] = round(stages.get(step.kind, 0.0) + step.ms, 3)
        return {**stages, "total": _ms(time.perf_counter() - self._started)}

    async def _keep(self, answered: Answered) -> None:
        service, answer, told = self._service, answered.answer, answered.turn
        threshold = service.threshold(answer, answer.task)
        keeps = self._key.keep and service.answers.keeps(answer.confidence, threshold)
        understood = {
            **{k: v for k, v in answer.to_dict(timings=False).items() if k not in ("probabilities", "bundle")},
            "threshold": threshold,
            **({"slots": dict(answered.slots)} if answered.slots else {}),
        }
        trace = {
            "id": answered.id,
            "created_ms": now_ms(),
            "request_id": self._request_id,
            "bundle": answered.loaded.name,
            "channel": service.channel,
            "canary": answered.loaded is service.bundles.canary,
            "conversation": answered.conversation,
            "understood": understood,
            "outcome": told.outcome,
            "said": answered.words if keeps else None,
            "sources": [{"source": each.source, "title": each.title} for each in told.sources],
            "steps": [step.to_dict() for step in told.steps],
            "timings_ms": dict(answered.timings_ms),
            "question_kept": keeps,
        }
        service.answers.note(answered.id, Trace(self._key.id, trace, answered.record if keeps else None))
        service.observe(answered)
        if told.outcome == "handover":
            await service.hand_over(answered, self._key)
        if answered.conversation is not None and self._chat is not None:
            await service.conversations.add(answered.conversation, self._key, self._turn(answered))

    def _turn(self, answered: Answered) -> list[dict[str, Any]]:
        """What a conversation keeps of this turn, as a client would have sent it."""
        assert self._chat is not None
        said: dict[str, Any] = {"role": "assistant", "content": answered.words}
        if answered.calls:
            said["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for id, name, arguments in answered.calls
            ]
        sent = [message.model_dump(mode="json", exclude_none=True) for message in self._chat.messages]
        return [*sent, said]


def quoted(passages: Sequence[Passage]) -> list[dict[str, Any]]:
    return [each.to_dict() for each in passages]


def _client_tool(tool: Any) -> Tool:
    async def never(_: dict[str, Any]) -> Any:
        raise AssertionError("the client calls its own tools")

    function = tool.function
    try:
        return Tool(function.name, function.description, function.parameters, never)
    except ToolError as error:
        raise ApiError(422, str(error), code="invalid_value", param="tools") from error


def _asked(record: Record) -> str:
    """The words of the last user message."""
    last = next((message for message in reversed(record.messages) if message.role == "user"), None)
    return " ".join(text for what, text in Record("", (last,)).segments() if what == "text").strip() if last else ""


def _code(field: str) -> str:
    return "missing_field" if field in ("candidates", "spans") else "invalid_media"


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
