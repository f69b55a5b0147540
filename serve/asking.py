"""The routes that answer: OpenAI's chat completions and embeddings, typed predictions, conversations."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError

from serve import completions, embedding, errors
from serve.errors import ApiError, ErrorBody
from serve.ids import new_id
from serve.keys import ANYONE, Key
from serve.questions import ChatRequest, EmbeddingsRequest, ManyRequest, OneOrMany, PredictRequest
from serve.replies import (
    ChatCompletion,
    ConversationMessages,
    Deleted,
    Embedding,
    Embeddings,
    FailedPrediction,
    Prediction,
    Predictions,
)
from serve.service import Service
from serve.turns import Answered

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
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer; with `stream: true` as server-sent events, each a piece of it, and `[DONE]`",
        "content": {
            "text/event-stream": {
                "schema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
            }
        },
    }
}
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def key_of(request: Request) -> Key:
    key: Key = getattr(request.state, "key", ANYONE)
    return key


def add(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS | _STREAMED, tags=["ask"])
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Text, pictures and sound in, the answer as text (and sound) out; `stream: true` sends it as server-sent
        events."""
        service.check_model(body.model)
        key, id = key_of(request), new_id("ans")
        request.state.answer = id
        if body.stream:
            pieces = await completions.begun(service, body, key, request.state.request_id, id)
            model = service.bundles.pick(body.conversation or id, body.model).name
            frame = {"id": id, "created": int(time.time()), "model": model}
            chunks = completions.events(body, frame, pieces)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=_UNBUFFERED)
        return _as_it_is(await completions.completed(service, body, key, request.state.request_id, id))

    @app.post("/v1/predict", response_model=Prediction | Predictions, responses=ERRORS, tags=["ask"])
    async def predict(body: OneOrMany, request: Request) -> Any:
        """The typed answer to a conversation, or to a text, a picture and a sound, with what its task wants besides;
        or to several of them, as `inputs`."""
        if isinstance(body, ManyRequest):
            return _as_it_is(await _many(service, body, request))
        service.check_model(body.model)
        answered = await service.ask(body, key_of(request), request.state.request_id)
        request.state.answer = answered.id
        return _as_it_is(_prediction(service, answered))

    @app.post("/v1/embeddings", response_model=Embeddings, responses=ERRORS, tags=["ask"])
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Any:
        """A vector of length 1 for each input: of words the language model's mean state."""
        service.check_model(body.model)
        vectors, tokens = await embedding.embed(service, body, key_of(request))
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


def _as_it_is(answer: BaseModel) -> Response:
    """An answer that is valid already: FastAPI would validate it once more, and make JSON of it in two steps."""
    return Response(answer.model_dump_json(), media_type="application/json")


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
    extension = completions.extension_of(service, answered)
    return Prediction(id=answered.id, created=answered.created_s, model=extension.bundle, mmagent=extension)


def _coded(vector: np.ndarray, how: str) -> list[float] | str:
    if how == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [round(float(value), 7) for value in vector]
