"""What is asked over HTTP: OpenAI's chat completion, and the typed prediction. `serve.replies` is what comes back.

Names in angle brackets are branches of unions; `serve.errors.place` leaves them out of the place it reports.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


class _Asked(BaseModel):
    """Clients send fields that this service has no use for, and newer ones every year: they are ignored."""

    model_config = ConfigDict(extra="ignore")


class TextPart(_Asked):
    type: Literal["text"]
    text: str


class ImageUrl(_Asked):
    url: str = Field(description="a data URI; http(s) only of hosts that the service was started with")


class ImagePart(_Asked):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(_Asked):
    data: str = Field(description="base64")
    format: Literal["wav", "flac", "mp3", "ogg"]


class AudioPart(_Asked):
    type: Literal["input_audio"]
    input_audio: InputAudio


class OtherPart(_Asked):
    """A part of another type: refused with its name, `video_url` as not supported yet."""

    type: str


_PARTS = {"text": "<text>", "image_url": "<image>", "input_audio": "<audio>"}


def _part_branch(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return _PARTS.get(kind, "<other>") if isinstance(kind, str) else "<other>"


def _content_branch(content: Any) -> str:
    return "<parts>" if isinstance(content, list) else "<text>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image>")]
    | Annotated[AudioPart, Tag("<audio>")]
    | Annotated[OtherPart, Tag("<other>")],
    Discriminator(_part_branch),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<parts>")], Discriminator(_content_branch)
]


class Function(_Asked):
    name: str
    arguments: str = ""


class ToolCall(_Asked):
    id: str
    function: Function


class ChatMessage(_Asked):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class StreamOptions(_Asked):
    include_usage: bool | None = None


class Candidate(BaseModel):
    """What `match` may choose: a text, a picture, a sound, or several of them together."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    image: str | None = Field(None, description="base64 or a data URI")
    audio: str | None = Field(None, description="base64 or a data URI; wav, flac, mp3 or ogg")


class End(BaseModel):
    """One of the two spans that `relate` asks about: characters from start up to, not with, end."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(ge=0)
    end: int = Field(gt=0)
    label: Literal["head", "tail"]


def _candidate_branch(candidate: Any) -> str:
    return "<text>" if isinstance(candidate, str) else "<object>"


class _OfTasks(BaseModel):
    """What tasks want to know besides the conversation. Spans, in a question and in an answer, count characters of the
    context where there is one, else of the last user message: its texts with a space between them, as they were sent.
    """

    task: str | None = Field(None, description="one of the bundle's tasks (see /v1/models); none: its default")
    context: str | None = Field(None, description="a text that the question is about, as `extract` reads it")
    candidates: (
        list[
            Annotated[
                Annotated[str, Tag("<text>")] | Annotated[Candidate, Tag("<object>")], Discriminator(_candidate_branch)
            ]
        ]
        | None
    ) = Field(None, description="what `match` chooses from", min_length=1)
    spans: list[End] | None = Field(None, description="the head and the tail that `relate` asks about")


class ChatRequest(_OfTasks, _Asked):
    """OpenAI's request. What would change the answer and cannot be done is refused; the rest (temperature, seed,
    max_tokens, stop, user ...) shapes generated text, and is ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "demo",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": _PIXEL}},
                                {"type": "text", "text": "what color is the shape?"},
                            ],
                        }
                    ],
                }
            ]
        }
    )

    model: str | None = Field(None, description="the bundle's name or the channel's; none: what is served")
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    logprobs: bool | None = None

    @property
    def refused(self) -> tuple[str, str] | None:
        """The first parameter that asks for what this service does not do, and why."""
        if self.n not in (None, 1):
            return "n", f"n is {self.n}: one answer is given, so n may only be 1"
        if self.tools and self.tool_choice != "none":
            return "tools", "tools are not supported yet: leave them out, or send tool_choice none"
        if self.functions:
            return "functions", "functions are not supported: leave them out"
        if self.response_format and self.response_format.get("type") != "text":
            return "response_format", "response_format may only be text: /v1/predict answers in JSON"
        if self.modalities and set(self.modalities) != {"text"}:
            return "modalities", 'modalities may only be ["text"]: the answer is text'
        if self.logprobs:
            return "logprobs", "logprobs are not given: mmagent.probabilities of the answer holds every label's"
        return None


class PredictRequest(_OfTasks):
    """The long form has `messages`; the short one has one text, picture or sound, or several of them together."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"text": "what color is the shape?", "image": _PIXEL},
                {"messages": [{"role": "user", "content": "what color is the shape?"}]},
                {"task": "extract", "context": "The shape is a red circle.", "text": "what color is the shape?"},
                {"task": "match", "text": "what color is the shape?", "candidates": ["red", "round"]},
                {
                    "task": "relate",
                    "text": "Ann works for Acme.",
                    "spans": [{"start": 0, "end": 3, "label": "head"}, {"start": 14, "end": 18, "label": "tail"}],
                },
            ]
        },
    )

    model: str | None = Field(None, description="the bundle's name or the channel's; none: what is served")
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    text: str | None = None
    image: str | None = Field(None, description="base64 or a data URI")
    audio: str | None = Field(None, description="base64 or a data URI; wav, flac, mp3 or ogg")

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, value: Any) -> Any:
        unknown = sorted(set(value) - set(cls.model_fields)) if isinstance(value, dict) else []
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.model_fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"the field {unknown[0]!r:.60} is unknown; did you mean {near!r}?")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        short = any(value is not None for value in (self.text, self.image, self.audio))
        if short == (self.messages is not None):
            raise ValueError("either messages is wanted, or text, image and audio (one or more of them)")
        return self
