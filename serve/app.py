"""The HTTP application around a `Service`: its layers and routes. Any ASGI server can run it.

The layers, from outside: trail (ids, log, counts), CORS, shield (errors), guard (keys, limits, deadlines). CORS lies
around the shield, so that a web page of another host can read why it was refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

import mmagent
from serve import admin, asking, errors, learning, speaking, state
from serve.guard import Guard
from serve.limits import RATE_HEADERS
from serve.service import Service
from serve.trail import REQUEST_ID, Trail

WEB = Path(__file__).parent / "web"

_DESCRIPTION = """
`/v1/chat/completions` speaks OpenAI's language, so its clients work unchanged; `/v1/predict` gives the typed answer.
Errors have OpenAI's shape everywhere.

A bundle answers one task or several; `/v1/models` names them. A request says which it means in `task`, or gets the
bundle's default. OpenAI's Python client sends that field, and the others that it does not know (`conversation`,
`explain`, `context`, `candidates`, `spans`), as `extra_body={"task": "tag"}`.

**extract** reads a text and a question about it: the text as `context`; or, where that field is not there, as the texts
of the user's messages, of which the last is the question and those before it, a line each, are the context.
**match** chooses among `candidates`. **relate** says how the `head` and the `tail` in `spans` stand to each other.

**conversation**: a name of the client's own; the service keeps what was said before, and a request brings its new
messages alone. **explain** adds the evidence of an answer. Every answer has an id, by which `/v1/answers/{id}` tells
how it came about and `/v1/feedback` takes what was right.

**tools**: a model that writes calls them as its chat template teaches it; one that classifies calls the tool that has
its label's name. **n** gives the likeliest answers, or texts drawn anew.

An API key goes into `Authorization: Bearer KEY` or `x-api-key: KEY`. Say how long you wait in `x-request-timeout-ms`:
what comes later is not computed.
"""


def build(service: Service) -> FastAPI:
    """The application."""

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
    app.add_middleware(Guard, config=service.config, keys=service.keys, limits=service.limits)
    errors.install(app)
    if service.config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.config.allow_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "retry-after", *RATE_HEADERS],
        )
    app.add_middleware(Trail, metrics=service.metrics)
    for room in (asking, speaking, state, admin, learning):
        room.add(app, service)
    return app
