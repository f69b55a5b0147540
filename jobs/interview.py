"""The demo's three questions to the served agent: one to read, one to hear, and one it cannot know the answer to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import client
from jobs.client import Reply
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.shards import Dataset

MAX_DOUBT = 0.3  # confidence that an honest agent stays below where it sees no picture
BLIND_QUESTION = "what color is the shape?"


class InterviewError(RuntimeError):
    """The questions cannot be asked, or something else answers; the message says what."""


@dataclass(frozen=True)
class Question:
    words: str
    how: str  # "image + text", ...
    record: Record
    truth: str | None  # none: there is none to know


@dataclass(frozen=True)
class Answered:
    question: Question
    reply: Reply

    @property
    def passed(self) -> bool:
        if self.question.truth is None:
            return float(self.reply.answer["confidence"]) <= MAX_DOUBT
        return bool(self.reply.answer["label"] == self.question.truth)


def questions(dataset: Dataset) -> list[Question]:
    """The first of their kind in the test split: nothing is chosen by how well it is answered.

    Raises:
        InterviewError: the test split has no such question.
    """
    written = _first(dataset, form="text", family="color")
    spoken = _first(dataset, form="speech_unseen", family="shape")
    voice = spoken.meta.get("voice", "an unseen voice")
    return [
        Question(written.meta["question"], "image + text", written, written.target.label),
        Question(spoken.meta["question"], f"image + speech ({voice})", spoken, spoken.target.label),
        Question(BLIND_QUESTION, "text, no image", parse({"id": "blind", "text": BLIND_QUESTION}), None),
    ]


def name_of(bundle: Path) -> str:
    """The name by which a bundle is asked and answers."""
    return str(json.loads((bundle / "manifest.json").read_text())["name"])


def ask(service: str, asked: Sequence[Question], name: str) -> list[Answered]:
    """Asks the bundle of this name, one question after another.

    Raises:
        ServiceError: no answer.
        InterviewError: the answers come from another bundle.
    """
    answered = [Answered(question, client.ask(service, client.question(question.record, name))) for question in asked]
    others = {str(item.reply.answer["bundle"]) for item in answered} - {name}
    if others:
        raise InterviewError(f"{service} answers by {', '.join(others)}, but {name} was served: see `make stop`")
    return answered


def table(answered: Sequence[Answered]) -> str:
    """For a terminal: question, answer, truth, confidence, time, verdict."""
    rows = [("question", "asked as", "answer", "truth", "confidence", "ms", "")]
    for item in answered:
        answer = item.reply.answer
        verdict = ("right" if item.passed else "WRONG") if item.question.truth else _doubt(item.passed)
        rows.append(
            (
                item.question.words, item.question.how, str(answer["label"]), item.question.truth or "(cannot know)",
                f"{answer['confidence']:.2f}", f"{item.reply.ms:.0f}", verdict,
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths).rstrip())
    return "\n".join([*lines, f"answered by the bundle {answered[0].reply.answer['bundle']}"])


def _doubt(passed: bool) -> str:
    return "honest doubt" if passed else f"TOO SURE (> {MAX_DOUBT})"


def _first(dataset: Dataset, **wanted: Any) -> Record:
    for rows in dataset.read("test"):
        metas = rows["meta"].to_pylist()
        for index, meta in enumerate(map(dict, metas)):
            if all(meta.get(key) == value for key, value in wanted.items()):
                record = Record.from_row(rows.slice(index, 1).to_pylist()[0])
                if record.images:
                    return record
    raise InterviewError(f"the test split of {dataset.path} has no question with an image and {wanted}")
