"""The routes of those who teach: the questions whose right answer would teach most, and what became of rounds of
refitting."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request

from mmagent import choosing, feedback, storage, targets, written
from mmagent.answer import Answer
from mmagent.bundle import BundleError
from mmagent.choosing import Weighed
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.targets import kind
from serve.asking import ERRORS, key_of
from serve.errors import ApiError
from serve.feedback import Feedback, Taken
from serve.service import Service

_LOOKED_AT = 500  # kept questions, the newest
_PAGE, _PASS = 100, 16  # the latter of one forward pass: those who ask wait for no longer one
_ROUNDS = 10  # the newest


def add(app: FastAPI, service: Service) -> None:
    queue = Queue(service)

    @app.get("/admin/queue", responses=ERRORS, tags=["admin"])
    async def label_next(limit: Annotated[int, Query(gt=0, le=100)] = 20) -> dict[str, Any]:
        """Kept questions that nobody has corrected, those that teach most first, as `jobs.select` chooses them: with
        what the present bundle answers (`agreed` is the label that says so), and the field that takes the right
        answer of `POST /admin/labels`."""
        rows, waiting = await queue.next(limit)
        return {"object": "list", "data": rows, "waiting": waiting}

    @app.post("/admin/labels", response_model=Taken, responses=ERRORS, tags=["admin"])
    async def label(body: Feedback, request: Request) -> Any:
        """The right answer to a question of the queue, as feedback. It is no verdict on the bundle that answered: those
        that teach most are the hard ones."""
        trace = await service.answers.find(body.answer)
        if trace is None:
            raise ApiError(404, f"there is no answer {body.answer!r:.80}", code="answer_not_found", param="answer")
        return await service.feedback.take(body, trace, key_of(request))

    @app.get("/admin/rounds", responses=ERRORS, tags=["admin"])
    async def rounds() -> dict[str, Any]:
        """The newest rounds of refitting this channel's bundle, and what the gate said of each."""
        if service.channel is None:
            return {"object": "list", "data": []}
        return {"object": "list", "data": await service.stored(latest, service.channel)}


class Queue:
    """Belongs to one event loop. What is known of a question is kept as long as the same bundles answer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._known: dict[str, Weighed | None] = {}
        self._of: tuple[str, str | None] | None = None  # the present bundle's seal, and the folder of the one before

    async def next(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Rows to label, and how many questions wait for a label.

        Raises:
            ApiError: the questions cannot be read.
        """
        async with self._lock:
            asked = await self._open()
            loaded = self._service.bundles.current
            with self._service.bundles.used(loaded):
                history = await self._service.stored(self._service.bundles.history)
                before = history.before() if history is not None else None
                if self._of != (loaded.seal, before):
                    self._of, self._known = (loaded.seal, before), {}
                fresh = [(id, record) for id, record in asked.items() if id not in self._known]
                for at in range(0, len(fresh), _PASS):
                    ids, records = zip(*fresh[at : at + _PASS], strict=True)
                    found = await loaded.aside(_weighed, records, before)
                    self._known |= dict(zip(ids, found, strict=True))
                weighed = {id: made for id in asked if (made := self._known.get(id)) is not None}
                if fresh and before:
                    await loaded.aside(_let_go)
                best = await self._service.stored(choosing.best, list(weighed.values()), limit)
            self._known = {id: self._known[id] for id in asked}
            names = list(weighed)
            predictor = loaded.predictor
            return [_row(names[n], asked[names[n]], weighed[names[n]], predictor) for n in best], len(asked)

    async def _open(self) -> dict[str, Record]:
        """Kept questions of this bundle's tasks that nobody has spoken of, by the id of their answer."""
        service = self._service
        try:
            said = await service.stored(lambda: feedback.read(feedback.folder()).said)
        except OSError as error:
            raise ApiError(503, "the feedback that is stored cannot be read", code="not_read") from error
        done = {str(each.content.get("answer")) for each in said}
        found: dict[str, Record] = {}
        cursor: str | None = ""
        while cursor is not None and len(found) < _LOOKED_AT:
            page, cursor = await service.answers.kept(_PAGE, cursor)
            for id, trace in page:
                if trace.question is not None and id not in done and trace.question.task in service.predictor.tasks:
                    found[id] = trace.question
        return found


def _weighed(predictor: Predictor, records: Sequence[Record], before: str | None) -> list[Weighed | None]:
    """Runs where the bundle's weights are.

    Args:
        before: the folder of the bundle before it.
    """
    return choosing.weigh(records, predictor, _loaded(before) if before else None)


@functools.lru_cache(1)
def _loaded(folder: str) -> Predictor | None:
    """The bundle before, where it is still there."""
    try:
        return Predictor.load(folder)
    except BundleError:
        return None


def _let_go(_: Predictor) -> None:
    _loaded.cache_clear()


def _row(answer: str, record: Record, weighed: Weighed, predictor: Predictor) -> dict[str, Any]:
    """As the page shows it; `words` is what spans count characters of."""
    field, said = feedback.FIELD_OF[kind(record.task)], weighed.answer
    row: dict[str, Any] = {
        "answer": answer, "task": record.task, "field": field, "labels": list(predictor.tasks[record.task].labels),
        "messages": [{"role": each.role, "words": written.of(each).words} for each in record.messages],
        "images": [_base64(each.read()) for each in record.images],
        "audios": [_base64(each.read()) for each in record.audios],
        "answered": said.words, "agreed": {field: _said(record, said, field)},
        "confidence": round(said.confidence, 4), "score": round(weighed.score, 4),
    }  # fmt: skip
    if kind(record.task) in ("tag", "extract"):
        row["words"] = written.of(record.messages[targets.spanned(record)]).words
    if kind(record.task) == "relate":
        content = record.messages[targets.spanned(record)].content
        row["ends"] = {each["label"]: targets.words_of(content, each) for each in record.target.spans or ()}
    if record.candidates:
        row["candidates"] = [_candidate(each) for each in record.candidates]
    return row


def _said(record: Record, said: Answer, field: str) -> Any:
    """An answer as a client would give it; spans count the characters of the client's words."""
    if field != "spans":
        return getattr(said, field)
    wording = written.of(record.messages[targets.spanned(record)])
    return [
        {"start": wording.written(each["start"]), "end": wording.written(each["end"]), "label": each["label"]}
        for each in said.spans or ()
    ]


def _candidate(each: Mapping[str, Any]) -> dict[str, Any]:
    media = {side: _base64(found["bytes"]) for side in ("image", "audio") if (found := each.get(side))}
    return {"text": str(each.get("content") or ""), **media}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def latest(channel: str) -> list[dict[str, Any]]:
    """Rounds of a channel, the newest first: each with what it learned from, the gate's checks of whole sets of
    questions, and those that failed."""
    places = sorted(storage.folder("refine", channel).glob("r*/round.json"), reverse=True)
    return [_round(channel, place) for place in places[:_ROUNDS]]


def _round(channel: str, place: Path) -> dict[str, Any]:
    told = json.loads(place.read_text())
    out: dict[str, Any] = {
        "name": f"{channel}-{place.parent.name}", "created_ms": told.get("created_ms"), "state": told["state"],
        **{key: told.get(key, 0) for key in ("said", "train", "replayed")},
        "aside": sum(told.get("aside", {}).values()), "checks": [], "failed": 0,
    }  # fmt: skip
    gate = place.with_name("gate.json")
    if gate.is_file():
        checks = json.loads(gate.read_text())["checks"]
        out["checks"] = [each for each in checks if each["passed"] is False or "," not in each["name"]]
        out["failed"] = sum(each["passed"] is False for each in checks)
    return out
