"""Whether what a bundle writes is training text, word by word: runs of words that stand in a training row and not in
the question that was asked (Carlini et al. 2023, "Quantifying memorization", arXiv:2202.07646)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from mmagent.record import Record
from mmagent.shards import Dataset

WORDS = 8  # in a row, that make a repetition
_WORD = re.compile(r"\w+")
_SHOWN = 10


def repeated(table: pa.Table, asked: Iterable[Record], learned: Dataset, task: str) -> dict[str, Any]:
    """How many written answers repeat training text, and some of the runs.

    Args:
        table: predictions of the task.
        asked: the questions.
        learned: what the bundle was trained on.
    """
    known = np.unique(np.fromiter((run for words in _texts(learned, task) for run in _runs(words)), np.uint64))
    answers = {row["id"]: row["predicted"] for row in table.select(["id", "predicted", "error", "without"]).to_pylist()
               if row["error"] is None and not row["without"]}  # fmt: skip
    found: list[dict[str, str]] = []
    count = 0
    for record in asked:
        if record.task != task or record.id not in answers:
            continue
        count += 1
        said = _split(answers[record.id])
        own = set(_runs(_split(" ".join(text for kind, text in record.segments() if kind == "text"))))
        at = [place for place, run in enumerate(_runs(said)) if run not in own and _holds(known, run)]
        if at:
            found.append({"id": record.id, "words": " ".join(said[at[0] : at[-1] + WORDS])})
    return {"words": WORDS, "n": count, "repeated": len(found), "examples": found[:_SHOWN]}


def _texts(dataset: Dataset, task: str) -> Iterator[list[str]]:
    for part in dataset.read("train", columns=["task", "target"]):
        for row in part.to_pylist():
            target = row["target"] or {}
            if row["task"] == task:
                yield from (_split(text) for text in (target.get("text"), *(target.get("texts") or ())) if text)


def _split(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _runs(words: list[str]) -> Iterator[int]:
    for at in range(len(words) - WORDS + 1):
        run = " ".join(words[at : at + WORDS]).encode()
        yield int.from_bytes(hashlib.blake2b(run, digest_size=8).digest())


def _holds(known: np.ndarray, run: int) -> bool:
    place = int(np.searchsorted(known, np.uint64(run)))
    return place < len(known) and int(known[place]) == run


def line(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    return f"{found['repeated']} of {found['n']} written answers hold {found['words']} words or more of a training text"
