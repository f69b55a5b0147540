"""Whether answers hang on words that should not matter: names, pronouns, places swapped for others.

A word list is a CSV file of pairs: ``he,she``, ``Paris,Lagos``. Each word of a question that stands in it becomes the
other of its pair, whole words alone, capitals kept; questions that change are asked again.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.answers import Answerer
from mmagent import metrics
from mmagent.predictions import EvaluationError
from mmagent.record import SCHEMA, Record, compose, segments
from mmagent.shards import Dataset

_SHOWN = 10
_BATCH_ROWS = 64


def load(file: Path) -> dict[str, str]:
    """Word to word, both ways, in lower case.

    Raises:
        EvaluationError: no such file, or a line that is no pair.
    """
    out: dict[str, str] = {}
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.reader(lines), 1):
                if not row or row[0].startswith("#"):
                    continue
                if len(row) != 2 or not all(each.strip() for each in row):
                    raise EvaluationError(f"{file}, line {number}: two words are wanted, but got {row}")
                one, other = (each.strip().lower() for each in row)
                for word in (one, other):
                    if word in out:
                        raise EvaluationError(f"{file}, line {number}: {word!r} stands in a pair before")
                out |= {one: other, other: one}
    except OSError as error:
        raise EvaluationError(f"cannot read the word list {file}: {error.strerror or error}") from error
    if not out:
        raise EvaluationError(f"the word list {file} has no pairs")
    return out


def swapped(record: Record, words: Mapping[str, str]) -> Record | None:
    """The record with every word of the list swapped; none where no word is in it, or where spans count its
    characters."""
    if record.target.spans:
        return None
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})\b", re.IGNORECASE)

    def other(found: re.Match[str]) -> str:
        word, made = found[0], words[found[0].lower()]
        return made.upper() if word.isupper() and len(word) > 1 else made.capitalize() if word[0].isupper() else made

    messages = tuple(
        replace(each, content=compose((kind, pattern.sub(other, text) if kind == "text" else text)
                                      for kind, text in segments(each.content)))
        for each in record.messages
    )  # fmt: skip
    return replace(record, messages=messages) if messages != record.messages else None


def ask(
    bundle: str, dataset: Dataset, split: str, table: pa.Table, words: Mapping[str, str], tasks: Mapping[str, str],
    *, workers: int, threads: int, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """`changed`, of a split of a data set."""
    records = (Record.from_row(row) for part in dataset.read(split) for row in part.to_pylist())
    return changed(bundle, records, table, words, tasks, workers=workers, threads=threads, seed=seed)


def changed(
    bundle: str, records: Iterable[Record], table: pa.Table, words: Mapping[str, str], tasks: Mapping[str, str],
    *, workers: int, threads: int, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """What changed: the share of answers, with its interval, and some of them; on the connected Ray.

    Args:
        bundle: its folder.
        table: predictions of the questions as they are.
        tasks: the bundle's task for a task of the data.
    """
    from jobs import stream

    known = {row["id"]: row["predicted"] for row in table.select(["id", "predicted", "error", "without"]).to_pylist()
             if row["error"] is None and not row["without"]}  # fmt: skip
    made = [found for record in records if record.id in known and (found := swapped(record, words)) is not None]
    out: dict[str, Any] = {"pairs": len(words) // 2, "n": len(made), "changed": None, "examples": []}
    if not made:
        return out
    rows = pa.Table.from_pylist([record.to_row() for record in made], SCHEMA)
    kwargs: dict[str, Any] = {"bundle": bundle, "slices": (), "without": None, "threads": threads, "tasks": dict(tasks)}
    answered = pa.concat_tables(
        stream.over(rows, Answerer, kwargs, workers=workers, batch_rows=_BATCH_ROWS, threads=threads)
    )
    answered = answered.filter(pc.is_null(answered["error"]))
    now = dict(zip(answered["id"].to_pylist(), answered["predicted"].to_pylist(), strict=True))
    asked = {record.id: record for record in made if record.id in now}
    others = [id for id in asked if now[id] != known[id]]
    hits = np.array([float(now[id] != known[id]) for id in asked])
    return {
        **out, "n": len(asked), "changed": metrics.share(hits, seed=seed) if len(hits) else None,
        "examples": [{"id": id, "asked": _words(asked[id]), "answer": known[id], "swapped": now[id]}
                     for id in sorted(others)[:_SHOWN]],
    }  # fmt: skip


def _words(record: Record) -> str:
    return " ".join(text.strip() for kind, text in record.segments() if kind == "text").strip()


def lines(found: Mapping[str, Any]) -> Sequence[str]:
    """For a terminal."""
    if found["changed"] is None:
        return [f"swapped words: none of the {found['pairs']} pairs is in a question"]
    share = found["changed"]
    sure = f"{share['low']:.1%} to {share['high']:.1%}"
    told = f"swapped words: {share['value']:.1%} of {found['n']} answers change ({sure})"
    return [told, *(f"  {each['asked']!r}: {each['answer']} -> {each['swapped']}" for each in found["examples"][:3])]
