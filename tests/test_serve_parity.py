"""The gate between training and serving: a record asked as a client would ask it is the same record again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from jobs.export import jsonable
from mmagent.record import Message, Record, Target
from mmagent.rows import parse
from serve import parity
from serve.questions import PredictRequest


def judged(golden: list[dict[str, Any]], answer: Mapping[str, Any] | Exception) -> parity.Verdict:
    async def ask(_: PredictRequest) -> Mapping[str, Any]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return asyncio.run(parity.judge(golden, ask))


ANSWER = {"label": "red", "probabilities": {"red": 0.9}, "confidence": 0.9}


def test_the_same_answers_pass_and_others_do_not(make_records: Callable[..., list[Record]]) -> None:
    golden = [{"record": jsonable(record), "answer": ANSWER} for record in make_records(8)]
    verdict = judged(golden, ANSWER)
    assert (verdict.passed, verdict.asked, verdict.worst) == (True, 8, 0.0)
    verdict = judged(golden, {**ANSWER, "label": "blue"})
    assert not verdict.passed
    assert "example 0 (text+image): label is 'blue', was 'red'" in verdict.differences[0]
    verdict = judged(golden, ValueError("it broke"))
    assert verdict.to_dict()["golden_different"] == 8
    assert "no answer: it broke" in verdict.differences[0]


@pytest.mark.parametrize(
    "record",
    [
        Record("a", (Message("system", "be brief"), Message("user", "<image>what is it?"))),
        Record("b", (Message("user", r"a \<image> in words"),)),
        Record("c", (Message("user", "hi"), Message("assistant", "yes?"), Message("user", "go on"))),
        Record("d", (Message("context", "the sea is near"), Message("user", "where?")), task="extract"),
    ],
)
def test_a_request_says_what_the_record_says(record: Record, make_png: Callable[..., bytes]) -> None:
    from mmagent.record import Media

    images = tuple(Media(make_png(), None) for kind, _ in record.segments() if kind == "image")
    record = Record(record.id, record.messages, images=images, task=record.task)
    request = parity.as_request(record)
    assert request.task == record.task
    assert [each.role for each in request.messages or ()] == [m.role for m in record.messages if m.role != "context"]
    if record.messages[0].role == "context":
        assert request.context == "the sea is near"


def test_candidates_and_marked_spans_travel() -> None:
    row = parse({"text": "which?", "task": "match", "candidates": ["one", "two"]})
    assert [getattr(each, "text", each) for each in parity.as_request(row).candidates or ()] == ["one", "two"]
    spans = ({"start": 0, "end": 3, "label": "head"}, {"start": 4, "end": 7, "label": "tail"})
    told = Record("r", (Message("user", "one two"),), task="relate", target=Target(spans=spans))
    assert [(s.start, s.end, s.label) for s in parity.as_request(told).spans or ()] == [(0, 3, "head"), (4, 7, "tail")]
