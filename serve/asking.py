"""The routes that answer: OpenAI's chat completions and embeddings, typed predictions, conversations."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import jsonschema
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from mmagent.predictor import Answer
from serve import errors, spoken
from serve.errors import ApiError, ErrorBody
from serve.ids import new_id
from serve.keys import ANYONE, Key
from serve.questions import ChatRequest, EmbeddingsRequest, ManyRequest, OneOrMany, PredictRequest
from serve.replies import (
    Called,
    CalledFunction,
    ChatCompletion,
    Choice,
    ConversationMessages,
    Deleted,
    Embedding,
    Embeddings,
    Extension,
    FailedPrediction,
    Logprobs,
    Prediction,
    Predictions,
    Said,
    Sound,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from serve.service import Service
from serve.turns import Answered, quoted

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the body is not JSON"},
    401: {"model": ErrorBody, "description": "no API key, or one that is wrong, expired or revoked"},
    403: {"model": ErrorBody, "description": "the API key may not do that"},
    404: {"model": ErrorBody, "description": "the model, conversation or answer is not here"},
    408: {"model": ErrorBody, "description": "the body came too slowly"},
    409: {"model": ErrorBody, "description": "it cannot be done as things stand: no channel, or the gate refuses"},
    413: {"model": ErrorBody, "description": "a picture, a sound or the body is over a limit, which is named"},
    422: {"model": ErrorBody, "description": "a field or part cannot be used, which is named in `param`"},
    429: {"model": ErrorBody, "description": "the key's limit is reached; see Retry-After"},
    431: {"model": ErrorBody, "description": "the headers are too large"},
    501: {"model": ErrorBody, "description": "no synthesiser is installed"},
    503: {"model": ErrorBody, "description": "too many requests wait; see Retry-After"},
    504: {"model": ErrorBody, "description": "the deadline passed"},
}
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_SOUND_HOURS = 1


def key_of(request: Request) -> Key:
    key: Key = getattr(request.state, "key", ANYONE)
    return key


def add(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS, tags=["ask"])
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Text, pictures and sound in, the answer as text (and sound) out; `stream: true` sends it as server-sent
        events."""
        service.check_model(body.model)
        if body.stream:
            id = new_id("ans")
            pieces = await _begun(service, body, request, id)
            model = service.bundles.pick(body.conversation or id, body.model).name
            frame = {"id": id, "created": int(time.time()), "model": model}
            return StreamingResponse(_events(body, frame, pieces), media_type="text/event-stream", headers=_UNBUFFERED)
        return await _completed(service, body, request)

    @app.post("/v1/predict", response_model=Prediction | Predictions, responses=ERRORS, tags=["ask"])
    async def predict(body: OneOrMany, request: Request) -> Any:
        """The typed answer to a conversation, or to a text, a picture and a sound, with what its task wants besides;
        or to several of them, as `inputs`."""
        if isinstance(body, ManyRequest):
            return await _many(service, body, request)
        service.check_model(body.model)
        answered = await service.ask(body, key_of(request), request.state.request_id)
        request.state.answer = answered.id
        return _prediction(service, answered)

    @app.post("/v1/embeddings", response_model=Embeddings, responses=ERRORS, tags=["ask"])
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Any:
        """A vector of length 1 for each input: of words the language model's mean state."""
        service.check_model(body.model)
        vectors, tokens = await service.embed(body, key_of(request))
        if body.dimensions is not None:
            if body.dimensions > vectors.shape[1]:
                message = f"dimensions is {body.dimensions}, but a vector has {vectors.shape[1]}"
                raise ApiError(422, message, code="invalid_value", param="dimensions")
            vectors = vectors[:, : body.dimensions]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Embeddings(
            model=service.predictor.name,
            data=[Embedding(index=n, embedding=_coded(v, body.encoding_format)) for n, v in enumerate(vectors)],
            usage={"prompt_tokens": tokens, "total_tokens": tokens},
        )

    @app.get("/v1/conversations/{id}", response_model=ConversationMessages, responses=ERRORS, tags=["conversations"])
    async def conversation(id: str, request: Request) -> Any:
        """All messages that the service keeps of a conversation of this key."""
        return ConversationMessages(id=id, messages=await service.conversations.existing(id, key_of(request)))

    @app.delete("/v1/conversations/{id}", response_model=Deleted, responses=ERRORS, tags=["conversations"])
    async def forget(id: str, request: Request) -> Any:
        """Deletes it."""
        await service.conversations.delete(id, key_of(request))
        return Deleted(id=id)


async def _many(service: Service, body: ManyRequest, request: Request) -> Predictions:
    """Each input's prediction, or why there is none; they share forward passes."""

    async def one(item: Any) -> Prediction | FailedPrediction:
        try:
            question = PredictRequest.model_validate(item)
            service.check_model(question.model)
            return _prediction(service, await service.ask(question, key_of(request), request.state.request_id))
        except ValidationError as error:
            found = RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()])
            return FailedPrediction(error=errors.detail_of(found))
        except ApiError as error:
            return FailedPrediction(error=errors.detail_of(error))

    return Predictions(data=list(await asyncio.gather(*map(one, body.inputs))))


def _prediction(service: Service, answered: Answered) -> Prediction:
    extension = extension_of(service, answered)
    return Prediction(id=answered.id, created=answered.created_s, model=extension.bundle, mmagent=extension)


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


async def _completed(
    service: Service,
    body: ChatRequest,
    request: Request,
    hear: Callable[[str], None] | None = None,
    id: str = "",
) -> ChatCompletion:
    answered = await service.ask(body, key_of(request), request.state.request_id, hear=hear, id=id)
    request.state.answer = answered.id
    return await _completion(service, body, answered, key_of(request))


async def _begun(service: Service, body: ChatRequest, request: Request, id: str) -> AsyncIterator[str | ChatCompletion]:
    """A text's pieces as they are written, and the whole answer at the end. Returns when there is something to say, so
    that what is wrong with a request is still told by its status."""
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def hear(words: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, words)

    work = asyncio.ensure_future(_completed(service, body, request, hear, id))
    work.add_done_callback(lambda _: pieces.put_nowait(None))
    first = await pieces.get()
    if first is None:
        await work  # raises what went wrong

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
    elif body.response_format is not None and body.response_format.type != "text":
        content = _structured(body, answered, answer, words)
    return Choice(
        index=number,
        message=Said(content=content, tool_calls=calls if calls and number == 0 else None),
        logprobs=_logprobs(answer, words, body.top_logprobs or 0) if body.logprobs else None,
        finish_reason=finish,
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
    except jsonschema.SchemaError as error:
        message = f"response_format.json_schema.schema is no JSON schema: {error.message:.200}"
        raise ApiError(422, message, code="invalid_value", param="response_format") from error
    made = written if isinstance(written, dict) else {k: known[k] for k in schema.get("properties", {}) if k in known}
    wrong = next(jsonschema.Draft202012Validator(schema).iter_errors(made), None)
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


def _coded(vector: np.ndarray, how: str) -> list[float] | str:
    if how == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [round(float(value), 7) for value in vector]


async def _events(
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
