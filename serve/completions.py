"""OpenAI's chat completion, whole or in chunks, of what was answered."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import jsonschema
import jsonschema.validators
import referencing
import referencing.exceptions

from mmagent.answer import Answer
from serve import spoken
from serve.errors import ApiError
from serve.ids import new_id
from serve.keys import Key
from serve.questions import ChatRequest
from serve.replies import (
    Called,
    CalledFunction,
    ChatCompletion,
    Choice,
    Extension,
    Logprobs,
    Said,
    Sound,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from serve.service import Service
from serve.turns import Answered, quoted

_SOUND_HOURS = 1


def extension_of(service: Service, answered: Answered) -> Extension:
    answer = answered.answer
    told = answer.to_dict()
    told["abstained"] = answer.confidence < service.threshold(answer, answer.task)
    return Extension(
        **{
            **told,
            "timings_ms": dict(answered.timings_ms),
            "channel": service.channel,
            "outcome": answered.turn.outcome,
            "conversation": answered.conversation,
            "sources": quoted(answered.turn.sources) or None,
            "evidence": answered.evidence,
        }
    )


async def completed(
    service: Service,
    body: ChatRequest,
    key: Key,
    request_id: str,
    id: str,
    hear: Callable[[str], None] | None = None,
) -> ChatCompletion:
    """The whole answer to a request.

    Raises:
        ApiError: see `Service.ask`; a format or voice that it cannot have.
    """
    return await _completion(service, body, await service.ask(body, key, request_id, hear=hear, id=id), key)


async def begun(
    service: Service, body: ChatRequest, key: Key, request_id: str, id: str
) -> AsyncIterator[str | ChatCompletion]:
    """A text's pieces as they are written, and the whole answer at the end. Returns when there is something to say, so
    that what is wrong with a request is still told by its status."""
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def hear(words: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, words)

    work = asyncio.ensure_future(completed(service, body, key, request_id, id, hear))
    work.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        first = await pieces.get()
        if first is None:
            await work  # raises what went wrong
    except BaseException:
        work.cancel()  # the client is gone, or its time is over
        raise

    async def all_of() -> AsyncIterator[str | ChatCompletion]:
        piece = first
        try:
            while piece is not None:
                yield piece
                piece = await pieces.get()
            yield await work
        finally:
            work.cancel()  # the client is gone

    return all_of()


async def _completion(service: Service, body: ChatRequest, answered: Answered, key: Key) -> ChatCompletion:
    choices = [_choice(body, answered, answered.answer, answered.words, answered.finish_reason)]
    for number, other in enumerate(answered.others, 1):
        finish = "stop" if other.stopped else "length"
        choices.append(_choice(body, answered, other, other.words, finish, number))
    if body.speaks and choices[0].message.content:
        choices[0].message.audio = await _sound(service, body, choices[0].message.content, key)
    read, said = answered.prompt_tokens, answered.completion_tokens
    return ChatCompletion(
        id=answered.id,
        created=answered.created_s,
        model=answered.loaded.name,
        choices=choices,
        usage=Usage(prompt_tokens=read, completion_tokens=said, total_tokens=read + said),
        mmagent=extension_of(service, answered),
    )


def _choice(body: ChatRequest, answered: Answered, answer: Answer, words: str, finish: str, number: int = 0) -> Choice:
    calls = [
        Called(id=id, function=CalledFunction(name=name, arguments=arguments)) for id, name, arguments in answered.calls
    ]
    content: str | None = words
    if calls and number == 0:
        content = words or None
    elif body.shaped:
        content = _structured(body, answered, answer, words)
    return Choice(
        index=number,
        message=Said(content=content, tool_calls=calls if calls and number == 0 else None),
        logprobs=_logprobs(answer, words, body.top_logprobs or 0) if body.logprobs else None,
        finish_reason=finish,
    )


def _unchecked(*_: Any) -> tuple[()]:
    return ()


def _additional(validator: Any, wanted: Any, made: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """`additionalProperties`, where no pattern of a property's name says more."""
    if not validator.is_type(made, "object") or schema.get("patternProperties"):
        return
    for name in made.keys() - schema.get("properties", {}).keys():
        if wanted is False:
            yield jsonschema.ValidationError(f"{name!r} is not among its properties")
        elif isinstance(wanted, dict):
            yield from validator.descend(made[name], wanted, path=name)


# What a client sends is no reason to fetch anything (a registry of our own knows no address), nor to search by a
# regular expression, which may take for ever and lets nothing else run meanwhile.
_Checked = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    dict.fromkeys(("pattern", "patternProperties", "unevaluatedProperties"), _unchecked)
    | {"additionalProperties": _additional},
)


