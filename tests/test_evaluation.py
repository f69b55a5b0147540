"""mmagent.evaluation: from predictions to evaluation.json, by hand."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from mmagent import comparison, evaluation, predictions
from mmagent.predictions import EvaluationError
from mmagent.targets import TaskInfo
from mmagent.tasks import Decision, make, make_all

LABELS = ("blue", "red")


def row(key: str, label: str | None, red: float, *, without: str = "", form: str | None = "text", **more: Any) -> dict:
    """A prediction: `red` is the probability of that answer."""
    return {
        "id": key,
        "group": key.split("-")[0],
        "task": "classify",
        "without": without,
        "label": label,
        "predicted": "red" if red > 0.5 else "blue",
        "truth": json.dumps(label),
        "answer": json.dumps({"label": "red" if red > 0.5 else "blue"}),
        "right": label == ("red" if red > 0.5 else "blue"),
        "confidence": max(red, 1 - red),
        "probabilities": [1 - red, red],
        "abstained": max(red, 1 - red) < 0.6,
        "error": None,
        "slice.form": form,
        **more,
    }


def failed(key: str, error: str) -> dict[str, Any]:
    about = {"id": key, "group": key, "task": "classify", "without": ""}
    return about | {"label": "red", "error": error, "slice.form": "text"}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), predictions.schema(["form"]))


def evaluate(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return judge(table(*rows), {"classify": TaskInfo("classify", LABELS)}, **more)


def judge(rows: pa.Table, infos: dict[str, TaskInfo], task: str = "classify", **more: Any) -> dict[str, Any]:
    return evaluation.evaluate(rows, make_all(infos), task, bundle="demo", data="shop", split="test", **more)


def answered(task: str, key: str, truth: Any, said: dict[str, Any], right: bool, **more: Any) -> dict[str, Any]:
    """A row of a task whose answer has no column of its own."""
    return {
        "id": key, "group": key, "task": task, "without": "", "label": str(truth), "predicted": str(said),
        "truth": json.dumps(truth), "answer": json.dumps(said), "right": right, "confidence": 0.75,
        "abstained": False, "error": None, "slice.form": "text", **more,
    }  # fmt: skip


FOUR = (
    row("1", "red", 0.9),
    row("2", "blue", 0.2),
    row("3", "red", 0.4, form="speech"),
    row("4", "blue", 0.45, form="speech"),
)


def test_the_format() -> None:
    found = evaluate(*FOUR)
    assert {key: found[key] for key in ("bundle", "data", "split", "task", "n", "errors", "unknown_labels")} == {
        "bundle": "demo",
        "data": "shop",
        "split": "test",
        "task": "classify",
        "n": 4,
        "errors": {"n": 0, "reasons": {}},
        "unknown_labels": {},
    }
    assert found["metrics"]["accuracy"]["value"] == 0.75
    assert set(found["metrics"]["accuracy"]) == {"value", "low", "high"}
    assert found["abstained"] == 0.25
    assert found["cut"] == 0
    assert evaluate(FOUR[0] | {"cut": 0}, FOUR[1] | {"cut": 7}, *FOUR[2:])["cut"] == 1
    assert found["per_class"]["blue"] == {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": 0.8, "support": 2}
    assert found["confusion"]["labels"] == ["blue", "red"]
    assert {"truth": "red", "predicted": "blue", "count": 1} in found["confusion"]["cells"]
    assert "before" not in found
    assert "blind" not in found
    json.dumps(found, allow_nan=False)  # all of it can be published


def test_each_slice_apart() -> None:
    found = evaluate(*FOUR, row("5", "red", 0.9, form=None))
    assert list(found["slices"]) == ["form=speech", "form=text"]  # a row without the key is in none
    assert found["slices"]["form=text"]["n"] == 2
    assert found["slices"]["form=text"]["metrics"]["accuracy"]["value"] == 1.0
    assert found["slices"]["form=speech"]["metrics"]["accuracy"]["value"] == 0.5


def test_a_slice_has_the_same_interval_whatever_else_is_reported() -> None:
    rows = [row(str(index), "red", 0.3 + 0.1 * (index % 5)) for index in range(60)]
    alone = evaluate(*rows)["slices"]["form=text"]
    assert evaluate(*rows, *FOUR[2:])["slices"]["form=text"] == alone


def test_rows_with_an_error_are_counted_by_reason_and_measured_in_nothing() -> None:
    found = evaluate(*FOUR, failed("5", "images[0]: cut off"), failed("6", "images[0]: cut off"))
    assert found["n"] == 4
    assert found["errors"] == {"n": 2, "reasons": {"images[0]: cut off": 2}}
    assert found["metrics"] == evaluate(*FOUR)["metrics"]


def test_without_a_modality_the_gap_is_confidence_minus_accuracy() -> None:
    blind = (
        row("1", "red", 0.7, without="image"),
        row("2", "blue", 0.7, without="image"),
        row("3", "red", 0.9, without="image", form="speech"),
    )
    found = evaluate(*FOUR, *blind)
    assert found["n"] == 4  # they count in nothing else
    assert found["blind"]["without"] == "image"
    assert found["blind"]["n"] == 3
    assert found["blind"]["gap"] == pytest.approx(abs((0.7 + 0.7 + 0.9) / 3 - 2 / 3))
    text = found["blind"]["slices"]["form=text"]
    assert text == {"n": 2, "accuracy": 0.5, "mean_confidence": pytest.approx(0.7), "gap": pytest.approx(0.2)}


def test_a_label_that_the_bundle_lacks_is_named_and_wrong() -> None:
    found = evaluate(*FOUR, row("5", "green", 0.9))
    assert found["unknown_labels"] == {"green": 1}
    assert found["unknown_rows"] == 1
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(3 / 5)
    assert found["per_class"]["green"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_compare_judges_only_what_was_asked() -> None:
    found = comparison.compare(table(*FOUR), [True, False, None, True], "a guess")
    assert found["what"] == "a guess"
    assert found["n"] == 3
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["slices"]["form=speech"]["n"] == 1
    assert evaluate(*FOUR, before={"classify": {"guess": found}})["before"]["guess"] == found


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        ((), {}, "it is empty"),
        ((failed("1", "no picture"),), {}, "1 x no picture"),
        (tuple(row | {"task": "tag", "error": "no such task"} for row in FOUR), {}, "4 x no such task"),
        (tuple(row(str(i), "red", 0.9, form=f"f{i}") for i in range(201)), {}, "has 201 values"),
    ],
)
def test_what_cannot_be_measured_says_why(rows: tuple, more: dict[str, str], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        evaluate(*rows, **more)


def test_probabilities_of_another_bundle_are_refused() -> None:
    with pytest.raises(EvaluationError, match="8 probabilities for 4 answers; 3 for each are wanted"):
        judge(table(*FOUR), {"classify": TaskInfo("classify", ("a", "b", "c"))})


def span(start: int, end: int, label: str) -> dict[str, Any]:
    return {"start": start, "end": end, "label": label, "text": "x"}


def test_tags_by_hand() -> None:
    rows = (
        answered(
            "tag", "1", [[0, 1, "city"], [4, 6, "name"]], {"spans": [span(0, 1, "city"), span(4, 5, "name")]}, False
        ),
        answered("tag", "2", [[0, 2, "name"]], {"spans": [span(0, 2, "name")]}, True),
        answered("tag", "3", [[3, 9, "river"]], {"spans": []}, False),
    )
    found = judge(table(*rows), {"tag": TaskInfo("tag", ("city", "name"))}, "tag")
    assert (found["task"], found["kind"], found["main"], found["n"]) == ("tag", "tag", "micro_f1", 3)
    # 2 of 3 said are right, of 4 that are to be found: one of a type that the bundle does not have.
    assert found["metrics"]["precision"]["value"] == pytest.approx(2 / 3)
    assert found["metrics"]["recall"]["value"] == pytest.approx(2 / 4)
    assert found["metrics"]["exact"]["value"] == pytest.approx(1 / 3)
    assert found["metrics"]["ece"]["value"] == pytest.approx(0.75 - 1 / 3)
    assert found["metrics"]["mean_confidence"]["value"] == 0.75
    assert found["unknown_labels"] == {"river": 1}
    assert found["per_class"]["river"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert found["per_class"]["name"]["f1"] == 0.5
    assert "confusion" not in found


def test_labels_by_hand() -> None:
    info = {"multilabel": TaskInfo("multilabel", ("a", "b"))}
    rows = (
        answered("multilabel", "1", ["a"], {"labels": ["a"]}, True, probabilities=[0.9, 0.1]),
        answered("multilabel", "2", ["a", "b"], {"labels": ["b"]}, False, probabilities=[0.4, 0.9]),
        answered("multilabel", "3", ["z"], {"labels": []}, False, probabilities=[0.3, 0.3]),
    )
    found = judge(table(*rows), info, "multilabel")
    assert found["metrics"]["micro_f1"]["value"] == pytest.approx(2 * 2 / (2 + 4))
    assert found["metrics"]["subset_accuracy"]["value"] == pytest.approx(1 / 3)
    assert found["unknown_labels"] == {"z": 1}
    assert found["per_class"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}


def test_numbers_have_points_and_no_calibration() -> None:
    info = {"regress": TaskInfo("regress", mean=2.0, deviation=1.0)}
    rows = [answered("regress", str(value), value, {"value": value + 0.5}, True) for value in (1.0, 2.0, 3.0)]
    found = judge(table(*rows), info, "regress")
    assert found["metrics"]["mae"]["value"] == pytest.approx(0.5)
    assert found["points"] == [[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]]
    assert not {"calibration", "coverage", "per_class", "blind"} & set(found)
    constant = comparison.compare_answers(table(*rows), make(info["regress"]), [Decision(value=2.0)] * 3, "the mean")
    assert constant["metrics"]["r2"]["value"] == pytest.approx(0.0)
    assert constant["slices"]["form=text"]["n"] == 3


def test_several_tasks_stand_side_by_side() -> None:
    infos = {"classify": TaskInfo("classify", LABELS), "regress": TaskInfo("regress", mean=0.0, deviation=1.0)}
    number = answered("regress", "n", 1.0, {"value": 1.0}, True)
    stranger = failed("s", "this bundle has no task 'tag'") | {"task": "tag"}
    found = judge(table(*FOUR, number, stranger), infos)
    assert found["task"] == "classify"
    assert set(found["tasks"]) == {"classify", "regress"}
    assert found["tasks"]["classify"]["metrics"] == found["metrics"] == evaluate(*FOUR)["metrics"]
    assert found["errors"]["n"] == 0
    assert found["unanswered"] == {"tag": {"n": 1, "reasons": {"this bundle has no task 'tag'": 1}}}
    assert list(evaluation.blocks(found)) == ["classify", "regress"]
    assert judge(table(number), infos)["task"] == "regress"  # the bundle's own task was not asked
