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


class TokenEvidence(BaseModel):
    """How much a word speaks for the answer; the largest of a request's evidence is 1."""

    text: str
    start: int = Field(description="character of the user's words")
    end: int
    weight: float


class ImageEvidence(BaseModel):
    grid: list[list[float]] = Field(description="weights of equal regions, by row from the top")
    picture: str = Field(description="the picture with the evidence drawn on it, a data URI")


class AudioEvidence(BaseModel):
    spans: list[list[float]] = Field(description="[from second, to second, weight]")


class Evidence(BaseModel):
    """What of the request speaks for the answer (see `method`)."""

    method: str = Field(examples=["integrated_gradients"])
    target: str = Field(description="what it is evidence for", examples=["red"])
    tokens: list[TokenEvidence] = []
    images: list[ImageEvidence] = []
    audios: list[AudioEvidence] = []


class Source(BaseModel):
    """A passage of the knowledge that is quoted."""

    source: str
    title: str = ""
    text: str
    score: float


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
    novelty: float | None = Field(
        None,
        exclude_if=_is_none,
        description="share of validation data less unusual than this; near 1: like none of it",
    )
    outcome: Literal["answer", "reply", "tool", "call", "retrieved", "ask", "handover"] = Field(
        "answer", description="what the agent made of it: the model's answer, a rule's reply, a tool's result, ..."
    )
    conversation: str | None = Field(None, exclude_if=_is_none)
    sources: list[Source] | None = Field(None, exclude_if=_is_none, description="what the knowledge says")
    evidence: Evidence | None = Field(None, exclude_if=_is_none)
    timings_ms: dict[str, float] = Field(
        description="decode, queue (waiting for the batch), forward, total", examples=[{"forward": 9.1, "total": 12.5}]
    )


class Prediction(BaseModel):
    id: str = Field(examples=["ans_01JDX3YQ2M8T5W6V7R9K0N1P4S"])
    object: Literal["prediction"] = "prediction"
    created: int = Field(description="Unix time in seconds")
    model: str
    mmagent: Extension


class FailedPrediction(BaseModel):
    object: Literal["error"] = "error"
    error: dict[str, Any]


class Predictions(BaseModel):
    object: Literal["list"] = "list"
    data: list[Prediction | FailedPrediction]


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON")


class Called(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Sound(BaseModel):
    id: str
    data: str = Field(description="base64")
    expires_at: int
    transcript: str


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[Called] | None = Field(None, exclude_if=_is_none)
    audio: Sound | None = Field(None, exclude_if=_is_none)


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Of a written text each token's; of a closed answer that of the whole, as one token."""

    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: Said
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] = "stop"


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


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="of length 1; base64: little-endian float32")


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: dict[str, int]


class ConversationMessages(BaseModel):
    object: Literal["conversation"] = "conversation"
    id: str
    messages: list[dict[str, Any]]


class Deleted(BaseModel):
    id: str
    deleted: Literal[True] = True


class AnswerTrace(BaseModel):
    """How an answer came about."""

    model_config = {"extra": "allow"}

    id: str
    object: Literal["answer"] = "answer"
    created_ms: int
    bundle: str
    channel: str | None
    conversation: str | None
    understood: dict[str, Any] = Field(description="task, answer, confidence, threshold, novelty")
    outcome: str
    steps: list[dict[str, Any]] = Field(description="decode, model, tool, retrieve, ... each with its time")
    timings_ms: dict[str, float]
    question_kept: bool
