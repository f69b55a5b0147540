"""What of feedback is set aside, with which reason: by rule, and by what a model says that learned from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jobs import cleaning
from jobs.cleaning import Aside, Offer
from mmagent.feedback import Said
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo

INFOS = {"classify": TaskInfo("classify", ("red", "blue")), "regress": TaskInfo("regress", mean=5.0, deviation=2.0)}


def offer(id: str, key: str, question: str, **target: Any) -> Offer:
    task = "regress" if "value" in target else "classify"
    record = parse({"id": id, "text": question, "task": task})
    record = replace(record, target=replace(record.target, **target))
    return Offer(Said(id, int(id[1:]), key, "wrong", {"answer": id}, {}, record), record, question.encode())


def rules(given: list[Offer], **more: Any) -> tuple[list[str], dict[str, str]]:
    """The ids that stand, and the reasons of the others."""
    kept, aside = cleaning.by_rule(given, INFOS, **more)
    return [each.said.id for each in kept], {each.id: each.reason for each in aside}


def test_unknown_labels_and_far_values_are_refused() -> None:
    given = [
        offer("f1", "a", "q1", label="red"), offer("f2", "a", "q2", label="teal"), offer("f3", "a", "q3", value=6.0),
        offer("f4", "a", "q4", value=900.0),
    ]  # fmt: skip
    assert rules(given) == (["f1", "f3"], {"f2": "unknown label", "f4": "value out of range"})


def test_a_new_label_may_grow_where_it_has_rows_enough() -> None:
    given = [offer(f"f{n}", "a", f"q{n}", label="teal") for n in range(3)] + [offer("f9", "a", "q9", label="pink")]
    assert rules(given, grow=True) == (["f0", "f1", "f2"], {"f9": "rare new label"})


def test_the_last_word_of_a_key_counts() -> None:
    given = [offer("f1", "a", "q", label="red"), offer("f2", "a", "q", label="blue")]
    assert rules(given) == (["f2"], {"f1": "said again"})


def test_most_keys_decide_and_a_tie_teaches_nobody() -> None:
    most = [offer(f"f{n}", key, "q", label=label) for n, (key, label) in enumerate(
        [("a", "red"), ("b", "blue"), ("c", "red")])]  # fmt: skip
    assert rules(most) == (["f0"], {"f1": "contradiction", "f2": "agrees with another"})
    assert rules(most[:2]) == ([], {"f0": "contradiction", "f1": "contradiction"})


def test_a_trusted_key_outvotes_the_others() -> None:
    given = [offer(f"f{n}", key, "q", label=label) for n, (key, label) in enumerate(
        [("a", "red"), ("b", "red"), ("c", "blue")])]  # fmt: skip
    kept, _ = rules(given, trusted=["c"])
    assert kept == ["f2"]


def test_every_piece_is_kept_or_has_a_reason() -> None:
    rng = np.random.default_rng(0)
    given = [
        offer(
            f"f{n}", str(rng.choice(list("abcd"))), f"q{rng.integers(30)}", label=str(rng.choice(["red", "blue", "x"]))
        )
        for n in range(200)
    ]
    kept, aside = cleaning.by_rule(given, INFOS)
    assert Counter([each.said.id for each in kept] + [each.id for each in aside]) == Counter(
        f"f{n}" for n in range(200)
    )
    assert len({each.question for each in kept}) == len(kept)


@pytest.mark.parametrize("usual", [0.05, 0.3])
def test_a_key_that_is_contradicted_much_more_than_others_is_suspicious(usual: float) -> None:
    rng = np.random.default_rng(1)
    found = {f"honest{n}": list(rng.random(60) < usual) for n in range(8)}
    found["poison"] = list(rng.random(50) < 0.9)
    assert set(cleaning.suspects(found)) == {"poison"}
    assert "usual is" in cleaning.suspects(found)["poison"]


def test_few_corrections_or_one_key_alone_are_not_judged() -> None:
    assert cleaning.suspects({"a": [True] * 9, "b": [False] * 50}) == {}
    assert cleaning.suspects({"a": [True] * 90}) == {}


def test_honest_keys_are_hardly_ever_set_aside() -> None:
    rng = np.random.default_rng(2)
    flagged = sum(len(cleaning.suspects({f"k{n}": list(rng.random(40) < 0.2) for n in range(10)})) for _ in range(200))
    assert flagged <= 10  # of 2,000


def test_of_a_suspicious_key_what_the_model_says_too_stays() -> None:
    given = [offer("f1", "bad", "q1", label="red"), offer("f2", "bad", "q2", label="red"),
             offer("f3", "good", "q3", label="red")]  # fmt: skip
    kept, aside = cleaning.without(given, {"f1": True, "f2": False, "f3": True}, {"bad": "words"})
    assert [each.said.id for each in kept] == ["f2", "f3"]
    assert aside == [Aside("f1", "bad", "suspicious key", "words", final=True)]


def test_what_makes_no_row_is_set_aside(make_records: Callable[..., list[Record]]) -> None:
    record = make_records(1)[0]
    said = [Said("f1", 1, "a", "wrong", {"answer": "x", "label": "red"}, {}, record),
            Said("f2", 2, "a", "other", {"answer": "x", "comment": "hm"}, {}, record),
            Said("f3", 3, "a", "wrong", {"answer": "x", "label": "red"}, {}, None)]  # fmt: skip
    made, aside = cleaning.offers(said)
    assert [each.said.id for each in made] == ["f1"]
    assert {each.id: each.reason for each in aside} == {"f2": "no right answer", "f3": "question not kept"}
