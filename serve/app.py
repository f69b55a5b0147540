"""The HTTP application around a `Service`: routes, streaming, documentation. Any ASGI server can run it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi_offline import FastAPIOffline

import mmagent
from serve import errors
from serve.errors import ErrorBody
from serve.guard import Guard
from serve.questions import ChatRequest, PredictRequest
from serve.replies import ChatCompletion, Choice, Health, Model, Models, Prediction, Said, Usage
from serve.service import Answered, Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the body is not JSON"},
    401: {"model": ErrorBody, "description": "no API key, or a wrong one"},
    404: {"model": ErrorBody, "description": "the model is not here"},
    413: {"model": ErrorBody, "description": "a picture, a sound or the body is over a limit, which is named"},
    422: {"model": ErrorBody, "description": "a field or part cannot be used, which is named in `param`"},
    503: {"model": ErrorBody, "description": "too many requests wait; see Retry-After"},
}

_DESCRIPTION = """
`/v1/chat/completions` speaks OpenAI's language, so its clients work unchanged; `/v1/predict` gives the typed answer.
Errors have OpenAI's shape everywhere.

A bundle answers one task or several; `/v1/models` names them. A request says which it means in `task`, or gets the
bundle's default. OpenAI's Python client sends that field, and the others that it does not know (`context`,
`candidates`, `spans`), as `extra_body={"task": "tag"}`.

**extract** reads a text and a question about it: the text as `context`; or, where that field is not there, as the texts
of the user's messages, of which the last is the question and those before it, a line each, are the context.
**match** chooses among `candidates`. **relate** says how the `head` and the `tail` in `spans` stand to each other.
"""


def build(service: Service) -> FastAPI:
    """The application; the layers around its routes are, from outside: shield, guard."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPIOffline(  # its pages load nothing from another host
        title="mmagent",
        version=mmagent.__version__,
        summary="An agent that reads, sees and hears.",
        description=_DESCRIPTION,
        lifespan=life,
    )
    app.add_middleware(Guard, config=service.config)
    errors.install(app)
    _add_questions(app, service)
    _add_state(app, service)
    return app


def _add_questions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS, tags=["ask"])
    async def chat(request: ChatRequest) -> Any:
        """Text, pictures and sound in, the answer as text out; `stream: true` sends it as server-sent events."""
        service.check_model(request.model)
        if refused := request.refused:
            raise errors.ApiError(422, refused[1], code="not_supported", param=refused[0])
        answered = await service.ask(request)
        if request.stream:
            usage = bool(request.stream_options and request.stream_options.include_usage)
            return StreamingResponse(_events(answered, usage), media_type="text/event-stream", headers=_UNBUFFERED)
        return ChatCompletion(
            id=answered.id,
            created=answered.created_s,
            model=answered.extension.bundle,
            choices=[Choice(message=Said(content=answered.words))],
            usage=_usage(answered),
            mmagent=answered.extension,
        )

    @app.post("/v1/predict", response_model=Prediction, responses=_ERRORS, tags=["ask"])
    async def predict(request: PredictRequest) -> Any:
        """The typed answer to a conversation, or to a text, a picture and a sound, with what its task wants besides."""
        service.check_model(request.model)
        answered = await service.ask(request)
        bundle = answered.extension.bundle
        return Prediction(id=answered.id, created=answered.created_s, model=bundle, mmagent=answered.extension)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=Models, tags=["state"])
    async def models() -> Any:
        """The names that `model` may hold: the bundle's, and the channel's."""
        return Models(data=[_model(service, name) for name in service.names])

    @app.get("/v1/models/{name}", response_model=Model, responses={404: _ERRORS[404]}, tags=["state"])
    async def model(name: str) -> Any:
        """One of them."""
        service.check_model(name)
        return _model(service, name)

    @app.get("/healthz", response_model=Health, responses={503: {"model": Health}}, tags=["state"])
    async def healthz() -> Any:
        """Whether requests are answered, and if not, why. Open to all, also where keys are wanted."""
        trouble = service.trouble
        health = Health(
            status="not ready" if trouble else "ready",
            reason=trouble,
            bundle=service.predictor.name,
            channel=service.channel,
            task=service.predictor.task,
            tasks=list(service.predictor.tasks),
            modalities=list(service.predictor.modalities),
            waiting=service.waiting,
        )
        return JSONResponse(health.model_dump(), 503 if trouble else 200)


def _model(service: Service, name: str) -> Model:
    predictor = service.predictor
    return Model(id=name, created=service.created_s, task=predictor.task, tasks=list(predictor.tasks))


_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _events(answered: Answered, with_usage: bool) -> AsyncIterator[str]:
    """OpenAI's chunks: the role first, the words, the end (with our extension), the usage where asked for."""

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        body = {
            "id": answered.id,
            "object": "chat.completion.chunk",
            "created": answered.created_s,
            "model": answered.extension.bundle,
            "choices": choices,
            **({"usage": None} if with_usage else {}),
            **more,
        }
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def choice(delta: dict[str, str], finish_reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]

    yield chunk(choice({"role": "assistant", "content": ""}))
    yield chunk(choice({"content": answered.words}))
    yield chunk(choice({}, "stop"), mmagent=answered.extension.model_dump())
    if with_usage:
        yield chunk([], usage=_usage(answered).model_dump())
    yield "data: [DONE]\n\n"


def _usage(answered: Answered) -> Usage:
    read, said = answered.prompt_tokens, answered.completion_tokens
    return Usage(prompt_tokens=read, completion_tokens=said, total_tokens=read + said)
