"""What is answered over HTTP: OpenAI's chat completion with an extension, and the typed prediction."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


def _is_none(value: Any) -> bool:
    return value is None


class Span(BaseModel):
    start: int
    end: int
    label: str
    text: str
    confidence: float | None = Field(None, exclude_if=_is_none)


class Extension(BaseModel):
    """What this service says beyond OpenAI's answer. Of label, labels, value, text and spans those are there that the
    task answers with."""

    task: str = Field(examples=["classify"])
    label: str | None = Field(
        None, exclude_if=_is_none, description="classify, relate; match: an index", examples=["red"]
    )
    labels: list[str] | None = Field(None, exclude_if=_is_none, description="multilabel")
    value: float | None = Field(None, exclude_if=_is_none, description="regress")
    text: str | None = Field(None, exclude_if=_is_none, description="extract (empty: no answer), match, generate")
    spans: list[Span] | None = Field(None, exclude_if=_is_none, description="tag, extract")
    probabilities: dict[str, float] = Field(
        description="of every label or candidate, likeliest first", examples=[{"red": 0.98}]
    )
    confidence: float = Field(description="calibrated probability that the answer is right", examples=[0.98])
    abstained: bool = Field(description="less sure than the bundle asks for: better ask a person")
    bundle: str = Field(examples=["demo"])
    cut_tokens: int | None = Field(
        None, exclude_if=_is_none, description="of the text: the oldest, which the model has no room for"
    )
    channel: str | None = Field(description="the channel this service follows", examples=["production"])
    timings_ms: dict[str, float] = Field(
        description="decode, queue (waiting for the batch), forward, total", examples=[{"forward": 9.1, "total": 12.5}]
    )


class Prediction(BaseModel):
    id: str = Field(examples=["ans_01JDX3YQ2M8T5W6V7R9K0N1P4S"])
    object: Literal["prediction"] = "prediction"
    created: int = Field(description="Unix time in seconds")
    model: str
    mmagent: Extension


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: Said
    logprobs: None = None
    finish_reason: Literal["stop"] = "stop"


class Usage(BaseModel):
    """Tokens of what was read as text, and of the answer as it is said."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    id: str = Field(examples=["ans_01JDX3YQ2M8T5W6V7R9K0N1P4S"])
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    mmagent: Extension


class Model(BaseModel):
    id: str = Field(examples=["demo"])
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mmagent"] = "mmagent"
    task: str = Field(description="what is answered where a request names no task", examples=["classify"])
    tasks: list[str] = Field(description="what `task` of a request may be", examples=[["classify"]])


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ready", "not ready"]
    reason: str | None = Field(description="why it is not ready")
    bundle: str
    channel: str | None
    task: str = Field(description="what is answered where a request names no task")
    tasks: list[str]
    modalities: list[str]
    waiting: int = Field(description="requests in this replica")
