"""SQuAD's JSON, 1.1 and 2.0 (arXiv:1606.05250, 1806.03822): questions on paragraphs, answered by words of them or not
at all. A question is a row: the paragraph is its context, and its answers' places are spans of it.

A folder's files are read in the order of their names; ``train-v2.0.json`` and ``dev-v2.0.json`` name their split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.sources import SourceError
from jobs.sources.readers import RawRow, digests, files_of, split_of


class Squad:
    shuffled = False

    def __init__(self, place: Path, prefix: str = "") -> None:
        self._place, self._prefix = place, prefix
        self._files = files_of(place, (".json",))

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        for file in self._files:
            split = split_of(file, self._place)
            for number, (title, paragraph, question) in enumerate(_questions(file), 1):
                default_id = f"{self._prefix}{file.stem}-{number}"
                try:
                    values = _values(title, paragraph, question)
                except (KeyError, TypeError, AttributeError) as error:
                    told = ("not SQuAD", f"question {number}: a key is missing or of another type: {error!r}")
                    yield RawRow(str(file), number, default_id, None, None, question, *told)
                    continue
                if split is not None:
                    values["split"] = split
                yield RawRow(str(file), number, default_id, values)

    def fingerprint(self) -> dict[str, Any]:
        return digests(self._files, self._place)


def _questions(file: Path) -> Iterator[tuple[Any, Any, Any]]:
    """The title, the paragraph's text and the object of each question."""
    try:
        articles = json.loads(file.read_text(encoding="utf-8-sig"))["data"]
        if not isinstance(articles, list):
            raise TypeError(f"data is {type(articles).__name__}")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: the bytes at {error.start} are not UTF-8") from error
    except json.JSONDecodeError as error:
        told = f"{file} line {error.lineno}: not JSON: {error.msg}"
        if error.msg == "Extra data":  # a whole document ends, and another follows
            told += "; one document is wanted, as SQuAD writes it (a file with one on each line is jsonl:FILE)"
        raise SourceError(told) from error
    except (KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f'{file} is JSON, but not as SQuAD writes it, {{"data": [{{"paragraphs": [...]}}]}}: {error!r}'
        ) from error
    for article in articles:
        for paragraph in _list(article, "paragraphs", file):
            for question in _list(paragraph, "qas", file):
                yield article.get("title"), paragraph.get("context"), question


def _list(raw: Any, key: str, file: Path) -> list[Any]:
    found = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(found, list):
        raise SourceError(f"{file}: {raw!r:.80} has no list {key!r}, so it is not as SQuAD writes it")
    return found


def _values(title: Any, paragraph: Any, question: Any) -> dict[str, Any]:
    impossible = bool(question.get("is_impossible"))
    answers = (
        [] if impossible else [{key: each[key] for key in ("text", "answer_start")} for each in question["answers"]]
    )
    if not isinstance(paragraph, str):
        raise TypeError(f"context is {type(paragraph).__name__}")
    values = {"context": paragraph, "text": question["question"], "answers": answers, "task": "extract"}
    about = {"id": question.get("id"), "title": title}
    return values | {key: str(value) for key, value in about.items() if value is not None}
