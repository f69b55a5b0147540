"""What a user takes back is gone: from segments, from data sets of refits, from memories; the rest stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import forget, replay
from mmagent import bundle, feedback
from mmagent.record import Record
from mmagent.shards import Dataset, ShardWriter
from tests.test_feedback import line


def test_rows_of_an_answer_are_removed_everywhere(
    storage: Path, tiny_bundle: Path, make_dataset: Callable[..., Dataset],
    make_records: Callable[..., list[Record]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    records = make_records(12)
    place = feedback.folder()
    place.mkdir(parents=True)
    old = place / "2026-01-01.a.jsonl"
    old.write_text(
        "".join(json.dumps(line(f"fb_{n}", each, {"label": "red"})) + "\n" for n, each in enumerate(records))
    )
    said = [replace(each, id=f"fb_{n}", meta={"answer": f"ans_fb_{n}"}) for n, each in enumerate(records)]
    made = make_dataset(storage / "data" / "production-r001", {"train": said[:8], "validation": said[8:]})
    info = {**made.info, "recipe": {"bases": [], "feedback": []}}
    (made.path / "dataset.json").write_text(json.dumps(info))
    home = storage / "runs" / "production-r001" / "bundle"
    shutil.copytree(tiny_bundle, home)
    bundle.add(home, {replay.MEMORY: replay.remembered([Dataset.open(made.path)], 8, 0)})
    assert forget.main(["--answer", "ans_fb_3", "--answer", "ans_fb_9"]) == 0
    told = capsys.readouterr().out
    assert "removed 2 lines of feedback and 3 rows of data sets and memories" in told
    assert "learned from it: data set production-r001" in told
    kept = [json.loads(row)["feedback"]["answer"] for row in old.read_text().splitlines()]
    assert kept == [f"ans_fb_{n}" for n in range(12) if n not in (3, 9)]
    again = Dataset.open(made.path)
    assert (again.rows("train"), again.rows("validation")) == (7, 3)
    rows = [row for split in again.splits for part in again.read(split) for row in part.to_pylist()]
    assert {dict(row["meta"])["answer"] for row in rows} == {f"ans_fb_{n}" for n in range(12) if n not in (3, 9)}
    assert len(list((made.path).rglob("*.parquet"))) == 2  # the old shards are off the disk
    memory = pq.read_table(bundle.load(home).path / replay.MEMORY).to_pylist()
    assert "ans_fb_3" not in {dict(row["meta"])["answer"] for row in memory}
    assert len(memory) == 7
    assert forget.forget() == (0, 0, [])


def test_epochs_have_as_many_rows_still(
    storage: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]]
) -> None:
    said = [replace(each, meta={"answer": f"ans_{each.id}"}) for each in make_records(12)]
    made = make_dataset(storage / "data" / "production-r001", {"train": said, "validation": said[:2]})
    with ShardWriter(made.path, "turns") as writer:
        for turn, part in ((None, said[:4]), (0, said[4:8]), (1, said[8:])):
            for record in part:
                writer.add(record)
            writer.cut(turn)
        splits = {**made.info["splits"], "train": {"rows": 12, "shards": writer.close()}}
    info = {**made.info, "splits": splits, "recipe": {"bases": [], "feedback": []}}
    (made.path / "dataset.json").write_text(json.dumps(info))
    assert forget.main(["--answer", "ans_train-1", "--answer", "ans_train-5"]) == 0
    again = Dataset.open(made.path)
    always, turns = again.turns("train")
    rows = [[row["id"] for file in files for row in pq.read_table(file).to_pylist()] for files in (always, *turns)]
    assert [*map(len, rows)] == [3, 3, 3]
    assert "train-5" not in rows[1]
    assert again.rows("train") == 9


def test_nothing_to_forget(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forget.main([]) == 0
    assert "removed 0 lines" in capsys.readouterr().out


def test_todays_segment_waits_for_tomorrow(storage: Path, make_records: Callable[..., list[Record]]) -> None:
    import time

    place = feedback.folder()
    place.mkdir(parents=True)
    file = place / f"{time.strftime('%Y-%m-%d', time.gmtime())}.a.jsonl"
    file.write_text(json.dumps(line("fb_0", make_records(1)[0], {"label": "red"})) + "\n")
    forget.mark("ans_fb_0")
    assert forget.forget() == (0, 0, [])
    assert feedback.read(place).said == ()  # nobody reads it, all the same
