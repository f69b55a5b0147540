"""Tasks and their targets: what the right answer of each kind is, whether a record has one, and what a data set knows
of each of its tasks.

A record's `task` is ``KIND`` or ``KIND:NAME``, so that one data set may hold two classifications (``classify:topic``
and ``classify:mood``). Where the answer stands:

    classify   label                       multilabel  labels, none of them also being an answer
    regress    value                       tag         spans, none also being an answer
    relate     label, and two spans named head and tail
    extract    texts, the right answers ([] is "no answer"), and spans: where in the context they stand
    match      candidates, and in labels the decimal indexes of the right ones
    generate   text, or texts: several right ones, of which the first is trained on

Spans count characters of one message, as stored (see `spanned`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mmagent.record import Record, Target, segments

KINDS = ("classify", "multilabel", "regress", "match", "tag", "relate", "extract", "generate")
HEAD, TAIL = "head", "tail"


class TargetError(ValueError):
    """A record whose answer cannot be used for its task."""

    def __init__(self, reason: str, message: str) -> None:
        """`reason`: a few words, the same for all rows that fail alike; `message`: what exactly was wrong."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What a data set knows of one of its tasks, all of it over the training split but `rows`."""

    task: str
    labels: tuple[str, ...] = ()  # classes, tags, entity types or relations, sorted: the order of the head's outputs
    counts: Mapping[str, int] = field(default_factory=dict)  # label -> rows (tag: spans) that have it
    mean: float | None = None  # of the values (regress)
    deviation: float | None = None  # of the values, with n in the denominator (regress)
    rows: Mapping[str, int] = field(default_factory=dict)  # split -> rows of this task
    dual: bool = False  # match: what is asked and what is offered are read apart; a run settles it (model.match)

    @property
    def kind(self) -> str:
        return kind(self.task)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in dataset.json, below the name of the task."""
        return {
            "rows": dict(self.rows),
            "labels": list(self.labels),
            "counts": dict(self.counts),
            "mean": self.mean,
            "deviation": self.deviation,
            **({"dual": True} if self.dual else {}),
        }

    @classmethod
    def from_dict(cls, task: str, raw: Mapping[str, Any]) -> TaskInfo:
        return cls(
            task,
            tuple(raw.get("labels") or ()),
            dict(raw.get("counts") or {}),
            raw.get("mean"),
            raw.get("deviation"),
            dict(raw.get("rows") or {}),
            bool(raw.get("dual")),
        )


def kind(task: str) -> str:
    """The kind of a task: ``classify:mood`` is of the kind ``classify``.

    Raises:
        TargetError: no such kind.
    """
    found, colon, name = task.partition(":")
    if found not in KINDS or (colon and not name):
        raise TargetError("unknown task", f"the task is {task!r}, but KIND or KIND:NAME is wanted: {', '.join(KINDS)}")
    return found


def infer(target: Target, *, candidates: bool = False) -> str | None:
    """The kind of task that a target's filled fields are of; None where nothing is filled.

    Args:
        candidates: whether the row brings candidates to choose from.
    """
    names = {str(span.get("label")) for span in target.spans or ()}
    found = (
        ("match", candidates),
        ("extract", target.spans is not None and target.texts is not None),
        ("relate", target.label is not None and {HEAD, TAIL} <= names),
        ("tag", target.spans is not None),
        ("multilabel", target.labels is not None),
        ("regress", target.value is not None),
        ("classify", target.label is not None),
        ("generate", target.text is not None or target.texts is not None),
    )
    return next((name for name, filled in found if filled), None)


def labels_of(record: Record) -> tuple[str, ...]:
    """The labels that a record's answer names, those that a head must know: classes, tags, entity types, a relation."""
    target, found = record.target, kind(record.task)
    if found in ("classify", "relate"):
        return () if target.label is None else (target.label,)
    if found == "multilabel":
        return tuple(dict.fromkeys(target.labels or ()))
    if found == "tag":
        return tuple(str(span["label"]) for span in target.spans or ())
    return ()


def spanned(record: Record) -> int:
    """The index of the message whose characters spans count: the last of the role context, else the last user's."""
    for role in ("context", "user"):
        for index in reversed(range(len(record.messages))):
            if record.messages[index].role == role:
                return index
    raise TargetError("no text", "spans count characters of a context or user message, but the record has none")


def words_of(content: str, span: Mapping[str, Any]) -> str:
    """The words that a span covers in a message's content, placeholders left out and escapes undone."""
    inside = content[span["start"] : span["end"]]
    return "".join(text for part, text in segments(inside) if part == "text")


