"""The right answer as it stands in a user's row: the short columns of each task, or the long form ``target``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmagent import spans
from mmagent.attachments import media_of, unpacked
from mmagent.record import RecordError, Target, compose, escape
from mmagent.targets import kind

# The columns that hold an answer, by the kind of task that reads them.
COLUMNS = {
    "classify": ("label",),
    "multilabel": ("labels",),
    "regress": ("value",),
    "match": ("labels", "label"),
    "tag": ("spans", "tags"),
    "relate": ("label", "spans"),
    "extract": ("answers", "answer", "texts", "spans"),
    "generate": ("answer", "answers", "texts"),
}
# The columns in which a task's answer may also stand when the task is named and its own column is not there.
_ELSEWHERE = {
    "classify": ("label", ("answer", "value")),
    "multilabel": ("labels", ("label",)),
    "regress": ("value", ("label",)),
    "generate": ("answer", ("label",)),
}


def answer_of(row: Mapping[str, Any], task: str | None = None) -> Target:
    """The target that a row's columns hold.

    Args:
        task: what the row is for. It says where the answer may stand besides its own column, and what an empty cell
            means: no labels, no spans, no answer to be found. None: what is empty is missing.

    Raises:
        RecordError: a value of the wrong form; its field is the column.
    """
    wanted = kind(task) if task else ""
    raw = _answer_columns(row, wanted)
    texts, found = _texts(raw, wanted)
    places: Any = raw.get("spans") if found is None else found
    if places == "" or (wanted == "extract" and texts == ()):
        places = [] if wanted in ("tag", "extract") else None
    return Target(
        label=_label(raw.get("label")),
        labels=_labels(raw.get("labels"), wanted),
        value=number(raw, "value", None),
        text=None if wanted == "extract" else one(raw, "answer"),
        texts=texts,
        spans=None if places is None else spans.of_user(unpacked(places, "spans")),
    )


def candidates_of(row: Mapping[str, Any], root: Path | None, limit: int | None) -> tuple[Mapping[str, Any], ...]:
    """What is to be chosen from: each a text, or an object of ``text`` (or ``content``, as stored), image and audio.

    Where a candidate has media, their placeholders stand in its content, as in a message.

    Raises:
        RecordError: another form, or media that cannot be read.
    """
    raw = unpacked(row.get("candidates"), "candidates")
    if raw is None or raw == "":
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise RecordError(f"candidates is {raw!r:.80}, but a list of texts or objects is wanted", "candidates")
    return tuple(_candidate(each, f"candidates[{index}]", root, limit) for index, each in enumerate(raw))


def chosen(target: Target, raw: Any, candidates: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """The right candidates as decimal indexes. A user names them in ``labels`` or ``label``, by their own text or by
    their index; a text that is also a number is taken as a text first.

    Args:
        raw: the row's `candidates`, as the user wrote them.
    """
    names = target.labels if target.labels is not None else None if target.label is None else (target.label,)
    if names is None:
        return None
    words = [each.get("text") if isinstance(each, Mapping) else each for each in unpacked(raw, "candidates") or ()]
    words = [str(word) if word is not None else None for word in words]
    out = []
    for name in names:
        if name not in words and not (name.isdecimal() and int(name) < len(candidates)):
            raise RecordError(
                f"the label {name!r:.80} is neither the text of a candidate nor an index of the {len(candidates)}: "
                f"0 to {len(candidates) - 1}",
                "label",
            )
        out.append(str(words.index(name)) if name in words else str(int(name)))
    return tuple(dict.fromkeys(out))


def number(row: Mapping[str, Any], key: str, default: float | None) -> Any:
    """A finite number of a row.

    Raises:
        RecordError: it is none, NaN or infinite.
    """
    value = row.get(key)
    if value is None or value == "":
        return default
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"{key} is {value!r:.80}, but a number is wanted", key) from error
    if not math.isfinite(found):
        raise RecordError(f"{key} is {value!r:.80}, but a finite number is wanted", key)
    return found


def _answer_columns(row: Mapping[str, Any], wanted: str) -> Mapping[str, Any]:
    """The long form's target, or the row's own columns that the kind of task reads."""
    target = unpacked(row.get("target"), "target")
    if target is not None:
        if not isinstance(target, Mapping):
            raise RecordError(f"target is {target!r:.80}, but an object such as {{'label': ...}} is wanted", "target")
        return {"answer": target.get("text"), **target}
    if not wanted:
        return row
    # A column of another task may mean something else here.
    raw = {column: row[column] for column in COLUMNS[wanted] if column in row}
    column, others = _ELSEWHERE.get(wanted, ("", ()))
    if column and all(value in (None, "", []) for value in raw.values()):
        raw |= dict([(column, row[other]) for other in others if row.get(other) not in (None, "")][:1])
    return raw


def one(row: Mapping[str, Any], key: str) -> str | None:
    """A text of a row; none where it is empty.

    Raises:
        RecordError: it holds several values: what Python calls them is no text to learn from.
    """
    value = row.get(key)
    if isinstance(value, (Mapping, list, tuple, bytes)):
        raise RecordError(f"{key} is {value!r:.80}, but one text is wanted", key)
    return None if value is None or value == "" else str(value)


def _label(value: Any) -> str | None:
    if isinstance(value, (Mapping, list, tuple, bytes)):
        raise RecordError(f"label is {value!r:.80}, but one word or number is wanted", "label")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"label is {value!r}, but a word or a finite number is wanted", "label")
    return None if value is None else str(value).strip() or None


def _labels(raw: Any, wanted: str) -> tuple[str, ...] | None:
    """A list, JSON text of one, or words between ``|``, ``;`` or ``,``: the first of these that occurs."""
    if raw is None or (raw == "" and wanted != "multilabel"):
        return None
    raw = unpacked(raw, "labels")
    if isinstance(raw, str):
        mark = next((each for each in "|;," if each in raw), "|")
        raw = raw.split(mark)
    if not isinstance(raw, Sequence) or isinstance(raw, bytes):
        raise RecordError(f"labels is {raw!r:.80}, but a list, or words between | is wanted", "labels")
    words = (_label(each.strip() if isinstance(each, str) else each) for each in raw)
    return tuple(dict.fromkeys(word for word in words if word is not None))


def _texts(raw: Mapping[str, Any], wanted: str) -> tuple[tuple[str, ...] | None, list[dict[str, Any]] | None]:
    """The right answers, and where they stand in the context if they say so (as SQuAD's do)."""
    many = unpacked(next((raw[key] for key in ("answers", "texts") if raw.get(key) is not None), None), "answers")
    if many is None and wanted == "extract":
        many = raw.get("answer")
    if many is None or (many == "" and wanted != "extract"):
        return None, None
    if many == "":
        return (), None
    placed = isinstance(many, Mapping)
    if isinstance(many, Mapping):  # SQuAD as Hugging Face keeps it: an object of lists
        texts, starts = many.get("text"), many.get("answer_start", many.get("start"))
        if not (isinstance(texts, (list, tuple)) and isinstance(starts, (list, tuple)) and len(texts) == len(starts)):
            raise RecordError(f"answers is {many!r:.80}, but {{text: [...], answer_start: [...]}} is wanted", "answers")
        many = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    many = [many] if isinstance(many, (str, int, float)) else many
    if not isinstance(many, Sequence) or isinstance(many, bytes):
        raise RecordError(f"answers is {many!r:.80}, but a list is wanted", "answers")
    placed = placed or bool(many and all(isinstance(each, Mapping) for each in many))
    return _answers_at_places(many) if placed else (_answers(many), None)


def _answers(many: Sequence[Any]) -> tuple[str, ...]:
    if any(isinstance(each, (Mapping, list, tuple, bytes)) for each in many):
        raise RecordError(f"answers is {many!r:.80}, but a list of texts is wanted", "answers")
    return tuple(dict.fromkeys(str(each) for each in many))


def _answers_at_places(many: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    if not all(isinstance(each.get("answer_start"), int) and each.get("text") is not None for each in many):
        raise RecordError(f"answers is {many!r:.80}, but a list of {{text, answer_start}} is wanted", "answers")
    found = dict.fromkeys((each["answer_start"], str(each["text"])) for each in many)
    places = [{"start": start, "end": start + len(text), "label": None} for start, text in found]
    return tuple(dict.fromkeys(text for _, text in found)), places


def _candidate(raw: Any, place: str, root: Path | None, limit: int | None) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raw = {"text": raw}
    media: dict[str, Any] = {}
    for part in ("image", "audio"):
        value = raw.get(part)
        found = None if value is None or value == "" else media_of(value, f"{place}.{part}", root, limit)
        media[part] = found and {"bytes": found.bytes, "path": found.path}
    if raw.get("content") is not None:
        return {"content": str(raw["content"]), **media}
    text = raw.get("text")
    if isinstance(text, (Mapping, list, tuple, bytes)):
        raise RecordError(f"{place} is {text!r:.80}, but a text is wanted", "candidates")
    marks = [(part, "") for part in ("image", "audio") if media[part]]
    words = "" if text is None else str(text)
    if not marks:
        return {"content": escape(words), **media}
    return {"content": compose([*marks, ("text", f" {words}" if words else "")]), **media}
