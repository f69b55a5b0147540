"""What a language model reads of a record: its words as token ids, whole, in strides, or beside a candidate."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmagent import text
from mmagent.record import Record
from mmagent.targets import spanned

_PLACEHOLDER = re.compile(r"(\\*)(<(?:image|audio)>)")
_OVERLAP = 4  # consecutive strides share this part of their length


@dataclass(frozen=True, slots=True)
class View:
    """One forward pass's worth of a record's text. Most records are one view; a long text that is read in strides,
    and a question with candidates, are several."""

    ids: np.ndarray  # (tokens,) int64
    offsets: np.ndarray | None = None  # (tokens, 2) characters of the text that spans count in; -1 outside of it
    index: int = 0  # of the candidate, or of the stride


@dataclass(frozen=True, slots=True)
class Reader:
    """Makes views; pure, so that threads may share it.

    Args:
        tokenizer: of the backbone.
        max_tokens: of one view.
    """

    tokenizer: Any
    max_tokens: int

    def whole(self, words: str) -> View:
        """A text as it is, cut on the left."""
        return View(text.tokenize(self.tokenizer, [words], self.max_tokens)[0])

    def beside(self, words: str, candidate: str, index: int) -> View:
        """A text and one candidate, as a pair of sentences; the longer of the two is cut first."""
        ids = self.tokenizer(
            words, candidate or None, truncation="longest_first" if candidate else True, max_length=self.max_tokens
        )["input_ids"]
        return View(_some(ids, self.tokenizer), index=index)

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
        question = self._short(question)
        found = self.tokenizer(
            *((question, shown) if question else (shown,)),
            truncation="only_second" if question else True,
            max_length=self.max_tokens,
            stride=self._stride(question),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        views = []
        for index, ids in enumerate(found["input_ids"]):
            offsets = np.array(found["offset_mapping"][index], np.int64).reshape(-1, 2)
            mine = [part == (1 if question else 0) for part in found.sequence_ids(index)]
            views.append(View(_some(ids, self.tokenizer), _trimmed(offsets, mine, shown, places), index))
        return tuple(views)

    def _short(self, question: str) -> str:
        """At most half of the room is for the question."""
        found = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        spare = len(found) - self.max_tokens // 2
        return question[found[spare][0] :] if spare > 0 else question

    def _stride(self, question: str) -> int:
        taken = len(self.tokenizer(question, "" if question else None)["input_ids"])
        return max(0, (self.max_tokens - taken) // _OVERLAP)


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
