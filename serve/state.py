"""The routes that tell how things stand: models, health, traces, feedback, metrics, and the page."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from serve import metrics
from serve.answers import Trace
from serve.asking import ERRORS, key_of
from serve.errors import ApiError
from serve.feedback import Feedback, Taken
from serve.keys import Key
from serve.replies import AnswerTrace, Deleted, Health, Model, Models
from serve.service import Service

_MEASURED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "every metric, as Prometheus reads it",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}


def add(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=Models, tags=["state"])
    async def models() -> Any:
        """The names that `model` may hold: the bundle's, and the channel's."""
        return Models(data=[_model(service, name) for name in service.names])

    @app.get("/v1/models/{name}", response_model=Model, responses={404: ERRORS[404]}, tags=["state"])
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

    @app.get("/v1/answers/{id}", response_model=AnswerTrace, responses=ERRORS, tags=["answers"])
    async def answer(id: str, request: Request) -> Any:
        """How an answer came about: what was understood, how sure, which tool or passage, and the time of each step."""
        return AnswerTrace(**(await _trace(service, id, key_of(request))).told)

    @app.delete("/v1/answers/{id}", response_model=Deleted, responses=ERRORS, tags=["answers"])
    async def forget(id: str, request: Request) -> Any:
        """Deletes its trace, the question that was kept with it, and what was said of it."""
        await _trace(service, id, key_of(request))
        await service.feedback.forget(id, key_of(request))
        await service.answers.forget(id)
        return Deleted(id=id)

    @app.post("/v1/feedback", response_model=Taken, responses=ERRORS, tags=["answers"])
    async def feedback(body: Feedback, request: Request) -> Any:
        """What was right or wrong of an answer; it is on the disk when this answers. Sent twice, it counts once."""
        key = key_of(request)
        trace = await _trace(service, body.answer, key, "answer")
        taken = await service.feedback.take(body, trace, key)
        if not taken.repeated:
            service.judged(trace.told, body.says)
        return taken

    @app.get("/metrics", tags=["state"], response_class=Response, responses=_MEASURED)
    async def prometheus() -> Response:
        """What operators watch, for Prometheus; wants a key of the scope admin where keys are wanted."""
        return Response(await service.stored(service.metrics.text), media_type=metrics.CONTENT_TYPE)

    from serve.app import WEB

    if (WEB / "index.html").is_file():
        app.mount("/web", StaticFiles(directory=WEB), name="web")

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(WEB / "index.html", headers={"Content-Security-Policy": _POLICY})


# Scripts and styles of this service alone; pictures and sound that the page made itself.
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
)


async def _trace(service: Service, id: str, key: Key, param: str | None = None) -> Trace:
    """The trace of an answer of this key; an administrator sees all.

    Raises:
        ApiError: there is none, or it is another key's, of which nothing more is said.
    """
    found = await service.answers.find(id) if len(id) <= 64 else None
    if found is None or (found.owner != key.id and not key.may("admin")):
        raise ApiError(404, f"there is no answer {id!r:.80}", code="answer_not_found", param=param)
    return found


def _model(service: Service, name: str) -> Model:
    loaded = next((each for each in service.bundles.all if each.name == name), service.bundles.current)
    predictor = loaded.predictor
    return Model(id=name, created=loaded.created_s, task=predictor.task, tasks=list(predictor.tasks))
