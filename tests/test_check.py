"""The check of a data set, by the real command: each fault that it looks for is put into one, and found."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from jobs import diagnosis, page, watch
from jobs.prepare import main
from mmagent.config import resolve
from mmagent.record import Media, Record
from mmagent.rows import parse
from mmagent.shards import Dataset

LABELS = ("red", "green", "blue", "black")


def picture(number: int, format: str = "PNG") -> bytes:
    """A picture that no other number has."""
    out = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(noise, "RGB").save(out, format)
    return out.getvalue()


def sound(number: int, peak: float = 0.3, rate_hz: int = 16_000, format: str = "WAV") -> bytes:
    """A tone of its own pitch; above a peak of 1 it is clipped."""
    time_s = np.arange(rate_hz // 4) / rate_hz
    out = io.BytesIO()
    soundfile.write(out, np.clip(peak * np.sin(2 * np.pi * (200 + 7 * number) * time_s), -1, 1), rate_hz, format=format)
    return out.getvalue()


def row(number: int, split: str, **more: Any) -> Record:
    return parse({"id": f"{split}-{number}", "text": f"what is {split} {number}?", "label": LABELS[number % 4],
                  "split": split, **more})  # fmt: skip


@pytest.fixture
def dataset(storage: Path, make_dataset: Callable[..., Dataset], make_png: Callable[..., bytes]) -> Dataset:
    """60 rows of training, 12 of validation and of test; what is wrong with them stands below."""
    train = [row(i, "train", **({"image": picture(i)} if i % 2 else {"audio": sound(i)})) for i in range(60)]
    train[1] = replace(train[1], images=(Media(b"no picture"),))
    train[3] = replace(train[3], images=(Media(make_png("red")),))  # blank
    train[2] = replace(train[2], audios=(Media(sound(2, peak=0.0005)),))  # silent
    train[4] = replace(train[4], audios=(Media(sound(4, peak=1.5)),))  # clipped
    train[6] = replace(train[6], audios=(Media(sound(6, rate_hz=13_000)),))
    train[21] = replace(train[19], id="train-21", target=replace(train[19].target, label="green"))  # of train-19: black
    validation = [row(i, "validation") for i in range(12)]
    test = [row(i, "test", image=picture(1000 + i)) for i in range(12)]
    test[5] = replace(test[5], images=(Media(picture(7, "BMP")),))  # of train-7, in another format
    test[6] = replace(train[9], id="test-6", split="test")
    return make_dataset(storage / "data" / "d", {"train": train, "validation": validation, "test": test})


def run(*flags: str) -> dict[str, Any]:
    assert main(["--check", "--name", "d", "--workers", "1", *flags]) == 0
    found: dict[str, Any] = json.loads(Path(str(Dataset.open(_folder()).path / diagnosis.FILE)).read_text())
    return found


def _folder() -> Path:
    from mmagent import storage

    return storage.folder("data", "d")


def test_every_fault_is_found_and_told(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    found = run()
    train, test = found["splits"]["train"], found["splits"]["test"]
    assert train["unusable"] == {"rows": 1, "reasons": {"image damaged": 1}, "examples": ["train-1"]}
    assert train["signs"] == {"blank": 1, "silent": 1, "clipped": 1}
    assert train["examples"] == {"blank": ["train-3"], "silent": ["train-2"], "clipped": ["train-4"]}
    assert train["audio"]["rates_hz"] == {"16000": 29, "13000": 1}
    assert (train["image"]["count"], train["image"]["distinct"]) == (30, 29)  # two rows of one picture
    assert train["contradicting"] == {"rows": 2, "examples": ["train-19", "train-21"]}
    assert train["repeated_rows"] == 1
    assert sum(train["labels"]["classify"].values()) == 60
    assert sum(rows for _, rows in train["length"]["histogram"]) == 60
    assert train["length"]["max"] == 4  # words
    assert train["cut_rows"] is None
    assert test["signs"] == {}
    shared = {tuple(pair["splits"]): pair for pair in found["shared"]}
    assert shared["train", "validation"]["same_rows"] == 0
    pair = shared["train", "test"]
    assert (pair["media_rows"], pair["of"], pair["same_rows"]) == (2, 12, 1)
    assert (pair["media_examples"], pair["same_examples"]) == (["test-5", "test-6"], ["test-6"])

    told = "\n".join(found["warnings"])
    for words in (
        "1 rows cannot be used: image damaged (1)", "1 of 30 pictures are blank, such as of 'train-3'",
        "1 of 30 sounds are silent", "1 of 30 sounds are clipped", "13,000 samples a second: is that their rate?",
        "2 rows ask the same as another", "1 rows of test stand in train too", "2 of 12 rows of test bring media",
    ):  # fmt: skip
        assert words in told
    shown = capsys.readouterr().out
    assert all(f"warning: {line}" in shown for line in found["warnings"])
    assert "sample rates: 16,000 Hz in 29, 13,000 Hz in 1" in shown

    [fault] = [json.loads(line) for line in (dataset.path / "quarantine" / "check.jsonl").read_text().splitlines()]
    assert (fault["id"], fault["reason"], fault["file"]) == ("train-1", "image damaged", "train/part-00000.parquet")
    assert "not a picture" in fault["message"]


def test_a_training_begins_with_what_was_found(dataset: Dataset) -> None:
    assert "not checked" in diagnosis.known(dataset)[-1]
    found = run()
    assert diagnosis.known(dataset) == [f"warning: {line}" for line in found["warnings"]]
    [(_, _, section)] = page._checked(dataset)
    assert all(escape(line) in section for line in found["warnings"])
    dataset.info["splits"]["train"]["shards"][0]["sha256"] = "other"
    assert "check.json is of other shards" in diagnosis.known(dataset)[-1]
    assert page._checked(dataset) == []


def test_a_check_that_cannot_be_written_ends_no_training(
    dataset: Dataset, tiny_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset.path / f".{diagnosis.FILE}.{os.getpid()}.tmp").mkdir()  # where it would be drafted
    watch._look(dataset, resolve(tiny_recipe, {}))
    assert "the data set was not checked: Is a directory" in capsys.readouterr().out
    assert diagnosis.read(dataset) is None


def test_rare_labels_are_told_without_a_check(
    storage: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]]
) -> None:
    made = make_dataset(storage / "data" / "few", {"train": make_records(12)})
    assert "4 of 4 labels have fewer than 10 training rows" in diagnosis.known(made)[0]


def test_two_processes_and_a_recipe_count_tokens(
    dataset: Dataset, tmp_path: Path, tiny_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tiny_recipe, "data": {**tiny_recipe["data"], "max_text_tokens": 12}}))
    one = run("--config", str(recipe))
    two = run("--config", str(recipe), "--workers", "2")
    assert {key: value for key, value in one.items() if key != "checked_ms"} == {
        key: value for key, value in two.items() if key != "checked_ms"
    }
    about = one["splits"]["validation"]
    assert about["length"]["p50"] > 4  # pieces of words, and the tokenizer's own signs
    assert about["cut_rows"] == about["rows"]  # "validation" is spelled out by this tokenizer
    assert any("longer than data.max_text_tokens" in line for line in one["warnings"])
    assert "tokens a row" in capsys.readouterr().out


def test_what_a_check_needs_is_said(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--name", "nothing"]) == 2
    assert "is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--name", "nothing"])
    assert "--source is missing" in capsys.readouterr().err


def test_a_data_set_is_made_and_checked_in_one_command(storage: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"question {i}", "label": "ab"[i % 2]}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["--source", f"jsonl:{tmp_path / 'rows.jsonl'}", "--name", "d", "--workers", "1", "--check"]) == 0
    found = json.loads((_folder() / diagnosis.FILE).read_text())
    assert sum(about["rows"] for about in found["splits"].values()) == 60
