"""Targets: which kind of task an answer is of, and what is wrong with one."""

from __future__ import annotations

from typing import Any

import pytest

from mmagent import targets
from mmagent.record import Message, Record, Target
from mmagent.targets import TargetError, TaskInfo

SPANS = ({"start": 0, "end": 3, "label": "head"}, {"start": 8, "end": 10, "label": "tail"})


def record(task: str, candidates: tuple[dict[str, Any], ...] = (), **target: Any) -> Record:
    messages = (Message("user", "Ann met Bo"),)
    return Record("1", messages, task=task, candidates=candidates, target=Target(**target))


GOOD = [
    record("classify", label="a"),
    record("classify:mood", label="a"),
    record("multilabel", labels=()),
    record("regress", value=0.0),
    record("tag", spans=SPANS),
    record("tag", spans=()),
    record("relate", label="met", spans=SPANS),
    record("extract", texts=()),
    record("extract", texts=("Ann",), spans=({"start": 0, "end": 3, "label": None},)),
    record("match", ({"content": "a"}, {"image": {"bytes": b"x", "path": None}}), labels=("1",)),
    record("generate", text="a"),
    record("generate", texts=("a", "b")),
]


@pytest.mark.parametrize("good", GOOD, ids=lambda good: good.task)
def test_a_good_target_passes_and_says_its_kind(good: Record) -> None:
    targets.check(good)
    if good != GOOD[7]:  # texts alone are also generate's
        assert targets.infer(good.target, candidates=bool(good.candidates)) == targets.kind(good.task)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("guess", label="a"), "unknown task"),
        (record("classify:", label="a"), "unknown task"),
        (record("classify"), "no label"),
        (record("multilabel", label="a"), "no labels"),
        (record("regress", value=float("inf")), "value is not finite"),
        (record("regress"), "no value"),
        (record("tag", label="a"), "no spans"),
        (record("tag", spans=({"start": 0, "end": 11, "label": "x"},)), "span outside the text"),
        (record("tag", spans=({"start": -1, "end": 1, "label": "x"},)), "span outside the text"),
        (record("tag", spans=({"start": 3, "end": 3, "label": "x"},)), "empty span"),
        (record("tag", spans=({"start": 0, "end": 3, "label": None},)), "span without a label"),
        (record("tag", spans=({"start": None, "end": 3, "label": "x"},)), "span without a place"),
        (record("tag", spans=(*SPANS, {"start": 2, "end": 4, "label": "x"})), "overlapping spans"),
        (record("relate", spans=SPANS), "no label"),
        (record("relate", label="met", spans=SPANS[:1]), "no head and tail"),
        (record("relate", label="met", spans=(*SPANS, SPANS[0])), "no head and tail"),
        (record("extract", text="Ann"), "no answer"),
        (record("extract", texts=("Cy",)), "answer not in the text"),
        (record("extract", texts=("Cy",), spans=({"start": 0, "end": 3, "label": None},)), "answer not at its place"),
        (record("match", labels=("0",)), "no candidates"),
        (record("match", ({"content": ""},), labels=("0",)), "empty candidate"),
        (record("match", ({"content": "a"},)), "no right candidate"),
        (record("match", ({"content": "a"},), labels=("1",)), "no such candidate"),
        (record("match", ({"content": "a"},), labels=("a",)), "no such candidate"),
        (record("generate", text=""), "no answer"),
    ],
)
def test_a_bad_target_is_told_by_its_reason(bad: Record, reason: str) -> None:
    with pytest.raises(TargetError) as error:
        targets.check(bad)
    assert error.value.reason == reason


def test_nothing_filled_is_no_task() -> None:
    assert targets.infer(Target()) is None


def test_spans_count_the_context_where_there_is_one() -> None:
    messages = tuple(Message(role, role) for role in ("user", "context", "assistant", "user"))
    assert targets.spanned(Record("1", messages)) == 1
    assert targets.spanned(Record("1", (messages[0], *messages[2:]))) == 2
    with pytest.raises(TargetError, match="has none"):
        targets.spanned(Record("1", messages[2:3]))


def test_labels_of_an_answer() -> None:
    found = [targets.labels_of(good) for good in GOOD]
    assert found == [("a",), ("a",), (), (), ("head", "tail"), (), ("met",), (), (), (), (), ()]


def test_a_task_through_json_and_back() -> None:
    info = TaskInfo("regress:score", ("a",), {"a": 2}, 1.5, 0.5, {"train": 2})
    assert TaskInfo.from_dict("regress:score", info.to_dict()) == info
    assert (info.kind, TaskInfo.from_dict("tag", {}).labels) == ("regress", ())
