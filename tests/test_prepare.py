"""The command that makes data sets: by its real `main`, on small files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs.prepare import main
from mmagent.record import Record
from mmagent.shards import Dataset

REPOSITORY = Path(__file__).parents[1]


def _rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"r{index}", "text": f"question {index}", "label": "ab"[index % 2], **more} for index in range(count)
    ]


def _tagged(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"Ann {index}", "spans": [[0, 3, "PER"]], **more} for index in range(count)]


_ZEBRA = {"id": "z", "text": "t", "label": "zebra", "split": "test"}


def _jsonl(file: Path, rows: list[Any]) -> str:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return f"jsonl:{file}"


def _prepare(source: str, *flags: str, name: str = "d") -> int:
    return main(["--source", source, "--name", name, "--workers", "1", *flags])


def _records(storage: Path, split: str, name: str = "d") -> list[Record]:
    dataset = Dataset.open(storage / "data" / name)
    return [Record.from_row(row) for table in dataset.read(split) for row in table.to_pylist()]


def _left(storage: Path) -> list[str]:
    """What lies in data/ beside the locks."""
    return sorted(path.name for path in (storage / "data").iterdir() if path.suffix != ".lock")


def test_jsonl_becomes_a_data_set(storage: Path, tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "1.png").write_bytes(make_png())
    rows = [row | {"image": "img/1.png"} for row in _rows(60)]
    assert _prepare(_jsonl(tmp_path / "rows.jsonl", rows)) == 0
    dataset = Dataset.open(storage / "data" / "d")
    info = dataset.info
    assert dataset.labels == ("a", "b")
    assert info["task"] == "classify"
    told = dataset.tasks["classify"]
    assert told.rows == {split: dataset.rows(split) for split in dataset.splits}
    assert told.counts == info["splits"]["train"]["labels"]
    assert sum(dataset.rows(split) for split in dataset.splits) == 60
    assert info["quarantine"] == {"rows": 0, "reasons": {}, "file": None}
    for split in ("train", "validation", "test"):
        counts = info["splits"][split]
        records = _records(storage, split)
        assert counts["rows"] == len(records) > 0
        assert counts["modalities"] == {"text+image": len(records)}
        assert counts["tasks"] == {"classify": len(records)}
        assert sum(counts["labels"].values()) == len(records)
        assert all(record.split == split and record.images[0].bytes == make_png() for record in records)
        for shard in counts["shards"]:
            assert hashlib.sha256((dataset.path / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    ids = [record.id for record in _records(storage, "train")]
    assert ids != sorted(ids, key=lambda id: int(id[1:]))  # shuffled
    assert _left(storage) == ["d"]


def test_many_workers_give_the_same(storage: Path, tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "rows.jsonl", _rows(200))
    assert _prepare(source, name="one") == 0
    assert _prepare(source, "--workers", "2", name="two") == 0
    for split in ("train", "validation", "test"):
        one, two = ([record.id for record in _records(storage, split, name)] for name in ("one", "two"))
        assert one == two


def test_the_cut_stays_when_rows_come(storage: Path, tmp_path: Path) -> None:
    assert _prepare(_jsonl(tmp_path / "a.jsonl", _rows(80)), name="a") == 0
    assert _prepare(_jsonl(tmp_path / "b.jsonl", _rows(120)), name="b") == 0
    for split in ("train", "validation", "test"):
        before, after = ({record.id for record in _records(storage, split, name)} for name in "ab")
        assert before <= after
    assert _prepare(_jsonl(tmp_path / "b.jsonl", _rows(120)), "--seed", "1", name="c") == 0
    assert {r.id for r in _records(storage, "test", "b")} != {r.id for r in _records(storage, "test", "c")}


def test_groups_stay_together(storage: Path, tmp_path: Path) -> None:
    rows = [row | {"customer": f"c{index // 4}"} for index, row in enumerate(_rows(200))]
    assert _prepare(_jsonl(tmp_path / "rows.jsonl", rows), "--group-by", "customer") == 0
    groups = [
        {record.meta["group"] for record in _records(storage, split)} for split in ("train", "validation", "test")
    ]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_a_test_file(storage: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.csv"
    test.write_text("question,answer\nwhat now?,a\n")
    main_file = tmp_path / "train.csv"
    main_file.write_text("question,answer\n" + "".join(f"what {index}?,{'ab'[index % 2]}\n" for index in range(60)))
    assert _prepare(f"csv:{main_file}", "--map", "text=question,label=answer", "--test", str(test)) == 0
    (record,) = _records(storage, "test")
    assert (record.id, record.messages[0].content) == ("test-test-2", "what now?")
    assert len(_records(storage, "train")) + len(_records(storage, "validation")) == 60


def test_bad_rows_are_set_aside(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [
        *_rows(97),
        "{not json",
        {"id": "x", "label": "a"},
        {"id": "y", "text": "t", "label": "a", "image": "no.png"},
    ]
    source = _jsonl(tmp_path / "rows.jsonl", rows)
    assert _prepare(source) == 2
    error = capsys.readouterr().err
    assert "2 rows were set aside so far, more than the share 0.01 of all 100 rows" in error
    assert f"{tmp_path / 'rows.jsonl'} row 98" in error
    assert "Traceback" not in error
    assert _left(storage) == []
    assert _prepare(source, "--max-bad-share", "0.03") == 0
    aside = Dataset.open(storage / "data" / "d").info["quarantine"]
    assert aside["rows"] == 3
    assert aside["reasons"] == {"image cannot be read": 1, "not JSON": 1, "row cannot be read": 1}
    entries = [json.loads(line) for line in (storage / "data" / "d" / aside["file"]).read_text().splitlines()]
    assert [(entry["row"], entry["id"]) for entry in entries] == [(98, "rows-98"), (99, "x"), (100, "y")]
    assert entries[0]["raw"] == "{not json\n"
    assert entries[2]["raw"]["image"] == "no.png"


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ([*_rows(30), *_rows(1)], [], "two rows have the id 'r0': {file} row 1 and {file} row 31"),
        ([{"text": "t", "lable": "a"}], [], "{file} has no column 'label' (the right answer: one of label, labels,"),
        (_rows(30), ["--map", "text=questoin"], "{file} has no column 'questoin' (--map text=questoin)"),
        (_rows(30), ["--group-by", "shop"], "{file} has no column 'shop' (--group-by)"),
        (_rows(3), [], "the split "),
        (_rows(30, split="train"), ["--validation-share", "0.0001"], "the split validation is empty"),
        ([*_rows(40, split="train"), _ZEBRA], [], "{file} row 41: the label 'zebra' of classify is in test, but"),
        ([{**row, "label": f"l{index}"} for index, row in enumerate(_rows(30))], [], "each label has one row, which"),
        ([{**row, "label": 4, "task": "regress"} for row in _rows(30)], [], "every value of regress in training is 4:"),
        ([{"text": f"t{index}", "spans": []} for index in range(30)], [], "no label at all, but one or more are"),
        ([*_rows(30, split="train"), {**_ZEBRA, "task": "classify:kind"}], [],
         "{file} row 31: the task 'classify:kind' is in test, but training never has it"),
        ([*_tagged(30, split="train"), {"text": "x", "spans": [[0, 1, "NEW"]], "split": "test"}], [],
         "{file} row 31: the label 'NEW' of tag is in test, but training never has it; training has 'PER'"),
        ([*_rows(30), *({"id": f"m{index}", "text": "t"} for index in range(2))], [], "the row has no label"),
        (_rows(30), ["--task", "regress"], "value cannot be read"),
        ([], [], "has no rows"),
        ([{**row, "label": "same"} for row in _rows(60)], [], "training has the labels 'same', but two or more"),
        (_rows(30), ["--test-share", "0"], "the share of test is 0, but a number between 0 and 1"),
        (_rows(30), ["--test-share", "0.6", "--validation-share", "0.5"], "leave nothing for training"),
    ],
)  # fmt: skip
def test_what_stops_the_command(
    storage: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[Any],
    flags: list[str],
    words: str,
) -> None:
    file = tmp_path / "rows.jsonl"
    assert _prepare(_jsonl(file, rows), *flags) == 2
    error = capsys.readouterr().err
    assert words.replace("{file}", str(file)) in error
    assert "Traceback" not in error
    assert _left(storage) == []


def test_every_task_in_one_data_set(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that name their tasks may be of several; each is told by itself."""
    kinds: list[dict[str, Any]] = [
        *({"task": "classify:mood", "label": "ab"[index % 2]} for index in range(60)),
        *({"task": "classify:topic", "label": "abc"[index % 3]} for index in range(50)),
        *({"task": "multilabel", "labels": ["x", "y"][: index % 3]} for index in range(40)),
        *({"task": "regress", "value": index} for index in range(40)),
        *({"task": "tag", "spans": [[0, 4, "WORD"], [5, 6, "NUMBER"]]} for index in range(40)),
        *(
            {"task": "relate", "label": "rs"[index % 2], "spans": [[0, 4, "head"], [5, 6, "tail"]]}
            for index in range(40)
        ),
        *({"task": "extract", "context": "some text", "answers": ["text"][: index % 2]} for index in range(40)),
        *({"task": "match", "candidates": ["a", "b"], "label": "b"} for index in range(40)),
        *({"task": "generate", "answer": f"{index}"} for index in range(40)),
    ]
    rows = [{"text": f"word {index}", **row} for index, row in enumerate(kinds)]
    assert _prepare(_jsonl(tmp_path / "rows.jsonl", rows)) == 0
    dataset = Dataset.open(storage / "data" / "d")
    tasks = dataset.tasks
    assert dataset.info["quarantine"]["rows"] == 0
    assert (dataset.task, next(iter(tasks))) == ("classify:mood", "classify:mood")
    labels = {task: info.labels for task, info in tasks.items() if info.labels}
    assert labels == {
        "classify:mood": ("a", "b"), "classify:topic": ("a", "b", "c"), "multilabel": ("x", "y"),
        "tag": ("NUMBER", "WORD"), "relate": ("r", "s"),
    }  # fmt: skip
    values = [record.target.value or 0.0 for record in _records(storage, "train") if record.task == "regress"]
    assert tasks["regress"].mean == pytest.approx(statistics.fmean(values))
    assert tasks["regress"].deviation == pytest.approx(statistics.pstdev(values))
    assert tasks["tag"].counts == {"NUMBER": tasks["tag"].rows["train"], "WORD": tasks["tag"].rows["train"]}
    assert sum(sum(info.rows.values()) for info in tasks.values()) == len(rows)
    matched = next(record for record in _records(storage, "train") if record.task == "match")
    assert (matched.target.labels, [each["content"] for each in matched.candidates]) == (("1",), ["a", "b"])
    assert "tag: 2 labels" in capsys.readouterr().out


