"""What a native multimodal model is given of a record: its processor makes token ids, and pixels or sound features, of
a conversation, by the chat template that came with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmagent import pretrained, text
from mmagent.media import Limits, decode_audio, decode_image
from mmagent.pretrained import BackboneError
from mmagent.record import Record, segments

KEY = "model.backbone"
MEDIA = "media/"  # in a batch, before the names of what the model is given besides ids
BY_TOKEN = "token_type_ids"  # how the names of what a processor says of each token end
_SIDE = 32  # pixels of a stand-in's
_TRIES = 4  # to shorten a conversation: a text cut in two may have other tokens
_SIGNS = {"image": "\ue000", "audio": "\ue001"}  # in a text until it is rendered; taken out of users' words
_ROLES = {"context": "system"}  # templates do not know the text that a question is about


def load_processor(name: str) -> Any:
    """
    Raises:
        BackboneError: there is none of text with pictures or sound, or its tokenizer cannot be used.
    """
    from transformers import AutoProcessor

    place = pretrained.locate(name)
    with pretrained.refusing(name, place, KEY):
        processor = AutoProcessor.from_pretrained(place)
    if not hasattr(processor, "tokenizer") or not kinds(processor):
        raise BackboneError(
            f"model.join=native, but {name!r} has no processor of text with pictures or sound: copy "
            "processor_config.json or preprocessor_config.json there from where the model came from"
        )
    processor.tokenizer = text.settled(processor.tokenizer, name)
    return processor


def kinds(processor: Any) -> tuple[str, ...]:
    """What a processor takes besides text: ``image``, ``audio``."""
    parts = (("image", "image_processor"), ("audio", "feature_extractor"))
    return tuple(kind for kind, name in parts if getattr(processor, name, None) is not None)


class Conversations:
    """Makes a native model's tensors of records: what its processor does, row by row.

    Args:
        processor: of the checkpoint.
        max_tokens: of a row; a longer one loses the beginning of its longest message, and never a picture or sound.
    """

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self.processor, self.max_tokens = processor, max_tokens
        self.kinds = kinds(processor)
        extractor = getattr(processor, "feature_extractor", None)
        self.rate_hz = int(extractor.sampling_rate) if extractor is not None else 0
        own = {str(getattr(processor, f"{kind}_token", "") or "") for kind in _SIGNS}
        self._reserved = sorted({*processor.tokenizer.all_special_tokens, *own} - {""}, key=len, reverse=True)
        self._by_row = self._rows_of_their_own()

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
        self, record: Record, images: Sequence[np.ndarray], audios: Sequence[np.ndarray]
    ) -> tuple[dict[str, Tensor], int]:
        """What the processor makes of a conversation (tensors of one row), and how many tokens were left out."""
        there = {"image": bool(images), "audio": bool(audios)}
        messages: list[dict[str, str]] = []
        for message in record.messages:
            role, content = _ROLES.get(message.role, message.role), self._marked(message.content, there)
            if messages and messages[-1]["role"] == role:  # many templates want roles in turn
                messages[-1]["content"] += f"\n{content}"
            else:
                messages.append({"role": role, "content": content})
        cut = 0
        found = self._processed(messages, images, audios)
        for _ in range(_TRIES):
            spare = found["input_ids"].shape[1] - self.max_tokens
            if spare <= 0 or not messages:
                break
            longest = max(messages, key=lambda each: len(each["content"]))
            longest["content"], lost = self._shortened(longest["content"], spare)
            if not lost:
                break
            cut += lost
            found = self._processed(messages, images, audios)
        return found, cut

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

    def _processed(
        self, messages: Sequence[Mapping[str, str]], images: Sequence[np.ndarray], audios: Sequence[np.ndarray]
    ) -> dict[str, Tensor]:
        given: dict[str, Any] = {"text": [self._rendered(messages)], "return_tensors": "pt"}
        if images:
            given["images"] = [Image.fromarray(image) for image in images]
        if audios:
            given["audio"] = [audio[:, 0].astype(np.float32) for audio in audios]
            given["sampling_rate"] = self.rate_hz
        with torch.device("cpu"):  # a caller may build its model on the meta device
            return dict(self.processor(**given))

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """By the processor's chat template; without one the words, with its own tokens for pictures and sounds."""
        processor = self.processor
        if processor.chat_template:
            parts = [{"role": each["role"], "content": _parts(each["content"])} for each in messages]
            return str(processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=True))
        words = "\n".join(each["content"] for each in messages) + "\n"
        for kind, sign in _SIGNS.items():
            words = words.replace(sign, str(getattr(processor, f"{kind}_token", "") or ""))
        return words

    def _shortened(self, content: str, tokens: int) -> tuple[str, int]:
        """Words without so many tokens at their beginning, pictures and sounds kept; and how many that were."""
        signs = [(place, letter) for place, letter in enumerate(content) if letter in _SIGNS.values()]
        clean = "".join(letter for letter in content if letter not in _SIGNS.values())
        found = self.processor.tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)
        lost = min(tokens, len(found["input_ids"]) - 1)
        if lost <= 0:
            return content, 0
        start = found["offset_mapping"][lost][0]
        gone = sum(place - count < start for count, (place, _) in enumerate(signs))
        return "".join(letter for _, letter in signs[:gone]) + content[start + gone :], lost

    def _rows_of_their_own(self) -> frozenset[str]:
        """Of what a processor makes, that which has a row for each text and not one for each picture or sound: seen of
        a text with two."""
        out: set[str] = set()
        for kind in self.kinds:
            two = [self.stand_in(kind)] * 2
            found = self._processed(
                [{"role": "user", "content": _SIGNS[kind] * 2}],
                two if kind == "image" else [],
                two if kind == "audio" else [],
            )
            out |= {key for key, value in found.items() if value.shape[0] == 1}
        return frozenset(out)


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
