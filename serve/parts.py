"""From the parts of a request to a record. Parts are authoritative: words that look like a placeholder stay words."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmagent.answer import Answer
from mmagent.attachments import decode_base64
from mmagent.media import Limits
from mmagent.record import Media, Message, Record, RecordError, Target
from mmagent.targets import kind, spanned
from mmagent.tasks import Decision
from mmagent.truth import candidates_of
from mmagent.written import Wording
from serve import fetch
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.questions import (
    AudioPart,
    Candidate,
    ChatMessage,
    ChatRequest,
    End,
    ImagePart,
    ImageUrl,
    OtherPart,
    Part,
    PredictRequest,
    TextPart,
)

_ROLES = {"developer": "system"}


@dataclass
class Draft:
    """A record being made. Reading an allowed address takes time, so `build` belongs in a thread.

    places: where each medium stood in the request, for example ``images[0]`` -> ``messages[0].content[1]``.
    """

    config: ServeConfig
    limits: Limits
    images: list[Media] = field(default_factory=list)
    audios: list[Media] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    _focus: Wording = field(default_factory=Wording, init=False)  # of the message that spans count in

    def build(self, question: ChatRequest | PredictRequest, task: str, id: str) -> Record:
        """The record of a conversation, or of a text, a picture and a sound, for one of the bundle's tasks.

        Raises:
            ApiError: the part that cannot be used, and why.
        """
        self._check(question, task)
        made, context = self._short(question), question.context
        if question.messages is not None:
            ahead = _context_parts(question.messages) if kind(task) == "extract" and context is None else {}
            context = "\n".join(ahead.values()) if ahead else context
            made = [self._message(message, index, ahead) for index, message in enumerate(question.messages)]
        if not any(message.role == "user" for message, _ in made):
            raise ApiError(422, "messages holds no message of the user", code="invalid_value", param="messages")
        if context is not None:
            wording = Wording()
            wording.add_words(context)
            last = max(index for index, (message, _) in enumerate(made) if message.role == "user")
            made.insert(last, (Message("context", wording.content), wording))
        messages = tuple(message for message, _ in made)
        record = Record(id, messages, tuple(self.images), tuple(self.audios), task=task, origin="http")
        if record.modalities == "empty":
            raise ApiError(422, "there is no text, picture or sound in the request", code="invalid_value")
        self._focus = made[spanned(record)][1]
        spans = tuple(self._end(span, f"spans[{index}]") for index, span in enumerate(question.spans or ()))
        return replace(record, target=Target(spans=spans or None), candidates=self._candidates(question))

    def as_written(self, answer: Answer) -> Answer:
        """An answer whose spans count the characters that the client wrote."""
        if answer.spans is None:
            return answer
        wording, spans = self._focus, []
        for span in answer.spans:
            start, end = wording.written(span["start"]), wording.written(span["end"])
            spans.append({**span, "start": start, "end": end, "text": wording.words[start:end]})
        text = None if answer.text is None else "".join(span["text"] for span in spans)
        said = Decision(text=text, spans=tuple(spans))
        return replace(answer, spans=said.spans, text=text, words=said.words)

    def _check(self, question: ChatRequest | PredictRequest, task: str) -> None:
        """What costs nothing to see: fields of another task, too many candidates, too many media."""
        for name, given, wanted in (("candidates", question.candidates, "match"), ("spans", question.spans, "relate")):
            if given is not None and kind(task) != wanted:
                message = f"{name} are for tasks of the kind {wanted}, but {task!r} is asked: leave them out"
                raise ApiError(422, message, code="invalid_value", param=name)
        candidates = question.candidates or []
        if len(candidates) > self.config.max_views:
            raise ApiError(
                413, f"{len(candidates)} candidates; the limit max_views is {self.config.max_views}",
                code="too_many_candidates", param="candidates",
            )  # fmt: skip
        parts = [part for said in question.messages or () if isinstance(said.content, list) for part in said.content]
        media = sum(isinstance(part, (ImagePart, AudioPart)) for part in parts)
        own = [medium for each in candidates if isinstance(each, Candidate) for medium in (each.image, each.audio)]
        media += len(own) - own.count(None)
        if media > self.config.max_media:
            raise ApiError(
                413, f"{media} pictures and sounds; the limit max_media is {self.config.max_media}",
                code="too_many_media", param="messages" if parts else "candidates",
            )  # fmt: skip

    def _short(self, question: ChatRequest | PredictRequest) -> list[tuple[Message, Wording]]:
        """The one message of the short form; none in the long form."""
        if isinstance(question, ChatRequest) or question.messages is not None:
            return []
        wording = Wording()
        if question.image is not None:
            self._add("image", self._image(question.image, "image", plain=True), "image", wording)
        if question.audio is not None:
            self._add("audio", self._bytes(question.audio, "audio"), "audio", wording)
        wording.add_words(question.text or "")
        return [(Message("user", wording.content), wording)]

    def _message(self, message: ChatMessage, index: int, ahead: Container[tuple[int, int]]) -> tuple[Message, Wording]:
        """A message without the parts that are `ahead` of the question: (message, part)."""
        wording = Wording()
        for at, part in enumerate(_parts(message)):
            if (index, at) not in ahead:
                self._part(part, f"messages[{index}].content[{at}]", wording)
        calls = tuple(
            {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
            for call in message.tool_calls or ()
        )
        return Message(_ROLES.get(message.role, message.role), wording.content, calls, message.tool_call_id), wording

    def _candidates(self, question: ChatRequest | PredictRequest) -> tuple[Mapping[str, Any], ...]:
        rows: list[dict[str, Any]] = []
        for index, each in enumerate(question.candidates or ()):
            candidate = Candidate(text=each) if isinstance(each, str) else each
            place = f"candidates[{index}]"
            image, audio = candidate.image, candidate.audio
            rows.append(
                {
                    "text": candidate.text,
                    "image": None if image is None else self._image(image, f"{place}.image", plain=True),
                    "audio": None if audio is None else self._bytes(audio, f"{place}.audio"),
                }
            )
        return candidates_of({"candidates": rows or None}, None, None)

    def _end(self, span: End, place: str) -> dict[str, Any]:
        wording = self._focus
        if not span.start < span.end <= len(wording.words):
            message = f"{place} is {span.start}..{span.end}, but the text has {len(wording.words)} characters"
            raise ApiError(422, message, code="invalid_value", param=place)
        return {"start": wording.stored(span.start), "end": wording.stored(span.end), "label": span.label}

    def _part(self, part: Part, place: str, wording: Wording) -> None:
        if isinstance(part, ImagePart):
            self._add("image", self._image(part.image_url, place), place, wording)
        elif isinstance(part, AudioPart):
            self._add("audio", self._bytes(part.input_audio.data, place), place, wording)
        elif isinstance(part, OtherPart):
            what = "not supported yet" if part.type == "video_url" else "not supported"
            raise ApiError(
                422, f"{place}: parts of type {part.type[:40]!r} are {what}; text, image_url and input_audio are",
                code="not_supported", param=place,
            )  # fmt: skip
        else:
            wording.add_words(part.text)

    def _add(self, kind: str, data: bytes, place: str, wording: Wording) -> None:
        media = self.images if kind == "image" else self.audios
        self.places[f"{kind}s[{len(media)}]"] = place
        media.append(Media(data))
        wording.add_mark(kind)

    def _image(self, image: ImageUrl | str, place: str, *, plain: bool = False) -> bytes:
        url = image if isinstance(image, str) else image.url
        if url[:5].lower() == "data:" or (plain and "://" not in url[:64]):
            return self._bytes(url, place)
        if ":" not in url[:64]:
            message = f"{place}: image_url.url is no address: a data URI (data:image/png;base64,...) is wanted"
            raise ApiError(422, message, code="invalid_media", param=place)
        config = self.config
        try:
            return fetch.fetch(
                url, config.allow_media_hosts, timeout_s=config.fetch_timeout_s, max_bytes=self.limits.max_media_bytes
            )
        except fetch.FetchError as error:
            status, code = (413, "media_too_large") if error.too_large else (422, "media_not_fetched")
            code = "media_host_not_allowed" if error.refused else code
            raise ApiError(status, f"{place}: {error}", code=code, param=place) from error

    def _bytes(self, text: str, place: str) -> bytes:
        """The bytes of base64 or of a data URI; its length is judged before it is decoded."""
        if text[:5].lower() == "data:":
            head, comma, text = text.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                message = f"{place}: the data URI is not in base64: data:TYPE;base64,... is wanted"
                raise ApiError(422, message, code="invalid_base64", param=place)
        limit = self.limits.max_media_bytes
        if len(text) // 4 * 3 - 2 > limit:
            message = f"{place}: about {len(text) // 4 * 3} bytes; the limit max_media_bytes is {limit}"
            raise ApiError(413, message, code="media_too_large", param=place)
        try:
            data = decode_base64(text, place)
        except RecordError as error:
            raise ApiError(422, str(error), code="invalid_base64", param=place) from error
        if not data:
            raise ApiError(422, f"{place} is empty", code="invalid_media", param=place)
        return data


def _parts(message: ChatMessage) -> Sequence[Part]:
    content = message.content
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content or ()


def _context_parts(messages: Sequence[ChatMessage]) -> dict[tuple[int, int], str]:
    """The user's texts ahead of the last one, by message and part."""
    found = {
        (index, at): part.text
        for index, message in enumerate(messages)
        if message.role == "user"
        for at, part in enumerate(_parts(message))
        if isinstance(part, TextPart) and part.text
    }
    return dict(list(found.items())[:-1])
