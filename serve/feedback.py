"""What users say of answers, on the disk before they hear that it was taken.

    feedback/segments/DAY.REPLICA.jsonl     one line each: verdict, right answer, and the question as a record

A line holds all that a training row needs. Lines are added at the end and flushed; what is sent twice is kept once.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmagent import feedback as segments
from mmagent import storage
from serve import logs
from serve.answers import Trace, now_ms
from serve.errors import ApiError
from serve.keys import Key
from serve.questions import ChatMessage, Written
from serve.store import Store, StoreError

_KIND = "feedback"
_PATIENCE_S = 10.0  # with object storage, which is asked before the answer
_RIGHT_ANSWERS = ("label", "labels", "text", "spans", "value")


class FeedbackSpan(BaseModel):
    model_config = ConfigDict(extra="forbid")

    start: int = Field(ge=0)
    end: int = Field(gt=0)
    label: str = Field(max_length=200)


class Feedback(Written):
    """A verdict, the right answer, a score, a comment, or a whole demonstration; one of them at least."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"answer": "ans_01JDX3YQ2M8T5W6V7R9K0N1P4S", "label": "red"}]}
    )

    answer: str = Field(max_length=64, description="the answer's id")
    verdict: Literal["right", "wrong"] | None = None
    label: str | None = Field(None, max_length=1000, description="the right one")
    labels: list[str] | None = Field(None, max_length=1000)
    text: str | None = Field(None, max_length=100_000)
    spans: list[FeedbackSpan] | None = Field(None, max_length=1000)
    value: float | None = Field(None, allow_inf_nan=False)
    score: float | None = Field(None, ge=0, le=1, description="how good the answer is")
    comment: str | None = Field(None, max_length=10_000)
    demonstration: list[ChatMessage] | None = Field(None, max_length=1000, description="how it should have gone")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set - {"answer"} or all(v is None for k, v in self if k != "answer"):
            raise ValueError(
                "nothing is said of the answer: a verdict, the right answer, a score or a comment is wanted"
            )
        if self.verdict == "right" and any(getattr(self, name) is not None for name in _RIGHT_ANSWERS):
            raise ValueError("the answer is called right and another one is given: send one of the two")
        return self

    @property
    def says(self) -> str:
        """The verdict that it comes to."""
        if self.verdict:
            return self.verdict
        return "wrong" if any(getattr(self, name) is not None for name in _RIGHT_ANSWERS) else "other"


class Taken(BaseModel):
    id: str = Field(examples=["fb_5f0c6e1d2a3b4c5d"])
    object: Literal["feedback"] = "feedback"
    answer: str
    created: int = Field(description="Unix time in seconds")
    repeated: bool = Field(description="the same was sent before, and is kept once")


class FeedbackLog:
    """
    Args:
        replica: a name that no other process has at the same time.
    """

    def __init__(self, store: Store, replica: str, thread: ThreadPoolExecutor, keep_days: float) -> None:
        self._store, self._replica, self._thread = store, replica, thread
        self._keep_s = keep_days * 86_400

    async def take(self, feedback: Feedback, trace: Trace, key: Key) -> Taken:
        """Returns when it is on the disk.

        Raises:
            ApiError: it cannot be written.
        """
        content = feedback.model_dump(mode="json", exclude_none=True)
        id = segments.id_of(key.id, content)
        created_ms = now_ms()
        line = {
            "id": id,
            "created_ms": created_ms,
            "key": key.id,
            "says": feedback.says,
            "feedback": content,
            "answered": trace.told,
            "record": None if trace.question is None else segments.plain(trace.question.to_row()),
        }
        try:
            repeated = await asyncio.get_running_loop().run_in_executor(self._thread, self._write, id, key.id, line)
        except (OSError, StoreError, storage.StorageError) as error:
            message = "feedback cannot be stored now: the disk of the service refuses it; send it again later"
            raise ApiError(503, message, code="not_stored", headers={"Retry-After": "30"}) from error
        return Taken(id=id, answer=feedback.answer, created=created_ms // 1000, repeated=repeated)

    async def forget(self, answer: str, key: Key) -> None:
        """Takes back what was said of an answer: whoever reads the segments leaves it out."""
        line = {"says": segments.DELETED, "answer": answer, "created_ms": now_ms(), "key": key.id}
        data = json.dumps(line).encode() + b"\n"
        await asyncio.get_running_loop().run_in_executor(self._thread, logs.append, segment(self._replica), data)

    def _write(self, id: str, key: str, line: dict[str, Any]) -> bool:
        """Whether it was there already. The segment comes first: a crash between the two leaves a line twice, of one
        id, which whoever reads segments takes once."""
        if self._store.read(_KIND, id) is not None:
            return True
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        file = segment(self._replica)
        logs.append(file, data)
        storage.send(file, _PATIENCE_S)
        self._store.put(_KIND, id, key, line["feedback"]["answer"].encode(), self._keep_s)
        return False


def segment(replica: str) -> Path:
    """Where a replica writes today; for object storage, which is sent whole files, in this minute."""
    period = time.strftime("%Y-%m-%dT%H%M" if storage.is_remote() else "%Y-%m-%d", time.gmtime())
    return segments.folder() / f"{period}.{replica}.jsonl"


def replica_name() -> str:
    return f"{os.uname().nodename}-{os.getpid()}"
