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


class Written(BaseModel):
    """A whole request: its words are text that can be stored and sent on."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if _halves(value):
            raise ValueError("a text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
        return value


def _halves(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(_halves(item) for item in (*value, *value.values()))
    return isinstance(value, list) and any(map(_halves, value))


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


class FunctionTool(_Asked):
    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$")
    description: str = Field("", max_length=10_000)
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class ClientTool(_Asked):
    """A tool of the client's: the service says how to call it, the client calls it."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(_Asked):
    name: str


class NamedTool(_Asked):
    type: Literal["function"]
    function: NamedFunction


class SchemaFormat(_Asked):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Asked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is wanted with the type json_schema, and only there")
        return self


class AudioOut(_Asked):
    """How a spoken answer sounds."""

    voice: str | None = Field(None, max_length=60)
    format: Literal["wav", "flac", "mp3", "opus", "pcm16"] = "wav"


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


class ChatRequest(_OfTasks, _Asked, Written):
    """OpenAI's request. What shapes a written text (temperature, top_p, seed, max_tokens) is for tasks that write; what
    would change the answer and cannot be done is refused."""

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
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    conversation: str | None = Field(None, description="a name of your own: the service keeps what was said before")
    explain: bool | None = Field(
        None, description="with the evidence of the answer: words, picture regions, time spans"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128, description="answers: the likeliest ones, or texts drawn anew")
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="of a text that is written")
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2, description="of a text that is written; none: the likeliest")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    tools: list[ClientTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    functions: list[dict[str, Any]] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOut | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.functions:
            raise ValueError("functions are not supported any more: send tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs wants logprobs: true")
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError(f"stop has {len(self.stop)} texts; 4 at most")
        if isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required":
            if not self.tools:
                raise ValueError("tool_choice wants a tool, but there are no tools")
            named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
            if named and named not in [tool.function.name for tool in self.tools]:
                raise ValueError(f"tool_choice names {named!r}, which is none of the tools")
        return self

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    @property
    def offered(self) -> list[ClientTool]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def shaped(self) -> bool:
        """Whether the answer is to be JSON."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def speaks(self) -> bool:
        """Whether the answer is wanted as sound too."""
        return "audio" in (self.modalities or ())


class PredictRequest(_OfTasks, Written):
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
    explain: bool | None = Field(
        None, description="with the evidence of the answer: words, picture regions, time spans"
    )
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=1000)
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


class ManyRequest(BaseModel):
    """Several predictions at once; a bad one costs the others nothing."""

    model_config = ConfigDict(extra="forbid")

    inputs: list[Any] = Field(min_length=1, max_length=1000, description="each as a single prediction is asked for")


def _many_branch(body: Any) -> str:
    return "<many>" if isinstance(body, ManyRequest) or (isinstance(body, dict) and "inputs" in body) else "<one>"


OneOrMany = Annotated[
    Annotated[PredictRequest, Tag("<one>")] | Annotated[ManyRequest, Tag("<many>")], Discriminator(_many_branch)
]


class EmbeddingsRequest(_Asked, Written):
    """OpenAI's request; an input may also be an object with a text, a picture, a sound, or several of them."""

    model: str | None = None
    input: str | list[Any] = Field(description="a text, or several")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class SpeechRequest(_Asked, Written):
    """OpenAI's request for spoken text."""

    input: str = Field(min_length=1, max_length=4096)
    model: str | None = None
    voice: str | None = Field(
        None, max_length=60, description="of the synthesiser: en-us+f3; OpenAI's names mean English"
    )
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4)
