"""The measurement of quality: its rows are right, and its test holds nothing that training has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import prepare
from mmagent.shards import Dataset
from tests.bench import quality, templates


def told(kind: str, count: int = 200) -> list[templates.Row]:
    return list(templates.rows(kind, count))


def test_spans_are_names_of_their_kind() -> None:
    rows = told("tag")
    named = {(span["label"], row["text"][span["start"] : span["end"]]) for row in rows for span in row["spans"]}
    assert {kind for kind, _ in named} == {"person", "place", "firm"}
    places = {name for kind, name in named if kind == "place"}
    assert places == {name for part in templates._CITIES for name in part}


@pytest.mark.parametrize("kind", ["tag", "relate"])
def test_names_of_the_test_are_not_in_training(kind: str) -> None:
    rows = told(kind)
    held = [*templates._PEOPLE[1], *templates._SURNAMES[1], *templates._CITIES[1], *templates._FIRMS[1]]
    known = " ".join(row["text"] for row in rows if row["split"] != "test").replace("<e", " <e")
    asked = " ".join(row["text"] for row in rows if row["split"] == "test")
    assert not [name for name in held if name in known]
    assert sum(name in asked for name in held) > 5


def test_answers_stand_where_they_are_said_to() -> None:
    rows = told("extract")
    none = [row for row in rows if not row["answers"]]
    assert 0.1 < len(none) / len(rows) < 0.3
    for row in rows:
        for answer in row["answers"]:
            start = answer["answer_start"]
            assert row["context"][start : start + len(answer["text"])] == answer["text"]


@pytest.mark.parametrize("kind", ["tag", "relate", "extract"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_row_can_be_used(storage: Path, kind: str, shuffled: bool) -> None:
    rows = told(kind, 60)
    if shuffled:
        rows = list(quality._shuffled(rows))
    (storage / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare.main(["--source", f"jsonl:{storage / 'rows.jsonl'}", "--name", "rows", "--workers", "1"]) == 0
    dataset = Dataset.open(storage / "data" / "rows")
    assert {split: dataset.rows(split) for split in ("train", "validation", "test")} == {
        "train": 60, "validation": 6, "test": 12,
    }  # fmt: skip


def test_only_training_is_shuffled() -> None:
    rows = told("relate")
    mixed = list(quality._shuffled(rows))
    assert [row for row in mixed if row["split"] == "test"] == [row for row in rows if row["split"] == "test"]
    train = [row for row in mixed if row["split"] == "train"]
    same = sum(a["label"] == b["label"] for a, b in zip(train, rows, strict=False))
    assert same < 0.5 * len(train)
    assert sorted(row["text"] for row in train) == sorted(row["text"] for row in rows if row["split"] == "train")


def test_the_same_seed_makes_the_same_rows() -> None:
    assert told("extract") == told("extract")
    assert told("extract") != list(templates.rows("extract", 200, seed=1))


def test_pictures_are_split_without_overlap() -> None:
    case = quality._pictures()
    count = {split: sum(row["split"] == split for row in case.rows) for split in ("train", "validation", "test")}
    assert sum(count.values()) == 1797
    assert count["train"] == int(1797 * 0.7)
    assert case.reference is not None
    assert case.reference > 95
    assert 8 < case.chance < 14
