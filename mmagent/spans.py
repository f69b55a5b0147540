"""Spans as users have them, made spans of characters: tags of tokens, marks within the text, several written forms.

A span is ``{"start", "end", "label"}``: characters from `start` up to, not with, `end`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmagent.record import RecordError

Span = dict[str, Any]

_TAG = re.compile(r"([BIESLUM])-(.+)")
_OUTSIDE = ("O", "", "_")
# SemEval's marks and their kin: <e1>...</e1>, [E2]...[/E2], <head>...</head>.
_MARK = re.compile(r"[<\[](/?)(e1|e2|head|tail)[>\]]", re.IGNORECASE)
_ENDS = {"e1": "head", "head": "head", "e2": "tail", "tail": "tail"}


def is_tag(word: str) -> bool:
    """Whether a word reads like a tag of B-I-O or one of its kin."""
    return word in _OUTSIDE or _TAG.fullmatch(word) is not None


def of_tags(words: Sequence[str], tags: Sequence[str]) -> tuple[str, list[Span]]:
    """The words joined by a space, and the spans that their tags name.

    B-I-O, BIOES, BILOU, IO and bare types are read alike: a span begins at B, S or U, at a change of type, and at an I,
    E or L that follows no span; it ends after E, L, S and U, and before what does not go on with it (Ramshaw and
    Marcus, cmp-lg/9505040; Ratinov and Roth, W09-1119).

    Raises:
        RecordError: not as many tags as words.
    """
    if len(words) != len(tags):
        raise RecordError(f"there are {len(words)} words, but {len(tags)} tags", "tags")
    spans: list[Span] = []
    open_label: str | None = None
    place = 0
    for word, tag in zip(words, tags, strict=True):
        match = _TAG.fullmatch(tag)
        mark, label = (match[1], match[2]) if match else ("I", tag)
        if tag in _OUTSIDE:
            open_label = None
        else:
            if mark in "BSU" or label != open_label:
                spans.append({"start": place, "end": place, "label": label})
            spans[-1]["end"] = place + len(word)
            open_label = None if mark in "ELSU" else label
        place += len(word) + 1
    return " ".join(words), spans


def of_marks(text: str) -> tuple[str, list[Span]]:
    """A text without its marks ``<e1>...</e1>`` and ``<e2>...</e2>``, and the spans ``head`` and ``tail`` they name."""
    plain, end = "", 0
    begun: dict[str, int] = {}
    spans: list[Span] = []
    for match in _MARK.finditer(text):
        plain += text[end : match.start()]
        end = match.end()
        name = _ENDS[match[2].lower()]
        if not match[1]:
            begun[name] = len(plain)
        elif name in begun:
            spans.append({"start": begun.pop(name), "end": len(plain), "label": name})
    return plain + text[end:], spans


def of_user(raw: Any, place: str = "spans") -> tuple[Span, ...]:
    """Spans in one of the forms users have: a list of ``{start, end, label}`` or of ``[start, end, label]``, or an
    object of lists, as Hugging Face ``datasets`` turns a list of objects around.

    Raises:
        RecordError: another form, or a place that is no whole number.
    """
    if isinstance(raw, Mapping) and all(isinstance(value, (list, tuple)) for value in raw.values()):
        raw = [dict(zip(raw, values, strict=False)) for values in zip(*raw.values(), strict=False)]
    wanted = "but a list of {start, end, label} is wanted"
    if isinstance(raw, (str, bytes, Mapping)) or not isinstance(raw, Sequence):
        raise RecordError(f"{place} is {raw!r:.80}, {wanted}", place)
    spans = []
    for index, span in enumerate(raw):
        if isinstance(span, Sequence) and not isinstance(span, (str, bytes)) and len(span) in (2, 3):
            span = dict(zip(("start", "end", "label"), span, strict=False))
        if not isinstance(span, Mapping) or span.get("start") is None or span.get("end") is None:
            raise RecordError(f"{place}[{index}] is {span!r:.80}, {wanted}", place)
        label = span.get("label")
        start, end = (_whole(span[key], f"{place}[{index}].{key}") for key in ("start", "end"))
        spans.append({"start": start, "end": end, "label": None if label is None else str(label)})
    return tuple(spans)


def moved(span: Span, marks: Sequence[tuple[int, int]], ahead: int) -> Span:
    """A span after `ahead` characters came in front of its text, and some more at each of `marks`: (place, number).

    What comes at a span's very start belongs to the span."""

    def shift(place: int) -> int:
        return place + ahead + sum(more for at, more in marks if at < place)

    return {**span, "start": shift(span["start"]), "end": shift(span["end"])}


def _whole(value: Any, place: str) -> int:
    try:
        number = float(value)
        if number != int(number):
            raise ValueError("not whole")
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"{place} is {value!r:.80}, but a whole number of characters is wanted", "spans") from error
    return int(number)
