"""What a native multimodal model is given: its processor makes token ids, and pixels or sound features, of a
conversation by the chat template that came with it, or of the pictures and sounds that come before other words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmagent import text
from mmagent.media import Limits, decode_audio, decode_image
from mmagent.pretrained import BackboneError
from mmagent.processor import kinds
from mmagent.reading import MADE
from mmagent.record import Record, segments

MEDIA = "media/"  # in a batch, before the names of what the model is given besides ids
BY_TOKEN = "token_type_ids"  # how the names of what a processor says of each token end; 0 is for words
_SIDE = 32  # pixels of a stand-in's
_TRIES = 4  # to shorten a conversation: a text cut in two may have other tokens
_SIGNS = {"image": "\ue000", "audio": "\ue001"}  # in a text until it is rendered; taken out of users' words
_ROLES = {"context": "system"}  # templates do not know the text that a question is about
_WORD = "\ue002"  # a word that no template writes
_WORDS = ("a", "a " * 8)  # of two lengths: what a processor says of each token grows with them

Row = dict[str, Tensor]  # what a processor makes of one text


class Conversations:
    """Makes a native model's tensors of records: what its processor does, row by row.

    Args:
        processor: of the checkpoint.
        max_tokens: of a conversation's words; a longer one loses the oldest, and never a picture or sound.

    Raises:
        ValueError: the processor refuses a picture or a sound.
        BackboneError: it makes what nothing here knows to put in a batch.
    """

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self.processor, self.max_tokens = processor, max_tokens
        self.kinds = kinds(processor)
        extractor = getattr(processor, "feature_extractor", None)
        self.rate_hz = int(extractor.sampling_rate) if extractor is not None else 0
        self._tokens = {kind: str(getattr(processor, f"{kind}_token", "") or "") for kind in _SIGNS}
        own = {*self._tokens.values(), *processor.tokenizer.all_special_tokens} - {""}
        self._reserved = sorted(own, key=len, reverse=True)
        self._opening, self._closing = text.frame(processor.tokenizer)
        self._place_signs()
        self._by_row = self._rows_of_their_own()
        self.at = self._begins()  # of a view's ids: where pictures and sounds come

    def pixels(self, data: bytes, limits: Limits) -> np.ndarray:
        """(height, width, 3) uint8."""
        return np.asarray(decode_image(data, limits).convert("RGB"), dtype=np.uint8)

    def frames(self, data: bytes, limits: Limits) -> np.ndarray:
        """(samples, 1) float32 at the processor's rate."""
        return decode_audio(data, self.rate_hz, limits)[:, None]

    def stand_in(self, kind: str) -> np.ndarray:
        """A tiny picture or a short silence, for a batch without any: so that every batch runs every tower."""
        if kind == "image":
            return np.full((_SIDE, _SIDE, 3), 127, np.uint8)
        return np.zeros((self.rate_hz // 2, 1), np.float32)

    def row(
        self, record: Record, images: Sequence[np.ndarray], audios: Sequence[np.ndarray], places: int | None = None
    ) -> tuple[Row, int]:
        """What the processor makes of a conversation (tensors of one row), and how many tokens were left out.

        Args:
            places: of the model, for the whole of it; pictures and sounds may take more than there are.
        """
        messages = self._messages(record, {"image": bool(images), "audio": bool(audios)})
        cut = 0
        found = self._processed(self._rendered(messages), images, audios)
        for _ in range(_TRIES):
            lost = self._shorten(messages, self._spare(messages, found, places))
            if not lost:
                break
            cut += lost
            found = self._processed(self._rendered(messages), images, audios)
        return found, cut

    def front(self, images: Sequence[np.ndarray], audios: Sequence[np.ndarray]) -> Row:
        """What the processor makes of pictures and sounds alone, with the template's signs around them and without
        what opens and closes a text; empty without any."""
        if not images and not audios:
            return {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}
        found = self._fronted(_SIGNS["image"] * len(images) + _SIGNS["audio"] * len(audios), images, audios)
        ids = found.pop("input_ids")
        found.pop("attention_mask", None)
        start, end = self._inner(ids[0].tolist())
        speaks = {key: value[:, start:end] for key, value in found.items() if key.endswith(BY_TOKEN)}
        return {**found, **speaks, "input_ids": ids[:, start:end]}

    def filled(self, ids: np.ndarray, front: Row) -> Row:
        """The row of a view's ids with what `front` made at the places that wait for it (`MADE`)."""
        words = torch.from_numpy(ids)
        here = words == MADE
        row = {**front, "input_ids": words.masked_scatter(here, front["input_ids"][0])[None]}
        for key, value in front.items():
            if key.endswith(BY_TOKEN):
                row[key] = torch.zeros_like(words).masked_scatter(here, value[0].to(words.dtype))[None]
        return row

    def collate(self, rows: Sequence[Mapping[str, Tensor]], pad: int) -> dict[str, Tensor]:
        """ids, mask (rows, tokens), ones first, and ``media/NAME``: everything of all rows, padded to one size."""
        ids = [row["input_ids"][0] for row in rows]
        out = {
            "ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
            "mask": nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        }
        for key in sorted({key for row in rows for key in row} - {"input_ids", "attention_mask"}):
            found = [row.get(key) for row in rows]
            if key.endswith(BY_TOKEN):
                each = [torch.zeros_like(i) if value is None else value[0] for value, i in zip(found, ids, strict=True)]
                out[MEDIA + key] = nn.utils.rnn.pad_sequence(each, batch_first=True)
                continue
            some = next(value for value in found if value is not None)
            if key in self._by_row:
                found = [torch.zeros_like(some) if value is None else value for value in found]
            out[MEDIA + key] = _stacked([value for value in found if value is not None])
        return out

    def _messages(self, record: Record, there: Mapping[str, bool]) -> list[dict[str, str]]:
        messages: list[dict[str, str]] = []
        for message in record.messages:
            role, content = _ROLES.get(message.role, message.role), self._marked(message.content, there)
            if messages and messages[-1]["role"] == role:  # many templates want roles in turn
                messages[-1]["content"] += f"\n{content}"
            else:
                messages.append({"role": role, "content": content})
        return messages

    def _marked(self, content: str, there: Mapping[str, bool]) -> str:
        """Words with a sign for each picture and sound; what the tokenizer would read as its own sign is broken up."""
        out = ""
        for kind, words in segments(content):
            if kind != "text":
                out += _SIGNS[kind] if there[kind] else ""
                continue
            for sign in _SIGNS.values():
                words = words.replace(sign, "")
            for token in self._reserved:
                if len(token) > 1:
                    words = words.replace(token, f"{token[0]} {token[1:]}")
            out += words
        return out

    def _processed(self, page: str, images: Sequence[np.ndarray], audios: Sequence[np.ndarray]) -> Row:
        given: dict[str, Any] = {"text": [page], "return_tensors": "pt"}
        if (first := self.processor.tokenizer.bos_token) and page.startswith(first):
            given["add_special_tokens"] = False  # the template said it already
        if images:
            given["images"] = [Image.fromarray(image) for image in images]
        if audios:
            given["audio"] = [audio[:, 0].astype(np.float32) for audio in audios]
            given["sampling_rate"] = self.rate_hz
        with torch.device("cpu"):  # a caller may build its model on the meta device
            return dict(self.processor(**given))

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """By the processor's chat template; without one the words, with its own tokens for pictures and sounds."""
        if self.processor.chat_template:
            parts = [{"role": each["role"], "content": _parts(each["content"])} for each in messages]
            return str(self.processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=True))
        words = "\n".join(each["content"] for each in messages) + "\n"
        for kind, sign in _SIGNS.items():
            words = words.replace(sign, self._tokens[kind])
        return words

    def _fronted(self, signs: str, images: Sequence[np.ndarray], audios: Sequence[np.ndarray]) -> Row:
        """Of what the template writes more where pictures and sounds (their signs) come before a word."""
        with_them, without = (self._rendered([{"role": "user", "content": words}]) for words in (signs + _WORD, _WORD))
        start = _alike(with_them, without)
        end = _alike(with_them[start:][::-1], without[start:][::-1])
        return self._processed(with_them[start : len(with_them) - end], images, audios)

    def _inner(self, ids: Sequence[int]) -> tuple[int, int]:
        """Where what opens a text ends, and what closes it begins."""
        start, end = self._opens(ids), len(ids)
        while end > start and ids[end - 1] in (*self._opening, *self._closing):
            end -= 1
        return start, end

    def _opens(self, ids: Sequence[int]) -> int:
        count = len(self._opening)
        return count if list(ids[:count]) == self._opening else 0

    def _spare(self, messages: Sequence[Mapping[str, str]], found: Row, places: int | None) -> int:
        """How many tokens are too many."""
        total = found["input_ids"].shape[1]
        over = 0 if places is None else total - places
        if total > self.max_tokens:
            over = max(over, sum(len(self._offsets(_clean(each["content"]))) for each in messages) - self.max_tokens)
        return over

    def _shorten(self, messages: Sequence[dict[str, str]], spare: int) -> int:
        """Takes that many of the oldest tokens out of messages, in place, and says how many it found: the last one of
        a message stays, for templates want some."""
        lost = 0
        for message in messages:
            if lost >= spare:
                break
            message["content"], gone = self._shortened(message["content"], spare - lost)
            lost += gone
        return lost

    def _shortened(self, content: str, tokens: int) -> tuple[str, int]:
        """Words without so many tokens at their beginning, pictures and sounds kept; and how many that were."""
        signs = [(place, letter) for place, letter in enumerate(content) if letter in _SIGNS.values()]
        offsets = self._offsets(_clean(content))
        lost = min(tokens, len(offsets) - 1)
        if lost <= 0:
            return content, 0
        start = offsets[lost][0]
        gone = sum(place - count < start for count, (place, _) in enumerate(signs))
        return "".join(letter for _, letter in signs[:gone]) + content[start + gone :], lost

    def _offsets(self, words: str) -> list[tuple[int, int]]:
        tokenizer = self.processor.tokenizer
        found = tokenizer(words, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["offset_mapping"])

    def _alone(self, kind: str, words: str, count: int = 1) -> Row:
        """Of some stand-ins of a kind, and words behind them."""
        some = [self.stand_in(kind)] * count
        page = self._rendered([{"role": "user", "content": _SIGNS[kind] * count + words}])
        return self._processed(page, some if kind == "image" else [], some if kind == "audio" else [])

    def _place_signs(self) -> None:
        """Where a processor puts its tokens for pictures by itself, without any template, none are written for it.
        And looks whether what it says of each token can be told of other words too."""
        for kind in self.kinds:
            try:
                short = self._alone(kind, _WORDS[0])
            except ValueError:
                if self.processor.chat_template or not self._tokens[kind]:
                    raise
                self._tokens[kind] = ""
                short = self._alone(kind, _WORDS[0])
            long = self._alone(kind, _WORDS[1])
            for key, value in short.items():
                grows = value.ndim > 1 and value.shape[1] != long[key].shape[1]
                if grows and key not in ("input_ids", "attention_mask") and not key.endswith(BY_TOKEN):
                    raise BackboneError(
                        f"{type(self.processor).__name__} says {key} of each token, which no batch here holds: give a "
                        "checkpoint that reads pictures and sounds as tokens among the words (as Llava, Gemma 3, "
                        "Idefics 3 and Qwen-VL do)"
                    )

    def _rows_of_their_own(self) -> frozenset[str]:
        """Of what a processor makes, that which has a row for each text and not one for each picture or sound: seen of
        a text with two. Where there may be one alone, the two are the same."""
        out: set[str] = set()
        for kind in self.kinds:
            try:
                out |= {key for key, value in self._alone(kind, "", count=2).items() if value.shape[0] == 1}
            except ValueError:
                continue
        return frozenset(out)

    def _begins(self) -> int:
        """Behind what opens a text, but for processors that put pictures and sounds before it."""
        kind = self.kinds[0]
        some = [self.stand_in(kind)]
        media = (some, []) if kind == "image" else ([], some)
        return self._opens(self._fronted(_SIGNS[kind], *media)["input_ids"][0].tolist())


def _clean(content: str) -> str:
    return "".join(letter for letter in content if letter not in _SIGNS.values())


def _alike(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _parts(content: str) -> list[dict[str, str]]:
    """A message's content as templates of multimodal models want it."""
    out: list[dict[str, str]] = []
    kind_of = {sign: kind for kind, sign in _SIGNS.items()}
    for letter in content:
        if letter in kind_of:
            out.append({"type": kind_of[letter]})
        elif out and out[-1]["type"] == "text":
            out[-1]["text"] += letter
        else:
            out.append({"type": "text", "text": letter})
    return out


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Along the first axis, padded with zeros where other axes differ."""
    shape = [max(value.shape[axis] for value in values) for axis in range(1, values[0].ndim)]
    out = []
    for value in values:
        room = [size for axis in range(value.ndim - 1, 0, -1) for size in (0, shape[axis - 1] - value.shape[axis])]
        out.append(nn.functional.pad(value, room))
    return torch.cat(out)
