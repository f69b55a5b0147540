"""The measurement of quality: its rows are right, and its test holds nothing that training has."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from jobs import prepare
from mmagent.shards import Dataset
from tests.bench import drawings, quality, templates


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


def test_spans_of_noisy_texts_are_names_still() -> None:
    rows = told("noisy")
    assert any(not row["text"].isascii() for row in rows)
    assert any(row["text"][span["start"] - 1] in "@#" for row in rows for span in row["spans"] if span["start"])
    names = [row["text"][span["start"] : span["end"]] for row in rows for span in row["spans"]]
    assert all(name.strip() == name and name.isascii() and name[0].isalnum() for name in names)
    known = {name.lower() for part in templates._CITIES for name in part}
    places = [row["text"][s["start"] : s["end"]].lower() for row in rows for s in row["spans"] if s["label"] == "place"]
    assert 0.7 < sum(place in known for place in places) / len(places) < 1


def test_statements_say_nothing_of_drawings_by_their_words_alone() -> None:
    rows = list(drawings.rows(3000))
    said: dict[str, Counter[str]] = {}
    for row in rows:
        if row["split"] == "train":
            said.setdefault(row["text"], Counter())[row["label"]] += 1
    asked = [row for row in rows if row["split"] == "test"]
    hits = [said[row["text"]].most_common(1)[0][0] == row["label"] for row in asked if row["text"] in said]
    assert len(hits) > 200
    assert sum(hits) / len(hits) < 0.6
    assert not {row["picture"] for row in asked} & {row["picture"] for row in rows if row["split"] == "train"}


@pytest.mark.parametrize(
    ("words", "first", "true"),
    [
        ("there is a box with exactly two yellow items", 2, True),
        ("there is a box with exactly two yellow items", 3, False),
        ("there is a tower of two blocks", 2, False),
    ],
)
def test_statements_are_true_of_what_they_say(words: str, first: int, true: bool) -> None:
    """Found among many by their words, and asked of a drawing made by hand."""
    item = drawings.Item("circle", "yellow", 10, 5, 5)
    drawing = [[item._replace(y=20 * index) for index in range(first)], [item._replace(colour="blue")], []]
    rng = random.Random(0)
    claims = (rng.choice(drawings._FORMS)(rng) for _ in range(100_000))
    holds = next(test for said, test in claims if said == words)
    assert drawings._fits(words, drawing) is ("tower" not in words)
    assert holds(drawing) is (true or "tower" in words)


@pytest.mark.parametrize("kind", ["tag", "noisy", "relate", "extract"])
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