def test_a_class_of_one_sample_stays_in_training_and_is_named(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*_rows(60), {"text": "once", "label": "lonely"}]
    assert _prepare(_jsonl(tmp_path / "rows.jsonl", rows), "--validation-share", "0.4", "--test-share", "0.4") == 0
    assert "note: 1 of 3 labels of classify occur once in training: 'lonely'" in capsys.readouterr().out
    assert Dataset.open(storage / "data" / "d").tasks["classify"].counts["lonely"] == 1


def test_ten_thousand_classes(storage: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"sample {index},class {index % 10_000}\n" for index in range(11_000)))
    assert _prepare(f"csv:{file}") == 0
    info = Dataset.open(storage / "data" / "d").tasks["classify"]
    assert len(info.labels) == 10_000
    assert sum(info.rows.values()) == 11_000
    assert info.rows["validation"] > 50


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sorce", "x"], "unknown flag --sorce: did you mean --source?"),
        (["--group_by=x"], "unknown flag --group_by: did you mean --group-by?"),
        (["--source", "easy_vqa", "--name", "d", "--map", "text"], "FIELD=COLUMN"),
        (["--source", "easy_vqa", "--name", "d", "--workers", "0"], "1 or more"),
        (
            ["--source", "easy_vqa", "--name", "d", "--task", "guess"],
            "KIND or KIND:NAME is wanted: classify, multilabel",
        ),
        (["--name", "d"], "--source"),
    ],
)
def test_wrong_arguments(storage: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_name_that_is_no_name(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _prepare("easy_vqa", name="../up") == 2
    assert "is no name" in capsys.readouterr().err


def test_the_same_name_again(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _jsonl(tmp_path / "rows.jsonl", _rows(60))
    assert _prepare(source) == 0
    made = (storage / "data" / "d" / "dataset.json").read_bytes()
    capsys.readouterr()
    assert _prepare(source) == 0
    assert "is already there" in capsys.readouterr().out
    assert _prepare(source, "--seed", "5") == 2
    error = capsys.readouterr().err
    assert "seed: 0 then, 5 now" in error
    assert "--replace" in error
    _jsonl(tmp_path / "rows.jsonl", _rows(61))  # the file has changed
    assert _prepare(source) == 2
    assert "files" in capsys.readouterr().err
    assert (storage / "data" / "d" / "dataset.json").read_bytes() == made
    assert _prepare(source, "--replace") == 0
    assert sum(len(_records(storage, split)) for split in ("train", "validation", "test")) == 61
    assert _left(storage) == ["d"]


def _command(storage: Path, source: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.prepare", "--source", source, "--name", name, "--workers", "2"]
    environment = os.environ | {"MMAGENT_STORAGE": str(storage)}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_command_leaves_nothing_that_counts(
    storage: Path, tmp_path: Path, make_png: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big.png").write_bytes(make_png(size=(2500, 2500)))  # slow to decode
    source = _jsonl(tmp_path / "rows.jsonl", _rows(400, image="big.png"))
    process = _command(storage, source, "d")
    spool = storage / "data" / ".d.draft" / ".spool"
    until = time.monotonic() + 60
    while not (spool.exists() and spool.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    # While it runs, its name is taken.
    assert _prepare(source) == 2
    assert f"is being prepared by process {process.pid}" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert psutil.wait_procs(workers, timeout=20)[1] == []  # no worker is left behind
    assert not (storage / "data" / "d").exists()
    _jsonl(tmp_path / "rows.jsonl", _rows(60))
    assert _prepare(source) == 0  # the same command again
    assert _left(storage) == ["d"]


def test_the_old_data_set_survives_a_kill_between_the_renames(storage: Path, tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "rows.jsonl", _rows(60))
    assert _prepare(source) == 0
    (storage / "data" / "d").rename(storage / "data" / ".d.old")
    assert _prepare(source) == 0
    assert _left(storage) == ["d"]


def test_text_and_speech_from_the_command_line(storage: Path, tmp_path: Path, make_wav: Callable[..., bytes]) -> None:
    """As the README shows it: a CSV of text and speech, by the command itself."""
    for index in range(2):
        (tmp_path / f"{index}.wav").write_bytes(make_wav(300 + 300 * index))
    lines = [f"{index % 2}.wav;please, the call {index};{('refund', 'delivery')[index % 2]}" for index in range(60)]
    (tmp_path / "calls.csv").write_text("audio;note;topic\n" + "\n".join(lines))
    command = [
        *(sys.executable, "-m", "jobs.prepare", "--source", f"csv:{tmp_path / 'calls.csv'}", "--name", "calls"),
        *("--map", "text=note,label=topic"),
    ]
    environment = os.environ | {"MMAGENT_STORAGE": str(storage)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a second" in done.stderr
    assert "2 labels; prepared in" in done.stdout
    records = _records(storage, "train", "calls")
    assert {record.modalities for record in records} == {"text+audio"}
    assert {record.target.label for record in records} == {"refund", "delivery"}


def test_a_small_easy_vqa(storage: Path) -> None:
    pytest.importorskip("easy_vqa")
    pytest.importorskip("espeakng_loader")
    from jobs import prepare
    from jobs.sources.easy_vqa import EasyVqa

    source = EasyVqa(seed=0, validation_share=0.1, limit=300)
    options = prepare._parser().parse_args(["--source", "easy_vqa", "--name", "d", "--workers", "1"])
    info = prepare._write(source, storage / "data" / "d", options, {})
    dataset = Dataset.open(storage / "data" / "d")
    assert dataset.info == info
    assert info["splits"]["test"]["forms"] == {
        "paraphrase": 300, "speech_known": 300, "speech_unseen": 300, "text": 300,
    }  # fmt: skip
    assert set(info["splits"]["train"]["forms"]) == {"speech", "text"}
    assert set(info["splits"]["validation"]["forms"]) == {"speech_known", "text"}
    assert info["splits"]["test"]["modalities"] == {"image+audio": 600, "text+image": 600}


def test_a_recipes_limits_let_larger_pictures_in(
    storage: Path, tmp_path: Path, make_png: Callable[..., bytes], tiny_recipe: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for number in range(20):
        (tmp_path / "pets" / ("cat", "dog")[number % 2]).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.write_bytes(make_png(size=(4200, 4200) if number == 0 else (8, 8)))
    given = ["--source", f"folder:{tmp_path / 'pets'}", "--name", "pets", "--workers", "1"]
    assert main(given) == 2
    assert "--config RECIPE" in capsys.readouterr().err
    recipe = {**tiny_recipe, "data": {**tiny_recipe["data"], "media": {"max_image_pixels": 20_000_000}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([*given, "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert sum(Dataset.open(storage / "data" / "pets").rows(split) for split in ("train", "validation", "test")) == 20