def _structured(body: ChatRequest, answered: Answered, answer: Answer, words: str) -> str:
    """The answer as JSON: what a model wrote, where that is JSON; else the typed answer's fields that a schema names.

    Raises:
        ApiError: the schema cannot be met.
    """
    assert body.response_format is not None
    fields = {k: v for k, v in answer.to_dict(timings=False).items() if k not in ("bundle", "probabilities")}
    known: dict[str, Any] = {**fields, "answer": words, "slots": dict(answered.slots), **answered.slots}
    try:
        written = json.loads(words) if answer.text is not None else None
    except ValueError:
        written = None
    if body.response_format.json_schema is None:
        return json.dumps(written if isinstance(written, dict) else {"answer": words, **fields}, ensure_ascii=False)
    schema = body.response_format.json_schema.schema_
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        named = schema.get("properties", {})
        made = written if isinstance(written, dict) else {k: known[k] for k in named if k in known}
        wrong = next(_Checked(schema, registry=referencing.Registry()).iter_errors(made), None)
    except (jsonschema.SchemaError, referencing.exceptions.Unresolvable, RecursionError) as error:
        what = error.message if isinstance(error, jsonschema.SchemaError) else str(error)
        message = f"response_format.json_schema.schema is no JSON schema that can be used: {what:.200}"
        raise ApiError(422, message, code="invalid_value", param="response_format") from error
    if wrong is not None:
        message = f"the answer does not meet the schema ({wrong.message:.200}); it has: {', '.join(sorted(known))}"
        raise ApiError(422, message, code="schema_not_met", param="response_format")
    return json.dumps(made, ensure_ascii=False)


def _logprobs(answer: Answer, words: str, top: int) -> Logprobs:
    if answer.tokens:
        return Logprobs(content=[_token(text, chance, []) for text, chance in answer.tokens])
    others = [_top(label, math.log(max(chance, 1e-12))) for label, chance in list(answer.probabilities.items())[:top]]
    return Logprobs(content=[_token(words, math.log(max(answer.confidence, 1e-12)), others)])


def _top(text: str, chance: float) -> TopLogprob:
    return TopLogprob(token=text, logprob=round(chance, 6), bytes=list(text.encode()))


def _token(text: str, chance: float, top: list[TopLogprob]) -> TokenLogprob:
    return TokenLogprob(token=text, logprob=round(chance, 6), bytes=list(text.encode()), top_logprobs=top)


async def _sound(service: Service, body: ChatRequest, words: str, key: Key) -> Sound:
    wanted = body.audio
    voice = spoken.voice_of(wanted.voice if wanted else None, key.profile, service.config.voice)
    data = await spoken.speak(words, voice=voice, format=wanted.format if wanted else "wav")
    return Sound(
        id=new_id("audio"), data=base64.b64encode(data).decode(),
        expires_at=int(time.time()) + _SOUND_HOURS * 3600, transcript=words,
    )  # fmt: skip


async def events(
    body: ChatRequest, frame: Mapping[str, Any], pieces: AsyncIterator[str | ChatCompletion]
) -> AsyncIterator[str]:
    """OpenAI's chunks: the role first, the words, the end (with our extension), the usage where asked for."""
    with_usage = bool(body.stream_options and body.stream_options.include_usage)

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if with_usage else {}
        whole = {**frame, "object": "chat.completion.chunk", "choices": choices, **usage, **more}
        return f"data: {json.dumps(whole, ensure_ascii=False)}\n\n"

    def part(index: int, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish}

    told = ""
    reply: ChatCompletion | None = None
    async for piece in pieces:
        if isinstance(piece, ChatCompletion):
            reply = piece
            break
        if not told:
            yield chunk([part(0, {"role": "assistant", "content": ""})])
        told += piece
        yield chunk([part(0, {"content": piece})])
    assert reply is not None
    for choice in reply.choices:
        said = choice.message
        words = said.content or ""
        if choice.index or not told:
            yield chunk([part(choice.index, {"role": "assistant", "content": ""})])
        for word in _pieces(words.removeprefix(told) if not choice.index else words):
            yield chunk([part(choice.index, {"content": word})])
        if said.tool_calls:
            calls = [{"index": n, **call.model_dump()} for n, call in enumerate(said.tool_calls)]
            yield chunk([part(choice.index, {"tool_calls": calls})])
        if said.audio is not None:
            yield chunk([part(choice.index, {"audio": said.audio.model_dump()})])
        more = {} if choice.index else {"mmagent": reply.mmagent.model_dump()}
        logprobs = choice.logprobs.model_dump() if choice.logprobs else None
        yield chunk([part(choice.index, {}, choice.finish_reason, logprobs)], **more)
    if with_usage:
        yield chunk([], usage=reply.usage.model_dump())
    yield "data: [DONE]\n\n"


def _pieces(words: str) -> list[str]:
    """Words with the space before each, as a client shows them one after the other."""
    out = words.split(" ")
    return [out[0], *(f" {word}" for word in out[1:])] if words else []
