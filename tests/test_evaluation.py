"""mmagent.evaluation: from predictions to evaluation.json, by hand."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from mmagent import evaluation
from mmagent.evaluation import EvaluationError

LABELS = ("blue", "red")


def row(key: str, label: str | None, red: float, *, without: str = "", form: str | None = "text", **more: Any) -> dict:
    """A prediction: `red` is the probability of that answer."""
    return {
        "id": key,
        "group": key.split("-")[0],
        "without": without,
        "label": label,
        "predicted": "red" if red > 0.5 else "blue",
        "confidence": max(red, 1 - red),
        "probabilities": [1 - red, red],
        "abstained": max(red, 1 - red) < 0.6,
        "error": None,
        "slice.form": form,
        **more,
    }


def failed(key: str, error: str) -> dict[str, Any]:
    return {"id": key, "group": key, "without": "", "label": "red", "error": error, "slice.form": "text"}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), evaluation.schema(["form"]))


def evaluate(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return evaluation.evaluate(table(*rows), LABELS, bundle="demo", data="shop", split="test", **more)


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
        "unknown_labels": [],
    }
    assert found["metrics"]["accuracy"]["value"] == 0.75
    assert set(found["metrics"]["accuracy"]) == {"value", "low", "high"}
    assert found["abstained"] == 0.25
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
    assert found["unknown_labels"] == ["green"]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(3 / 5)
    assert found["per_class"]["green"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_compare_judges_only_what_was_asked() -> None:
    found = evaluation.compare(table(*FOUR), [True, False, None, True], "a guess")
    assert found["what"] == "a guess"
    assert found["n"] == 3
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["slices"]["form=speech"]["n"] == 1
    assert evaluate(*FOUR, before={"guess": found})["before"]["guess"] == found


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        ((), {}, "it is empty"),
        ((failed("1", "no picture"),), {}, "1 x no picture"),
        (FOUR, {"task": "tag"}, "metrics exist for classify"),
        (tuple(row(str(i), "red", 0.9, form=f"f{i}") for i in range(201)), {}, "has 201 values"),
    ],
)
def test_what_cannot_be_measured_says_why(rows: tuple, more: dict[str, str], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        evaluate(*rows, **more)


def test_probabilities_of_another_bundle_are_refused() -> None:
    with pytest.raises(EvaluationError, match="8 probabilities for 4 answers; 3 for each are wanted"):
        evaluation.evaluate(table(*FOUR), ("a", "b", "c"), bundle="demo", data="shop", split="test")
