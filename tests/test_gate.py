"""The gate's rules: paired intervals, slices, new questions, calibration; what passes and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmagent import gate, predictions
from mmagent.config import ConfigError
from mmagent.gate import Rules
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all


def table(right: dict[str, np.ndarray], *, labels: int = 2, sure: float = 0.9, without: str = "") -> pa.Table:
    """Predictions of sets of questions: whether each is answered rightly."""
    rows: list[dict[str, Any]] = []
    for name, found in right.items():
        for index, fine in enumerate(found):
            row = {
                "set": name, "id": str(index), "group": str(index // 2), "task": "classify", "without": without,
                "label": f"l{index % labels}", "right": bool(fine), "confidence": sure,
                "slice.modalities": "text" if index % 3 else "text+image",
            }  # fmt: skip
            rows.append(row)
    schema = predictions.schema(("modalities",)).append(pa.field("set", pa.string()))
    return pa.Table.from_pylist(rows, schema)


def answers(share: float, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


def checks(before: pa.Table, after: pa.Table, **rules: Any) -> dict[str, gate.Check]:
    return {each.name: each for each in gate.compare(before, after, Rules(**rules))}


def test_the_same_answers_pass() -> None:
    one = table({gate.FIXED: answers(0.9, 600, 0), gate.NEW: answers(0.5, 100, 1)})
    found = checks(one, one)
    assert gate.passed(list(found.values()))
    assert (found["fixed"].before, found["fixed"].low, found["fixed"].high) == (found["fixed"].after, 0.0, 0.0)


def test_a_loss_that_is_sure_is_refused_and_one_that_may_be_chance_is_not() -> None:
    fine = answers(0.95, 1000, 0)
    worse = fine & ~answers(0.06, 1000, 2)
    assert checks(table({gate.FIXED: fine}), table({gate.FIXED: worse}))["fixed"].passed is False
    few, fewer = np.arange(60) >= 6, np.arange(60) >= 8
    assert checks(table({gate.FIXED: few}), table({gate.FIXED: fewer}))["fixed"].passed is True


def test_one_class_that_is_forgotten_is_found_though_the_whole_is_better() -> None:
    was = answers(0.8, 1000, 0)
    now = np.ones(1000, bool)
    place = np.arange(1000) % 10 == 3
    was[place], now[place] = True, answers(0.6, 100, 1)
    found = checks(table({gate.FIXED: was}, labels=10), table({gate.FIXED: now}, labels=10))
    assert found["fixed"].after > found["fixed"].before
    assert [name for name, each in found.items() if each.passed is False and "modalities" not in name] == [
        "fixed, classify=l3"
    ]


def test_the_interval_is_that_of_a_paired_bootstrap_over_groups() -> None:
    """Two questions a group that change together: the interval is that of half as many questions."""
    was = np.zeros(400, bool)
    now = np.repeat(answers(0.5, 200, 5), 2)
    found = checks(table({gate.FIXED: was}), table({gate.FIXED: now}))["fixed"]
    deviation = float(np.sqrt(now.mean() * (1 - now.mean()) / 200))
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_new_questions_have_to_gain_where_there_are_enough() -> None:
    fixed = answers(0.9, 200, 0)
    was, now = answers(0.2, 100, 1), answers(0.9, 100, 2)
    before, after = table({gate.FIXED: fixed, gate.NEW: was}), table({gate.FIXED: fixed, gate.NEW: now})
    assert checks(before, after, min_gain=0.5)["new"].passed is True
    assert checks(after, before)["new"].passed is False
    few = table({gate.NEW: was[:10]})
    assert checks(few, few)["new"].passed is None


def test_calibration_and_missing_modalities_are_judged() -> None:
    fine = answers(0.9, 500, 0)
    before, after = table({gate.FIXED: fine}), table({gate.FIXED: fine}, sure=0.6)
    assert checks(before, after)["fixed, calibration error"].passed is False
    blind = table({gate.FIXED: answers(0.8, 500, 1)}, without="image")
    blinder = table({gate.FIXED: answers(0.4, 500, 2)}, without="image")
    pair = pa.concat_tables([before, blind]), pa.concat_tables([before, blinder])
    assert checks(*pair)["fixed, without image"].passed is None
    assert checks(*pair, max_blind_loss=0.1)["fixed, without image"].passed is False


def test_noisy_questions_are_told_and_judged_by_a_rule() -> None:
    fine = table({gate.FIXED: answers(0.9, 500, 0)})
    was, now = (table({gate.FIXED: answers(share, 300, 1)}, without=f"{gate.NOISY}image") for share in (0.8, 0.5))
    pair = pa.concat_tables([fine, was]), pa.concat_tables([fine, now])
    assert checks(*pair)["fixed, with noisy image"].passed is None
    assert checks(*pair, max_noisy_loss=0.1)["fixed, with noisy image"].passed is False
    assert checks(*pair, max_noisy_loss=0.6)["fixed, with noisy image"].passed is True
    assert not any("without noisy" in name for name in checks(*pair))


def grouped(shares: dict[str, float]) -> pa.Table:
    """Right answers by a slice column of groups, of one label each second time."""
    rows = []
    for seed, (group, share) in enumerate(shares.items()):
        for index, fine in enumerate(answers(share, 300, seed)):
            label = f"l{index % 2}"
            row = {
                "set": gate.FIXED, "id": f"{group}{index}", "group": f"{group}{index}", "task": "classify",
                "without": "", "label": label, "predicted": label if fine else "l2", "right": bool(fine),
                "slice.region": group,
            }  # fmt: skip
            rows.append(row)
    schema = predictions.schema(("region",)).append(pa.field("set", pa.string()))
    return pa.Table.from_pylist(rows, schema)


def test_a_gap_between_groups_can_stand_in_the_rules() -> None:
    tasks = make_all({"classify": TaskInfo("classify", ("l0", "l1", "l2"))})
    before, after = grouped({"north": 0.9, "south": 0.9}), grouped({"north": 0.95, "south": 0.6})

    def found(now: pa.Table, most: float | None) -> gate.Check:
        rules = Rules(slices=("modalities", "region"), max_gap=most)
        each = {one.name: one for one in gate.gaps(before, now, tasks, rules)}
        assert len(each) == 3  # accuracy, demographic parity, equalized odds
        return each["fixed, classify, gap of accuracy between groups of region"]

    assert (found(after, 0.1).passed, found(after, 0.5).passed, found(after, None).passed) == (False, True, None)
    assert found(before, 0.1).passed is True
    assert found(after, 0.1).after == pytest.approx(0.35, abs=0.08)


def test_what_should_be_small_is_refused_where_that_is_sure() -> None:
    number = {"value": 0.1, "low": 0.06, "high": 0.14}
    made = [gate.bounded("n", 50, 0.02, number, most, "max_swapped").passed for most in (0.05, 0.08, None)]
    assert made == [False, True, None]


def test_a_slower_answer_is_refused() -> None:
    assert gate.slower(10.0, 14.0, Rules()).passed is True
    assert gate.slower(10.0, 16.0, Rules()).passed is False


def test_without_questions_nothing_is_accepted() -> None:
    nothing = table({})
    [found] = gate.compare(nothing, nothing, Rules())
    assert found.passed is False
    assert "questions to judge by" in found.rule


def test_different_questions_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="different questions"):
        gate.compare(table({gate.FIXED: np.ones(3, bool)}), table({gate.NEW: np.ones(3, bool)}), Rules())


def test_answers_that_changed_sides() -> None:
    was, now = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    found = gate.flips(table({gate.FIXED: was}), table({gate.FIXED: now}))
    assert found == {("fixed", "1"): "wrong now, right before", ("fixed", "2"): "right now, wrong before"}


def test_rules_are_read_and_mistakes_told(tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text("max_loss: 0.1\n")
    assert gate.load(file).max_loss == 0.1
    for words, text in (
        ("did you mean 'max_loss'", "max_los: 1"),
        ("greater than", "min_rows: 0"),
        ("not YAML", "a: ["),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            gate.load(file)
    file.write_text("swap: words.csv")
    assert gate.load(file).swap == str(tmp_path / "words.csv")
    with pytest.raises(ConfigError, match="cannot read"):
        gate.load(tmp_path / "nowhere.yaml")


def test_the_shipped_rules_are_the_defaults() -> None:
    from jobs.refine import RULES

    assert gate.load(RULES) == Rules()
