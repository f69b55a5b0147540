"""From the parts of a request to a record. Parts are authoritative: words that look like a placeholder stay words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmagent.attachments import decode_base64
from mmagent.media import Limits
from mmagent.record import Media, Message, Record, RecordError, escape
from serve import fetch
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.messages import AudioPart, ChatMessage, ImagePart, ImageUrl, InputAudio, OtherPart, Part, PredictRequest

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

    def build(self, messages: Sequence[ChatMessage], id: str) -> Record:
        """The record of a conversation.

        Raises:
            ApiError: the part that cannot be used, and why.
        """
        self._count(messages)
        made = tuple(self._message(message, f"messages[{index}]") for index, message in enumerate(messages))
        return self._record(made, id)

    def build_short(self, request: PredictRequest, id: str) -> Record:
        """The record of a text, a picture and a sound.

        Raises:
            ApiError: see `build`.
        """
        words = escape(request.text or "")
        if request.image is not None:
            self._add("image", self._image(request.image, "image", plain=True), "image")
        if request.audio is not None:
            self._add("audio", self._bytes(request.audio, "audio"), "audio")
        marks = "<image>" * len(self.images) + "<audio>" * len(self.audios)
        return self._record((Message("user", f"{marks} {words}".strip()),), id)

    def _record(self, messages: tuple[Message, ...], id: str) -> Record:
        if not any(message.role == "user" for message in messages):
            raise ApiError(422, "messages holds no message of the user", code="invalid_value", param="messages")
        record = Record(id, messages, tuple(self.images), tuple(self.audios), origin="http")
        if record.modalities == "empty":
            raise ApiError(422, "there is no text, picture or sound in the request", code="invalid_value")
        return record

    def _count(self, messages: Sequence[ChatMessage]) -> None:
        parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
        media = sum(isinstance(part, (ImagePart, AudioPart)) for part in parts)
        if media > self.config.max_media:
            raise ApiError(
                413, f"{media} pictures and sounds; the limit max_media is {self.config.max_media}",
                code="too_many_media", param="messages",
            )  # fmt: skip

    def _message(self, message: ChatMessage, place: str) -> Message:
        content = message.content
        if isinstance(content, str):
            text = escape(content)
        else:
            # A space between parts: a backslash at the end of a text must not escape the placeholder after it.
            text = " ".join(self._part(part, f"{place}.content[{index}]") for index, part in enumerate(content or ()))
        calls = tuple(
            {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
            for call in message.tool_calls or ()
        )
        return Message(_ROLES.get(message.role, message.role), text, calls, message.tool_call_id)

    def _part(self, part: Part, place: str) -> str:
        if isinstance(part, ImagePart):
            return self._add("image", self._image(part.image_url, place), place)
        if isinstance(part, AudioPart):
            return self._add("audio", self._sound(part.input_audio, place), place)
        if isinstance(part, OtherPart):
            what = "not supported yet" if part.type == "video_url" else "not supported"
            raise ApiError(
                422, f"{place}: parts of type {part.type[:40]!r} are {what}; text, image_url and input_audio are",
                code="not_supported", param=place,
            )  # fmt: skip
        return escape(part.text)

    def _add(self, kind: str, data: bytes, place: str) -> str:
        media = self.images if kind == "image" else self.audios
        self.places[f"{kind}s[{len(media)}]"] = place
        media.append(Media(data))
        return f"<{kind}>"

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

    def _sound(self, audio: InputAudio, place: str) -> bytes:
        return self._bytes(audio.data, place)

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
