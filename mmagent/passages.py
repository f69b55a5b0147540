"""Texts with marked spans: what a model found in them, and what it should have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmagent.markup import Child, Markup, tag
from mmagent.record import segments

_AROUND = 160  # characters of a long text that are shown on either side of its spans


@dataclass(frozen=True)
class Span:
    """Characters of a text as stored. `verdict`: ok, no (said, but wrong), missed, or plain."""

    start: int
    end: int
    label: str
    verdict: str = "plain"


def compared(said: Iterable[Mapping[str, object]], right: Iterable[Mapping[str, object]]) -> list[list[Span]]:
    """The spans that were said, and, where these are not the right ones, the right ones: a line of text for each."""
    given, wanted = {_key(span) for span in said}, {_key(span) for span in right}
    lines = [[Span(*key, "ok" if key in wanted else "no") for key in sorted(given)]]
    if given != wanted:
        lines.append([Span(*key, "ok" if key in given else "missed") for key in sorted(wanted)])
    return lines


def passage(content: str, spans: Sequence[Span]) -> Markup:
    """A message's content with its spans marked; of a long one what lies around them. A span that begins inside
    another one is left out."""
    shown: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if not shown or span.start >= shown[-1].end:
            shown.append(span)
    first = max(0, shown[0].start - _AROUND) if shown else 0
    last = min(len(content), shown[-1].end + _AROUND) if shown else min(len(content), 3 * _AROUND)
    at = first
    parts: list[Child] = ["… "] if first else []
    for span in shown:
        marked = tag("mark", _words(content[span.start : span.end]), tag("small", span.label), class_=span.verdict)
        parts += [_words(content[at : span.start]), marked]
        at = span.end
    parts += [_words(content[at:last]), " …" if last < len(content) else None]
    return tag("p", parts, class_="passage")


def _key(span: Mapping[str, object]) -> tuple[int, int, str]:
    return int(str(span["start"])), int(str(span["end"])), str(span.get("label") or "")


def _words(content: str) -> str:
    return "".join(text for kind, text in segments(content) if kind == "text")
