"""What a refit shows again: balanced by class and kind of input, of the whole line of data sets, or of the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import replay, rounds
from mmagent import bundle, storage
from mmagent.record import Record
from mmagent.shards import Dataset

Make = Callable[..., Dataset]


@pytest.fixture
def skewed(storage: Path, make_dataset: Make, make_records: Callable[..., list[Record]]) -> Dataset:
    """Eight times as many red rows as of each other colour."""
    rows = make_records(64)
    rows += [replace(each, id=f"{each.id}-{n}") for n in range(7) for each in rows if each.target.label == "red"]
    return make_dataset(storage / "data" / "tiny", {"train": rows, "validation": make_records(8, "validation")})


def test_a_draw_is_balanced_and_a_function_of_the_seed(skewed: Dataset) -> None:
    found = replay.draw([skewed], "train", 40, 0)
    kinds = Counter((record.target.label, record.modalities) for record in found)
    assert len(kinds) == 8
    assert set(kinds.values()) == {5}
    assert len({record.id for record in found}) == 40
    assert all(media.bytes for record in found for media in record.media())
    assert [each.id for each in replay.draw([skewed], "train", 40, 0)] == [each.id for each in found]
    assert [each.id for each in replay.draw([skewed], "train", 40, 1)] != [each.id for each in found]


def test_a_draw_of_more_than_there_is_gives_all(skewed: Dataset) -> None:
    assert len(replay.draw([skewed], "validation", 10**9, 0)) == 8
    assert replay.draw([skewed], "test", 5, 0) == []


def test_the_line_of_a_refitted_bundle(
    skewed: Dataset, storage: Path, tiny_bundle: Path, make_dataset: Make, make_records: Callable[..., list[Record]]
) -> None:
    """Its own data set gives its new rows alone; what it replayed stands in the one before."""
    new = [replace(each, id=f"new-{each.id}", meta={"source": "feedback"}) for each in make_records(4)]
    rows = [*new, *replay.again(make_records(12), "train")]
    own = make_dataset(storage / "data" / "line-r001", {"train": rows, "validation": rows[:2]})
    info = {**own.info, "recipe": {"bases": ["tiny", "lost"], "feedback": ["fb_1", "fb_2"]}}
    storages_publish(own.path / "dataset.json", info)
    found = bundle.load(tiny_bundle)
    refitted = replace(found, manifest={**found.manifest, "data": "line-r001"})
    there, gone = replay.sources(refitted)
    assert ([each.name for each in there], gone) == (["line-r001", "tiny"], ["lost"])
    assert replay.feedback_used(refitted) == {"fb_1", "fb_2"}
    assert replay.feedback_used(found) == set()
    half = replay.draw(there, "train", 8, 0)
    assert sum(record.meta.get("source") == "feedback" for record in half) == 4
    drawn = {record.id for record in replay.draw(there, "train", 10**9, 0)}
    assert {each.id for each in new} <= drawn
    assert len(drawn) == 4 + skewed.rows("train")


def test_a_memory_in_a_bundle(skewed: Dataset, tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    own = shutil.copytree(tiny_bundle, tmp_path / "own")
    assert replay.memory(bundle.load(own)) == []
    parts, again = rounds._replayed([skewed], [], 24, 3, 0)
    assert ([*map(len, again)], len(parts["validation"])) == ([24, 24, 24], 8)
    assert len({frozenset(each.id for each in turn) for turn in again}) == 3
    bundle.add(own, {replay.MEMORY: replay.remembered([skewed], 16, 0)})
    found = replay.memory(bundle.load(own))
    parts, again = rounds._replayed([], found, 24, 3, 0)
    assert ([*map(len, again)], len(parts["validation"]), len(parts["test"])) == ([12], 4, 0)  # there are no others
    assert {each.meta["source"] for each in again[0]} == {"replay"}
    assert Counter(record.target.label for record in found) == Counter(dict.fromkeys("red green blue black".split(), 4))
    assert all(media.bytes for record in found for media in record.media())


def storages_publish(file: Path, value: object) -> None:
    storage.publish_json(file, value)
