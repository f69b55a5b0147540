"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``, whatever goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.store import StoreError

logger = logging.getLogger("mmagent.serve")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str = Field(description="what was seen, what was wanted, what to do")
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="the place in the request", examples=["messages[0].content[1]"])
    code: str | None = Field(examples=["invalid_media"])


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than the one asked for. A part of FastAPI's own family, so that it passes its body parsing."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param

    def response(self) -> JSONResponse:
        return respond(self.status_code, self.detail, code=self.code, param=self.param, headers=self.headers)


def detail_of(error: ApiError | RequestValidationError) -> dict[str, Any]:
    """The error's object, for where an answer holds several."""
    if isinstance(error, ApiError):
        status, message, code, param = error.status_code, error.detail, error.code, error.param
    else:
        status, first = 422, error.errors()[0]
        param = place(first["loc"])
        message, code = _explain(first, param)
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return ErrorDetail(message=message, type=kind, param=param, code=code).model_dump()


def respond(
    status: int, message: str, *, code: str | None, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    detail = ErrorDetail(message=message, type=kind, param=param, code=code)
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, dict(headers or {}))


def install(app: FastAPI) -> None:
    """Gives every error of an app OpenAI's shape, those of the layers added before included."""
    app.add_middleware(Shield)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)


class Shield:
    """The outermost layer: what nobody expected becomes a 500 without its details, which go to the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def remember(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, remember)
        except ApiError as error:  # of a layer outside FastAPI
            if started:
                raise
            await error.response()(scope, receive, send)
        except StoreError as error:
            if started:
                raise
            logger.error("the store does not answer at %s %s: %s", scope["method"], scope["path"], error)
            message = "what the service keeps cannot be reached now; try again later"
            answer = respond(503, message, code="store_unreachable", headers={"Retry-After": "10"})
            await answer(scope, receive, send)
        except Exception:
            if started:
                raise
            logger.exception("unexpected error at %s %s", scope["method"], scope["path"])
            message = "the service met an unexpected error; its log says more"
            await respond(500, message, code="internal_error")(scope, receive, send)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    path = request.url.path
    if error.status_code == 404:
        message, code = f"there is nothing at {path}: /docs lists what is", "unknown_path"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow", "")
        message, code = f"{request.method} is not for {path}: {allowed or 'another method'} is", "method_not_allowed"
    elif error.status_code == 400:  # FastAPI: a body that is no text, or is nested too deep
        message, code = "the body could not be read as JSON", "invalid_json"
    else:
        message, code = str(error.detail), HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return respond(error.status_code, message, code=code, headers=error.headers)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", "")
        return respond(400, f"the body is not JSON: {reason} at character {first['loc'][-1]}", code="invalid_json")
    param = place(first["loc"])
    message, code = _explain(first, param)
    if len(found) > 1:
        message += f" (and {len(found) - 1} more)"
    return respond(422, message, code=code, param=param)


def place(loc: Sequence[int | str]) -> str | None:
    """``("body", "messages", 0, "content", "<parts>", 1)`` -> ``messages[0].content[1]``. Names in angle brackets are
    the branches of unions in serve.questions, which the caller never wrote."""
    out = ""
    for part in loc[1:]:
        if isinstance(part, int):
            out += f"[{part}]"
        elif not part.startswith("<"):
            out += f".{part}" if out else part
    return out or None


def _explain(item: Mapping[str, Any], param: str | None) -> tuple[str, str]:
    where = param or "the body"
    if item["type"] == "missing":
        if param is None:
            return "the body is missing: a JSON object is wanted, see /docs", "missing_field"
        return f"{where} is missing", "missing_field"
    if item["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return f"{where} is {_shown(item['input'])}, but a JSON object is wanted", "invalid_value"
    reason = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {reason}", "invalid_value"
    return f"{where} is {_shown(item['input'])}: {reason[0].lower()}{reason[1:]}", "invalid_value"


def _shown(value: Any) -> str:
    """What was given, short; never the content of a message, which may be long or private."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"a text of {len(value)} characters"
    return {"dict": "an object", "list": "a list"}.get(type(value).__name__, type(value).__name__)
