"""What a report says of a search: its trials, the front of quality and cost, what mattered."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import proposing
from mmagent import contest, report, space
from mmagent.space import Space

SPACE = Space(
    cost="trained_parameters",
    space={
        "optim.lr": {"loguniform": [1.0e-4, 1.0e-2]},
        "model.dropout": {"uniform": [0.0, 0.4]},
        "freeze.strategy": {"choice": ["connector", {"top": {"integer": [1, 3]}}]},
    },
)
DIMS = space.dimensions(SPACE)


def trial(number: int, quality: float | None, cost: int, **changed: Any) -> dict[str, Any]:
    sample = space.spread(DIMS, 12, seed=0)[number]
    reports = [
        {"sample": sample, "metrics": {"step": step, "total_steps": 40, "score": quality * step / 40}}
        for step in (10, 20, 40)
        if quality is not None
    ]
    return {
        "id": f"t{number:03d}", "sample": sample, "quality": quality, "step": 40, "seconds": 2.0, "state": "done",
        "error": None, "trained_parameters": cost, "reports": reports, **changed,
    }  # fmt: skip


TRIALS = [
    trial(0, 0.5, 100),
    trial(1, 0.9, 400),
    trial(2, 0.8, 50),
    trial(3, 0.7, 300, state="stopped"),
    trial(4, None, 10, state="failed", error="out of memory <b>"),
]
VERDICT = {
    "trial": "t001", "sample": TRIALS[1]["sample"], "score": 0.9, "why": "t001 is 0.4 above",
    "own": {"scores": [0.5, 0.52, 0.48], "mean": 0.5, "deviation": 0.02},
}  # fmt: skip


def test_the_front_holds_what_nothing_cheaper_beats() -> None:
    assert [each["id"] for each in contest.front(TRIALS, "trained_parameters")] == ["t002", "t001"]
    assert contest.front(TRIALS, "latency_ms") == []


def test_the_sections_tell_every_trial() -> None:
    sections = contest.sections(SPACE, DIMS, TRIALS, VERDICT, 0.25, {"optim.lr": 0.7, "model.dropout": 0.3})
    page = report.page("Search s", "no test split", sections)
    for title in ("Search", "Trials", "Learning curves", "What freezing buys", "Quality and cost"):
        assert f">{title}</h2>" in page
    assert all(each["id"] in page for each in TRIALS)
    assert "t001 is 0.4 above" in page
    assert "out of memory &lt;b&gt;" in page
    assert "<b>" not in page.partition("failed: out of memory")[2][:40]
    assert "± 0.02 over 3 seeds" in page
    assert "3 to its end, 1 stopped early, 1 failed" in page
    assert "behind 25% of their steps" in page
    assert page.count("<script") == 0


def test_a_search_whose_trials_all_failed_has_a_page() -> None:
    failed = [trial(0, None, 1, state="failed", error="no room")]
    verdict = {"trial": "t000", "sample": {}, "score": 0.0, "why": "",
               "own": {"scores": [], "mean": None, "deviation": None}}  # fmt: skip
    assert contest.sections(SPACE, DIMS, failed, verdict)


def test_trials_are_compared_where_all_of_them_were() -> None:
    assert contest.at_first(TRIALS[1], 0.25) == pytest.approx(0.9 / 4)
    assert contest.at_first(TRIALS[1], 0.3) == pytest.approx(0.45)
    assert contest.at_first(TRIALS[4], 0.25) is None


def test_what_matters_is_found() -> None:
    samples = space.spread(DIMS, 40, seed=2)
    shares = proposing.importance([(sample, sample["model.dropout"]) for sample in samples], DIMS)
    assert next(iter(shares)) == "model.dropout"
    assert shares["model.dropout"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    assert "freeze.strategy:top" not in shares  # only some trials have it


def test_few_or_equal_trials_say_nothing() -> None:
    samples = space.spread(DIMS, 12, seed=2)
    assert proposing.importance([(sample, 1.0) for sample in samples], DIMS) == {}
    assert proposing.importance([(samples[0], 1.0), (samples[1], 2.0)], DIMS) == {}
