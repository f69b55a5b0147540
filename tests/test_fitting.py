"""The largest micro-batch that fits: found by trial, kept by a run that goes on, told with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs import fitting, run, vigil
from jobs.checkpoint import Checkpoints
from jobs.supervised import Supervised
from mmagent import config as configs
from mmagent import defaults
from mmagent import storage as storages
from mmagent.config import resolve
from mmagent.record import Message, Record
from mmagent.shards import Dataset


@pytest.fixture
def dataset(storage: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]]) -> Dataset:
    records = make_records(40)
    said = records[17].messages[0]
    records[17] = replace(records[17], messages=(Message(said.role, said.content + " is it red?" * 20),))
    return make_dataset(storage / "data" / "tiny", {"train": records, "validation": make_records(8, "validation")})


def test_the_longest_rows_are_found_and_repeated_where_there_are_few(dataset: Dataset) -> None:
    rows = fitting.longest_rows(dataset, 64)
    assert len(rows) == 64
    spoken = [bool(row) for row in rows["audios"].to_pylist()[:40]]
    assert spoken == sorted(spoken, reverse=True)  # picture and sound before picture and words
    written = [row["content"] for messages in rows["messages"].to_pylist()[:40] for row in messages]
    assert len(written[0]) == max(len(text) for text, sound in zip(written, spoken, strict=True) if sound)


@pytest.mark.long
def test_memory_decides_and_a_step_keeps_its_samples(dataset: Dataset, tiny_recipe: dict[str, Any]) -> None:
    """A real trial in a process of its own: with the machine's memory all 32 samples fit into one pass."""
    config = resolve(tiny_recipe, {"train.micro_batch": "auto"})
    assert config.train.micro_batch == 0
    prepared = run.prepare(config, storages.folder("runs", "fitted"))
    train = prepared.config.train
    assert (train.micro_batch, train.accumulation) == (32, 1)
    (note,) = [line for line in prepared.notes if line.startswith("train.micro_batch")]
    assert "train.micro_batch=32 train.accumulation=1: 32 of the longest rows take 0." in note
    written = yaml.safe_load((prepared.folder / "config.yaml").read_text())
    assert written["train"]["micro_batch"] == 32

    # A run that goes on keeps its own, whatever is free now.
    state = {"step": 3, "score": 0.5, "loss": 1.0, "position": {"epoch": 0, "window": 0, "row": 24}}
    Checkpoints(prepared.folder / "checkpoints", rank=0, barrier=bool, keep_last=1).save(
        lambda path: (path / "part").touch(), state
    )
    again = run.prepare(config, prepared.folder)
    assert again.config == prepared.config
    assert any("as the run began" in line for line in again.notes)


def test_the_last_size_that_came_through_is_taken(tiny_recipe: dict[str, Any]) -> None:
    config = resolve(tiny_recipe, {"train.micro_batch": "auto", "train.accumulation": 3, "cluster.workers": 2})
    found, why = fitting.largest(config, 1 << 30, [(1, 500 << 20), (2, 600 << 20), (4, 800 << 20)])
    assert (found.train.micro_batch, found.train.accumulation) == (4, 24)
    assert found.global_batch == 2 * 96
    assert why.endswith("4 of the longest rows take 0.78 of the 1.00 GiB that a worker may")
    with pytest.raises(fitting.FitError, match="not even one sample fits into the "):
        fitting.largest(config, 1 << 20, [])


def test_a_trial_stops_before_what_it_may_not_take(
    dataset: Dataset, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """In this process, whose memory is more than the budget already."""

    config, _ = defaults.settle(resolve(tiny_recipe, {"train.micro_batch": 4}), dataset)
    file = tmp_path / "longest.parquet"
    pq.write_table(fitting.longest_rows(dataset, 8), file)
    plan = fitting._plan(config, Supervised, defaults.described(config, dataset), dataset, file)
    assert list(fitting._try(plan, file, 8, budget=1 << 20)) == []
    sizes = [size for size, _ in fitting._try(plan, file, 8, budget=vigil.free_bytes())]
    assert sizes == [1, 2, 4, 8]


def test_auto_is_said_in_a_word_and_nothing_else(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(configs.ConfigError, match=r"train\.micro_batch: got 'most'"):
        resolve(tiny_recipe, {"train.micro_batch": "most"})
