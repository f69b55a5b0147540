"""The routes of administrators: what runs, deploying a bundle, going back, who waits for a person; all audited."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from mmagent import feedback, storage
from mmagent.bundle import BundleError
from mmagent.channels import ChannelError
from mmagent.succession import MisfitError
from serve import logs
from serve.asking import ERRORS, key_of
from serve.errors import ApiError
from serve.service import Service


class Deployment(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bundle: str = Field(max_length=4096, description="a bundle folder, or a run's or search's name")
    channel: str | None = Field(None, description="the channel that is meant; another than this service's is refused")
    share: float = Field(1.0, gt=0, le=1, description="of conversations that meet it; below 1 it is a canary")
    other_task: bool = Field(False, description="also where it lacks a task, a label or an input of the present one")


class Back(BaseModel):
    model_config = ConfigDict(extra="forbid")

    channel: str | None = None


class Done(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=64)


def add(app: FastAPI, service: Service) -> None:
    @app.get("/admin/status", responses=ERRORS, tags=["admin"])
    async def status() -> dict[str, Any]:
        """What answers, in which replicas, and what waits."""
        history = await service.stored(service.bundles.history)
        return {
            "channel": service.channel,
            "bundle": service.bundles.current.name,
            "canary": service.bundles.canary.name if service.bundles.canary else None,
            "share": service.bundles.share,
            "trouble": service.trouble or service.bundles.trouble or None,
            "replicas": await service.bundles.heard(),
            "waiting": service.waiting,
            "feedback_lines": await service.stored(_feedback_lines),
            "handovers": len(await service.handovers.waiting()),
            "traces_lost": service.answers.lost,
            "drift": service.bundles.current.drift.told(),
            "history": [dict(line) for line in history.lines[-20:]] if history else [],
        }

    @app.post("/admin/bundles", responses=ERRORS, tags=["admin"])
    async def deploy(body: Deployment, request: Request) -> dict[str, Any]:
        """Loads a bundle beside the present one, asks its golden examples through the whole serving path, and where
        their stored answers come back (probabilities within 1e-4) moves traffic: at once, or a share as a canary. One
        that was built for something else is refused before anything is asked."""
        _check_channel(service, body.channel)
        key = key_of(request)
        _audit("deploy", request, bundle=body.bundle, share=body.share)
        try:
            verdict, followed = await service.deploy(body.bundle, body.share, by=key.id, other_task=body.other_task)
        except MisfitError as error:
            message = f"{_public(error)}; `other_task: true` (--other-task of jobs.promote) deploys it all the same"
            raise ApiError(409, message, code="other_task", param="bundle") from error
        except BundleError as error:
            raise ApiError(422, _public(error), code="invalid_bundle", param="bundle") from error
        except ChannelError as error:
            raise ApiError(409, _public(error), code="channel") from error
        if followed is None:
            message = f"the gate refuses {body.bundle}: {'; '.join(verdict.differences[:3])}"
            raise ApiError(409, message, code="parity_failed", param="bundle")
        done, all_of = followed
        return {**verdict.to_dict(), **_now(service), "replicas": {"follow": done, "alive": all_of}}

    @app.post("/admin/rollback", responses=ERRORS, tags=["admin"])
    async def rollback(request: Request, body: Back | None = None) -> dict[str, Any]:
        """Ends the canary where there is one, else goes back to the bundle that answered before."""
        _check_channel(service, body.channel if body else None)
        _audit("rollback", request)
        try:
            _, (done, all_of) = await service.rollback(key_of(request).id)
        except (BundleError, ChannelError) as error:
            raise ApiError(409, _public(error), code="channel") from error
        return {**_now(service), "replicas": {"follow": done, "alive": all_of}}

    @app.get("/admin/handovers", responses=ERRORS, tags=["admin"])
    async def handovers() -> dict[str, Any]:
        """The newest requests that wait for a person."""
        return {"object": "list", "data": await service.handovers.waiting()}

    @app.post("/admin/handovers/done", responses=ERRORS, tags=["admin"])
    async def done(body: Done, request: Request) -> dict[str, Any]:
        """A person has taken it."""
        _audit("handover done", request, id=body.id)
        if not await service.handovers.done(body.id):
            raise ApiError(404, f"no request {body.id!r:.80} waits", code="handover_not_found", param="id")
        return {"id": body.id, "done": True}

    @app.get("/admin/questions", responses=ERRORS, tags=["admin"])
    async def questions(
        limit: Annotated[int, Query(gt=0, le=200)] = 50, before: Annotated[str, Query(max_length=64)] = ""
    ) -> dict[str, Any]:
        """Questions that were kept, with the traces of their answers, the newest first; `next` is the `before` of the
        next page."""
        found, cursor = await service.answers.kept(limit, before)
        rows = [
            {"answer": id, "trace": dict(trace.told), "record": feedback.plain(trace.question.to_row())}
            for id, trace in found
            if trace.question is not None
        ]
        return {"object": "list", "data": rows, "next": cursor}

    @app.get("/admin/audit", responses=ERRORS, tags=["admin"])
    async def audit() -> dict[str, Any]:
        """The last hundred acts of administrators."""
        return {"object": "list", "data": await service.stored(_acts)}


def _check_channel(service: Service, named: str | None) -> None:
    if service.channel is None:
        message = "this service follows no channel: start it with `python -m serve.start --channel NAME`"
        raise ApiError(409, message, code="no_channel")
    if named is not None and named != service.channel:
        message = f"this service follows the channel {service.channel!r}, not {named!r:.100}"
        raise ApiError(409, message, code="other_channel", param="channel")


def _public(error: Exception) -> str:
    """An error's words without where the storage root lies."""
    root = str(storage.root())
    return str(error).replace(f"{root}/", "").replace(root, "the storage root")


def _now(service: Service) -> dict[str, Any]:
    canary = service.bundles.canary
    return {
        "channel": service.channel,
        "bundle": service.bundles.current.name,
        "canary": canary.name if canary else None,
        "share": service.bundles.share,
    }


def _audit(act: str, request: Request, **facts: Any) -> None:
    try:
        logs.audit(act, key_of(request).id, request.state.request_id, **facts)
    except OSError as error:
        message = "the audit log cannot be written, so nothing is done; see the disk of the service"
        raise ApiError(503, message, code="not_audited") from error


def _acts() -> list[dict[str, Any]]:
    file = logs.audit_file()
    if not file.exists():
        return []
    with open(file, "rb") as lines:
        lines.seek(0, os.SEEK_END)
        lines.seek(max(0, lines.tell() - 65_536))
        found = [line for line in lines.read().split(b"\n") if line.startswith(b"{")]
    return [json.loads(line) for line in found[-100:]]


def _feedback_lines() -> int:
    files = feedback.folder().glob("*.jsonl") if feedback.folder().is_dir() else ()
    return sum(file.read_bytes().count(b"\n") for file in files)
