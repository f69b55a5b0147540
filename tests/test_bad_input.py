"""Bad input as a user meets it, from the file to the first step: told in one message, or set aside and counted."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from jobs import cluster, prepare, run, train
from jobs.supervised import Batches
from mmagent import text
from mmagent.batch import Inputs
from mmagent.config import Config, resolve
from mmagent.frozen import FrozenStates
from mmagent.record import Record, Target
from mmagent.rows import parse
from mmagent.shards import Dataset
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all


def command(storage: Path, rows: Sequence[dict[str, Any]], *flags: str, name: str = "d") -> int:
    file = storage / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare.main(["--source", f"jsonl:{file}", "--name", name, "--workers", "1", *flags])


def good(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"good-{i}", "text": f"say {i}", "label": "ab"[i % 2], **more} for i in range(count)]


def test_each_bad_row_is_set_aside_with_its_reason(
    storage: Path, make_png: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (storage / "red.png").write_bytes(make_png())
    asked = {"role": "user", "content": "<image> what is it?"}
    bad: list[dict[str, Any]] = [
        {"text": "no answer"},
        {"text": "no answer", "label": None},
        {"text": "", "label": "a"},
        {"text": "NaN", "label": float("nan")},
        {"messages": [asked], "label": "a"},
        {"text": "out", "task": "tag", "spans": [{"start": 2, "end": 9, "label": "x"}]},
        {"text": "NaN", "task": "regress", "value": float("nan")},
        {"text": "no number", "task": "regress", "value": "many"},
        {"text": "weight", "label": "a", "weight": float("nan")},
        {"image": base64.b64encode(b"no picture").decode(), "label": "a"},
    ]
    # The reverse of a placeholder without its picture is none: the placeholder is put in.
    fine = [{"text": "a picture without a placeholder", "image": "red.png", "label": "a"}]
    rows = [*good(60), *fine, *({"id": f"bad-{i}", **row} for i, row in enumerate(bad))]
    assert command(storage, rows) == 2  # more than one in a hundred
    assert "--max-bad-share" in capsys.readouterr().err
    assert not (storage / "data" / "d").exists()
    assert command(storage, rows, "--max-bad-share", "0.2") == 0
    dataset = Dataset.open(storage / "data" / "d")
    aside = dataset.info["quarantine"]
    assert aside["rows"] == len(bad), aside["reasons"]
    assert sum(dataset.rows(split) for split in dataset.splits) == 61
    shown = capsys.readouterr().out
    assert "set aside" in shown
    assert {"no label": 2, "empty text": 1, "span outside the text": 1}.items() <= aside["reasons"].items()
    kept = [
        Record.from_row(row) for split in dataset.splits for part in dataset.read(split) for row in part.to_pylist()
    ]
    [seen] = [record for record in kept if record.images]
    assert seen.messages[0].content.startswith("<image>")


def test_a_label_of_the_test_alone_is_told_with_its_row(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*good(20, split="train"), *good(4, split="validation"), {"text": "x", "label": "new", "split": "test"}]
    for index, row in enumerate(rows):
        row["id"] = str(index)
    assert command(storage, rows) == 2
    assert (
        "d.jsonl row 25: the label 'new' of classify is in test, but training never has it" in capsys.readouterr().err
    )


def test_a_class_of_one_sample_is_trained_on_and_said(
    storage: Path, tiny_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(storage, [*good(40), {"id": "one", "text": "alone", "label": "alone"}]) == 0
    assert "1 of 3 labels of classify occur once in training: 'alone'" in capsys.readouterr().out
    prepared = run.prepare(resolve(tiny_recipe, {"data.name": "d"}), storage / "runs" / "r")
    assert prepared.plan.tasks["classify"].labels == ("a", "alone", "b")
    few = run.prepare(resolve(tiny_recipe, {"data.name": "d", "data.labels_per_class": 3}), storage / "runs" / "few")
    assert few.plan.tasks["classify"].counts == {"a": 3, "alone": 1, "b": 3}


def test_a_class_for_each_row_leaves_nothing_to_measure_by(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(storage, [{"text": f"say {i}", "label": f"label {i}"} for i in range(50)]) == 2
    assert "each label has one row, which stays in training" in capsys.readouterr().err


def batches(config: Config, tiny_backbone: Path, infos: dict[str, TaskInfo]) -> Batches:
    tokenizer, encoder = text.load_tokenizer(str(tiny_backbone)), text.load_encoder(str(tiny_backbone))
    inputs = Inputs(config.model, config.data, tokenizer, make_all(infos))
    return Batches(inputs, FrozenStates(encoder), config, {}, torch.device("cpu"))


def as_streamed(record: Record) -> dict[str, Any]:
    return record.to_row() | {"ids": [2, 5, 3], "cut": 0, "epoch": 0, "micro": 0, "weight": 1.0}


@pytest.mark.parametrize(
    ("task", "target", "words"),
    [
        ("classify", Target(), "the row has no label"),
        ("regress", Target(value=float("nan")), "a finite number is wanted"),
        ("tag", Target(spans=({"start": 1, "end": 99, "label": "x"},)), "1..99, but the text has 5 characters"),
    ],
)
def test_a_shard_made_by_other_hands_is_checked_row_by_row(
    tiny_recipe: dict[str, Any], tiny_backbone: Path, task: str, target: Target, words: str
) -> None:
    """What `jobs.prepare` would have set aside weighs nothing, and is counted: see `data.max_bad_share`."""
    infos = {task: TaskInfo(task, ("x", "y"), mean=0.0, deviation=1.0)}
    made = batches(resolve(tiny_recipe, {}), tiny_backbone, infos)
    whole = {"classify": Target(label="x"), "regress": Target(value=1.0), "tag": Target(spans=())}[task]
    record = replace(parse({"id": "7", "text": "hello"}), task=task)
    rows = [as_streamed(replace(record, target=target)), as_streamed(replace(record, target=whole))]
    [(micros, bad, _)] = made.steps(iter([pa.Table.from_pylist(rows)]))
    assert bad == 1
    assert micros[0]["weight"].tolist() == [0.0, 1.0]
    assert "row '7'" in made.last_error
    assert words in made.last_error
    shape = {"classify": (2, 2), "regress": (2, 1), "tag": (*micros[0]["ids"].shape, 5)}[task]
    loss = make_all(infos)[task].loss(torch.zeros(shape), micros[0], 2, 0.0)
    assert np.isfinite(float(loss))


CLASSES = 10_000


def ten_thousand(storage: Path) -> int:
    rows = [
        {"id": f"{split}{i}", "text": f"item {i}", "label": f"label {i}", "split": split}
        for split, count in (("train", CLASSES), ("validation", 50), ("test", 50)) for i in range(count)
    ]  # fmt: skip
    return command(storage, rows)


def test_ten_thousand_classes(storage: Path, tiny_recipe: dict[str, Any], tiny_backbone: Path) -> None:
    """The data set, the draw, the model and a batch."""
    assert ten_thousand(storage) == 0
    settings = {"data.name": "d", "model.image": None, "model.audio": None, "data.labels_per_class": 1}
    prepared = run.prepare(resolve(tiny_recipe, settings), storage / "runs" / "r")
    info = prepared.plan.tasks["classify"]
    assert len(info.labels) == CLASSES
    assert prepared.plan.order.rows == CLASSES
    made = batches(prepared.config, tiny_backbone, {"classify": info})
    part = next(prepared.dataset.read("train")).to_pylist()[:8]
    streamed = [as_streamed(Record.from_row(row)) for row in part]
    [(micros, bad, _)] = made.steps(iter([pa.Table.from_pylist(streamed)]))
    assert bad == 0
    task = make_all({"classify": info})["classify"]
    logits = torch.zeros(8, CLASSES)
    assert float(task.loss(logits, micros[0], 8, 0.0)) == pytest.approx(np.log(CLASSES), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_classes_from_the_command_to_the_report(
    ray_cluster: cluster.Cluster, storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert ten_thousand(storage) == 0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    settings = ["data.name=d", "model.image=null", "model.audio=null", "train.max_steps=3", "zero.engine=torch"]
    began_s = time.monotonic()
    assert train.main(["--config", str(tmp_path / "recipe.yaml"), "--name", "wide", *settings]) == 0
    assert time.monotonic() - began_s < 600
    folder = storage / "runs" / "wide"
    result = json.loads((folder / "evaluation.json").read_text())
    assert (result["n"], len(result["confusion"]["labels"])) == (50, CLASSES)
    assert (folder / "evaluation.json").stat().st_size < 2_000_000
    assert (folder / "report.html").stat().st_size < 2_000_000