def check(record: Record) -> None:
    """Sees that the answer is there and can be used for the record's task.

    Raises:
        TargetError: no such task; no answer; a value that is no number; spans that lie outside the text or, for tag,
            overlap; relate without one head and one tail; match without candidates or with an index of none.
    """
    found, target = kind(record.task), record.target
    if found == "classify":
        _want(target.label is not None, "label")
    elif found == "multilabel":
        _want(target.labels is not None, "labels")
    elif found == "regress":
        _want(target.value is not None, "value")
        if not math.isfinite(target.value or 0.0):
            raise TargetError("value is not finite", f"the value is {target.value}, but a finite number is wanted")
    elif found == "tag":
        _want(target.spans is not None, "spans")
        _check_apart(record, _check_spans(record))
    elif found == "relate":
        _want(target.label is not None, "label")
        _check_ends(record)
    elif found == "extract":
        _want(target.texts is not None, "answer")
        _check_answers(record)
    elif found == "match":
        _check_candidates(record)
    else:
        _want(bool(target.text or any(target.texts or ())), "answer")


def check_question(record: Record) -> None:
    """Sees that a record brings what its task reads besides messages, be its answer known or not: candidates for match,
    one head and one tail for relate.

    Raises:
        TargetError: what is missing, empty or outside the text.
    """
    found = kind(record.task)
    if found == "match":
        _check_offered(record)
    elif found == "relate":
        _check_ends(record)


def _want(there: bool, name: str) -> None:
    if not there:
        raise TargetError(f"no {name}", f"the row has no {name}")


def _check_spans(record: Record) -> list[Mapping[str, Any]]:
    """The spans in the order of the text, each of them inside it."""
    spans = list(record.target.spans or ())
    if not spans:
        return spans
    content = record.messages[spanned(record)].content
    for index, span in enumerate(spans):
        start, end = span.get("start"), span.get("end")
        if not (isinstance(start, int) and isinstance(end, int)):
            raise TargetError("span without a place", f"spans[{index}] is {dict(span)}, but start and end are wanted")
        if not 0 <= start < end <= len(content):
            where = f"spans[{index}] is {start}..{end}, but the text has {len(content)} characters"
            raise TargetError(
                "span outside the text" if start < end else "empty span",
                f"{where}: 0 <= start < end <= {len(content)} is wanted; the text is {content!r:.80}",
            )
        if not span.get("label") and kind(record.task) != "extract":
            raise TargetError("span without a label", f"spans[{index}] ({start}..{end}) has no label")
    return sorted(spans, key=lambda span: (span["start"], span["end"]))


def _check_apart(record: Record, spans: list[Mapping[str, Any]]) -> None:
    for one, other in pairwise(spans):
        if other["start"] < one["end"]:
            content = record.messages[spanned(record)].content
            shown = " and ".join(
                f"{span['start']}..{span['end']} ({span['label']}: {words_of(content, span)!r:.40})"
                for span in (one, other)
            )
            raise TargetError("overlapping spans", f"the spans {shown} overlap, but a tag is for one span at a place")


def _check_ends(record: Record) -> None:
    names = sorted(str(span.get("label")) for span in _check_spans(record))
    if names != [HEAD, TAIL]:
        raise TargetError(
            "no head and tail", f"a relation wants two spans, labelled head and tail, but the row has {names or 'none'}"
        )


def _check_answers(record: Record) -> None:
    texts, spans = record.target.texts or (), list(record.target.spans or ())
    _check_spans(record)
    content = record.messages[spanned(record)].content
    if texts and not spans:
        raise TargetError("answer not in the text", f"none of the answers {texts!r:.80} is in the text {content!r:.80}")
    for span in spans:
        covered = words_of(content, span)
        if covered not in texts:
            raise TargetError(
                "answer not at its place",
                f"the text at {span['start']}..{span['end']} is {covered!r:.60}, but the answers are {texts!r:.80}",
            )


def _check_offered(record: Record) -> None:
    if not record.candidates:
        raise TargetError("no candidates", "the row has no candidates to choose from")
    for index, candidate in enumerate(record.candidates):
        if not any(candidate.get(part) for part in ("content", "image", "audio")):
            raise TargetError("empty candidate", f"candidates[{index}] has no text, image or audio")


def _check_candidates(record: Record) -> None:
    _check_offered(record)
    count, labels = len(record.candidates), record.target.labels
    if not labels:
        raise TargetError("no right candidate", f"the row has {count} candidates, but says of none that it is right")
    for label in labels:
        if not (label.isdecimal() and int(label) < count):
            raise TargetError(
                "no such candidate", f"the label {label!r} is no index of the {count} candidates: 0 to {count - 1}"
            )
