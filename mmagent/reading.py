"""What a language model reads of a record: its words as token ids, whole, in strides, or beside a candidate.

Where pictures and sounds join at the language model's input, their places are among the ids: `PLACES` stands for a
token that a tower will make. A text that is too long is cut on the left, its oldest words first; a picture or sound is
never cut, and where several leave too little room for words the record is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mmagent import text
from mmagent.record import Message, Record, segments
from mmagent.targets import spanned

_PLACEHOLDER = re.compile(r"(\\*)(<(?:image|audio)>)")
_OVERLAP = 4  # consecutive strides share this part of their length
PLACES: Mapping[str, int] = {"image": -1, "audio": -2}  # instead of a token's id: a tower's token comes here
MADE = -3  # instead of a token's id: what a native model's processor makes of pictures and sounds comes here
_FEWEST = 8  # tokens of text that pictures and sounds leave room for
_MARK = "\ufdd0{}\ufdd1"  # around the number of a message, while a chat template sets it: no text has these characters
_MARKED = re.compile("\ufdd0(\\d+)\ufdd1")


class TooLongError(ValueError):
    """Pictures and sounds that leave no room for words."""


@dataclass(frozen=True, slots=True)
class View:
    """One forward pass's worth of a record's text. Most records are one view; a long text that is read in strides,
    and a question with candidates, are several."""

    ids: np.ndarray  # (tokens,) int64
    offsets: np.ndarray | None = None  # (tokens, 2) characters of the text that spans count in; -1 outside of it
    index: int = 0  # of the candidate, or of the stride
    reply: np.ndarray | None = None  # (reply,) int64: what is to be written, where it is known
    cut: int = 0  # tokens that were left out
    offers: bool = False  # there are words of a candidate in it
    alone: bool = False  # a candidate without what is asked
    key: int = 0  # equal where what is read is the same, pictures and sounds with it; of what is read apart


@dataclass(frozen=True, slots=True)
class Reader:
    """Makes views; pure, so that threads may share it.

    Args:
        tokenizer: of the backbone.
        max_tokens: of one view's text.
        max_reply: tokens of what is written.
        soft: tokens that stand for one picture, or one sound, among the words; empty where they join elsewhere.
        positions: of the language model, where they are limited.
        decodes: the language model is a decoder alone: what it writes follows what it reads.
    """

    tokenizer: Any
    max_tokens: int
    max_reply: int = 64
    soft: Mapping[str, int] = field(default_factory=dict)
    positions: int | None = None
    decodes: bool = False

    def whole(self, record: Record) -> View:
        """A record's words as they are, pictures and sounds at their places where they join at the input."""
        if not self.soft:
            [(ids, cut)] = text.fitted(self.tokenizer, [text.words(record)], self.max_tokens)
            return View(ids, cut=cut)
        opening, closing = text.frame(self.tokenizer)
        inner, cut = self._fitted(self._pieces(text.parts(record)), len(opening) + len(closing))
        return View(_some([*opening, *inner, *closing], self.tokenizer), cut=cut)

    def prompt(self, record: Record) -> View:
        """A record as what a reply follows: by the tokenizer's chat template where it has one, else its words, on a
        line of their own for a decoder. Words of users are never read as the template's own signs."""
        opening, closing = text.frame(self.tokenizer)
        if getattr(self.tokenizer, "chat_template", None):
            pieces, opening, closing = self._chat(record), [], []
        else:
            pieces = self._pieces([*text.parts(record), *([("text", "\n")] if self.decodes else [])])
            closing = [] if self.decodes else closing
        frame = len(opening) + len(closing)
        ids, cut = self._fitted(pieces, frame, frame + (self.max_reply if self.decodes else 0))
        return View(_some([*opening, *ids, *closing], self.tokenizer), cut=cut)

    def reply(self, words: str) -> tuple[np.ndarray, int]:
        """What is to be written, ids with the stop at the end; and how many tokens are over `max_reply`."""
        if self.decodes:
            ids = self.tokenizer(words, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(text_target=words)["input_ids"]
        stop = text.stop_id(self.tokenizer)
        ids = [*ids, *([] if ids and ids[-1] == stop else [stop])]
        return np.asarray(ids[: self.max_reply], np.int64), max(0, len(ids) - self.max_reply)

    @property
    def fewest(self) -> int:
        """Tokens that a view needs at least."""
        opening, closing = text.frame(self.tokenizer)
        return _FEWEST + len(opening) + len(closing)

    def fronted(self, view: View, images: int, audios: int) -> View:
        """A view with so many pictures and sounds before its words, behind what opens every text: how tasks on spans
        and candidates read them."""
        places = [PLACES["image"]] * (images * self.soft["image"]) if images else []
        places += [PLACES["audio"]] * (audios * self.soft["audio"]) if audios else []
        if not places:
            return view
        self._check_room(len(places), len(view.ids))
        return opened(view, places, len(text.frame(self.tokenizer)[0]))

    def _pieces(self, parts: Sequence[tuple[str, str]]) -> list[tuple[bool, list[int]]]:
        """(whether it is text, ids) of each part."""
        return [(True, self._ids(words)) if kind == "text" else self._medium(kind) for kind, words in parts]

    def _medium(self, kind: str) -> tuple[bool, list[int]]:
        return False, [PLACES[kind]] * self.soft.get(kind, 0)

    def _ids(self, words: str) -> list[int]:
        """Of a user's words: the tokenizer's own signs in them are words too."""
        words = text.legible(self.tokenizer, words)
        return list(
            self.tokenizer(words, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        )

    def _chat(self, record: Record) -> list[tuple[bool, list[int]]]:
        """The pieces of a chat template around each message's own."""
        numbered = [{"role": m.role, "content": _MARK.format(i)} for i, m in enumerate(record.messages)]
        roles = {"context": "system"}  # templates do not know the text that a question is about
        numbered = [{**message, "role": roles.get(message["role"], message["role"])} for message in numbered]
        said = [{**each, **_called(self.tokenizer, own)} for each, own in zip(numbered, record.messages, strict=True)]
        given = {"tools": tools} if (tools := tools_of(self.tokenizer, record)) else {}
        page = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **given)
        out: list[tuple[bool, list[int]]] = []
        for index, part in enumerate(_MARKED.split(page)):
            if index % 2:
                out += self._pieces(list(segments(record.messages[int(part)].content)))
            elif part:
                out.append((False, list(self.tokenizer(part, add_special_tokens=False)["input_ids"])))
        return out

    def _fitted(self, pieces: Sequence[tuple[bool, list[int]]], frame: int, room: int = 0) -> tuple[list[int], int]:
        """All ids in a row, the oldest words left out where they are too many; and how many were.

        Args:
            frame: ids of the tokenizer's own around them.
            room: places of the language model that are taken besides.
        """
        fixed = sum(len(ids) for is_text, ids in pieces if not is_text)
        words = sum(len(ids) for is_text, ids in pieces if is_text)
        room = max(room, frame)
        self._check_room(fixed, min(words, _FEWEST) + room)
        allowed = self.max_tokens - frame
        if self.positions is not None:
            allowed = min(allowed, self.positions - fixed - room)
        over = cut = max(0, words - allowed)
        out: list[int] = []
        for is_text, ids in pieces:
            gone = min(over, len(ids)) if is_text else 0
            over -= gone
            out += ids[gone:]
        return out, cut

    def _check_room(self, media: int, words: int) -> None:
        if self.positions is not None and media + words > self.positions:
            raise TooLongError(
                f"pictures and sounds take {media} tokens, which leaves too little of the {self.positions} that the "
                "language model reads: send fewer, or train with fewer tokens for each (model.image.tokens, "
                "model.audio.tokens)"
            )

    def beside(self, words: str, candidate: str, index: int) -> View:
        """A text and one candidate, as a pair of sentences; the longer of the two is cut first."""
        pair = tuple(text.legible(self.tokenizer, each) for each in ((words, candidate) if candidate else (words,)))
        how = "longest_first" if candidate else True
        ids = self.tokenizer(*pair, truncation=how, max_length=self.max_tokens, split_special_tokens=True)["input_ids"]
        cut = text.length(self.tokenizer, *pair) - len(ids) if len(ids) >= self.max_tokens else 0
        return View(_some(ids, self.tokenizer), index=index, cut=cut, offers=bool(candidate))

    def alone(self, words: str) -> View:
        """Words by themselves."""
        [(ids, cut)] = text.fitted(self.tokenizer, [words], self.max_tokens)
        return View(ids, cut=cut)

    def strides(self, record: Record) -> tuple[View, ...]:
        """The message that spans count in, with its characters' places, after the words of the other messages; a long
        one in overlapping strides."""
        at = spanned(record)
        others = replace(record, messages=record.messages[:at] + record.messages[at + 1 :])
        return self.placed(text.words(others), record.messages[at].content)

    def placed(self, question: str, content: str, places: np.ndarray | None = None) -> tuple[View, ...]:
        """`content` in strides behind `question`.

        Args:
            places: for each character of `content` (and its end) the one it stands for, where signs were put in.

        Raises:
            BackboneError: the tokenizer does not tell the characters of its tokens.
        """
        if not self.tokenizer.is_fast:
            raise text.BackboneError(
                f"{type(self.tokenizer).__name__} does not tell which characters a token stands for, which tasks on "
                "spans need: a folder with tokenizer.json is wanted (AutoTokenizer.from_pretrained(..., use_fast=True))"
            )
        shown = _PLACEHOLDER.sub(lambda m: m[0] if len(m[1]) % 2 else m[1] + " " * len(m[2]), content)
        question, cut = self._short(text.legible(self.tokenizer, question))
        if text.legible(self.tokenizer, shown) != shown:
            shown, moved = text.apart(shown)
            places = moved if places is None else places[moved]
        found = self.tokenizer(
            *((question, shown) if question else (shown,)),
            truncation="only_second" if question else True,
            max_length=self.max_tokens,
            stride=self._stride(question),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        views = []
        for index, ids in enumerate(found["input_ids"]):
            offsets = np.array(found["offset_mapping"][index], np.int64).reshape(-1, 2)
            mine = [part == (1 if question else 0) for part in found.sequence_ids(index)]
            placed = _trimmed(offsets, mine, shown, places)
            views.append(View(_some(ids, self.tokenizer), placed, index, cut=0 if index else cut))
        return tuple(views)

    def _short(self, question: str) -> tuple[str, int]:
        """At most half of the room is for the question; and how many of its tokens are left out."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        found = self.tokenizer(question, **options)["offset_mapping"]
        spare = len(found) - self.max_tokens // 2
        return (question[found[spare][0] :], spare) if spare > 0 else (question, 0)

    def _stride(self, question: str) -> int:
        taken = text.length(self.tokenizer, question, *([""] if question else []))
        return max(0, (self.max_tokens - taken) // _OVERLAP)


def tools_of(tokenizer: Any, record: Record) -> list[dict[str, Any]]:
    """The tools that a chat template is to offer: ``meta["tools"]`` of a record, as OpenAI writes them."""
    return json.loads(text.legible(tokenizer, record.meta["tools"])) if "tools" in record.meta else []


def _called(tokenizer: Any, message: Message) -> dict[str, Any]:
    """What a message says of calls, as chat templates read it; words in it stay words."""
    out: dict[str, Any] = {}
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": _arguments(text.legible(tokenizer, call["arguments"] or "{}")),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    return out


def _arguments(words: str) -> Any:
    try:
        return json.loads(words)
    except ValueError:
        return words


def opened(view: View, places: Sequence[int], at: int) -> View:
    """A view with more ids at a place, which stand for no words."""
    ids = np.concatenate([view.ids[:at], np.asarray(places, np.int64), view.ids[at:]])
    offsets = view.offsets
    if offsets is not None:
        offsets = np.concatenate([offsets[:at], np.full((len(places), 2), -1), offsets[at:]])
    return replace(view, ids=ids, offsets=offsets)


def without(view: View, place: int) -> View:
    """A view without the places of its pictures, or of its sounds, or of both (see `PLACES` and `MADE`)."""
    kept = view.ids != place
    if kept.all():
        return view
    return replace(view, ids=view.ids[kept], offsets=None if view.offsets is None else view.offsets[kept])


def _trimmed(offsets: np.ndarray, mine: list[bool], content: str, places: np.ndarray | None) -> np.ndarray:
    """(tokens, 2): without the spaces that some tokenizers count to a word; -1 for what is not the text."""
    out = np.full_like(offsets, -1)
    for row, (start, end) in enumerate(offsets):
        while start < end and content[start].isspace():
            start += 1
        while end > start and content[end - 1].isspace():
            end -= 1
        if mine[row] and end > start:
            out[row] = (start, end) if places is None else (places[start], places[end])
    return out


def _some(ids: list[int], tokenizer: Any) -> np.ndarray:
    return np.asarray(ids or [tokenizer.pad_token_id], dtype=np.int64)
