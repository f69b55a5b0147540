"""The cut: stratified where rows have one label, stable, and never a label that training has not."""

from __future__ import annotations

from collections import Counter

import pytest

from jobs.sources.cut import Cut
from mmagent.record import Record, Target

SHARES = {"validation": 0.1, "test": 0.1}


def rows(labels: list[str], group: str = "") -> list[Record]:
    meta = {"group": group} if group else {}
    return [Record(str(index), (), target=Target(label=label), meta=meta) for index, label in enumerate(labels)]


def test_each_label_is_cut_by_its_shares() -> None:
    cut = Cut(0, SHARES, set())
    records = rows([f"c{index % 7}" for index in range(7 * 203)])
    counts = Counter((record.target.label, cut.split_of(record)) for record in records)
    for label in {record.target.label for record in records}:
        assert abs(counts[label, "validation"] - 20) <= 2
        assert abs(counts[label, "test"] - 20) <= 2


def test_ten_thousand_classes_of_three_rows_are_all_in_training() -> None:
    cut = Cut(0, SHARES, set())
    records = rows([f"c{index % 10_000}" for index in range(30_000)])
    splits: dict[str, set[str | None]] = {split: set() for split in ("train", "validation", "test")}
    for record in records:
        splits[cut.split_of(record)].add(record.target.label)
    assert len(splits["train"]) == 10_000
    assert all(1500 < len(splits[split]) < 2500 for split in SHARES)


def test_the_only_row_of_a_label_stays_in_training() -> None:
    for seed in range(50):
        cut = Cut(seed, {"validation": 0.45, "test": 0.45}, set())
        for kind, target in (
            ("classify", Target(label="rare")),
            ("multilabel", Target(labels=("common", "rare"))),
            ("tag", Target(spans=({"start": 0, "end": 1, "label": "rare"},))),
        ):
            assert cut.split_of(Record("1", (), task=kind, target=target)) == "train"


def test_rows_added_at_the_end_move_none() -> None:
    labels = [f"c{index * index % 5}" for index in range(400)]
    one, other = Cut(3, SHARES, set()), Cut(3, SHARES, set())
    before = [one.split_of(record) for record in rows(labels)]
    assert [other.split_of(record) for record in rows([*labels, "new"] * 2)][:400] == before
    assert before != [Cut(4, SHARES, set()).split_of(record) for record in rows(labels)]


@pytest.mark.parametrize("task", ["regress", "generate"])
def test_without_labels_a_hash_of_the_id_chooses(task: str) -> None:
    cut = Cut(0, SHARES, set())
    counts = Counter(cut.split_of(Record(str(index), (), task=task)) for index in range(4000))
    assert all(abs(counts[split] - 400) < 80 for split in SHARES)


def test_named_splits_and_groups_stay_as_they_are() -> None:
    cut = Cut(0, SHARES, {"test"})
    assert cut.splits == ("validation",)
    assert cut.split_of(Record("1", (), split="test", target=Target(label="new"))) == "test"
    grouped = rows(["a", "b"] * 200, group="g")
    assert len({cut.split_of(record) for record in grouped}) == 1
