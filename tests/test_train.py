"""The training command as a user walks it, with two ZeRO workers on a real Ray: trained, stopped, gone on, exported."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from jobs import cluster, prepare, train, watch
from jobs.checkpoint import Checkpoints
from mmagent import Predictor, bundle
from mmagent.record import Media, Record
from mmagent.shards import Dataset
from mmagent.stalls import PHASES

Command = Callable[..., int]
STEPS = 12


@pytest.fixture
def command(
    ray_cluster: cluster.Cluster, storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
) -> Iterator[Command]:  # fmt: skip
    """``command("name", "key=value", ...)``: the exit status of a training on 96 rows, one damaged, one too long."""
    rows = make_records(96)
    rows[5] = replace(rows[5], images=(Media(b"no picture"),))
    said = rows[7].messages[0]
    rows[7] = replace(rows[7], messages=(replace(said, content="is it red? " * 50 + said.content),))
    splits = {"train": rows, "validation": make_records(16, "validation"), "test": make_records(24, "test")}
    make_dataset(storage / "data" / "tiny", splits)
    recipe = {
        **tiny_recipe,
        "data": {**tiny_recipe["data"], "max_bad_share": 0.05},
        "model": {**tiny_recipe["model"], "dropout": 0.1},
        "augment": {"audio_tempo": 0.1, "audio_noise": 0.2, "text_drop": 0.1},
        "optim": {"lr": 5.0e-3},
        "train": {"micro_batch": 4, "accumulation": 2, "epochs": 2, "eval_every_steps": 6, "eval_rows": 16},
        "cluster": {"workers": 2, "max_failures": 0},
        "zero": {"stage": 1},
    }  # 12 steps of 16 rows
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda name, *arguments: train.main(["--config", str(tmp_path / "recipe.yaml"), "--name", name, *arguments])
    for number, handler in before.items():
        signal.signal(number, handler)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def stop_soon(folder: Path) -> threading.Thread:
    """Ctrl-C (SIGTERM, which pytest leaves alone), as soon as the first step was logged."""

    def watch() -> None:
        deadline = time.monotonic() + 200
        while not list((folder / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.long
@pytest.mark.timeout(900)  # three runs and an evaluation: a minute or two, on a busy machine many
def test_a_run_stopped_and_gone_on_is_the_run_that_was_not(
    command: Command, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, halting = storage / "runs" / "straight", storage / "runs" / "halting"

    # -- one that is not disturbed: trained, exported, evaluated --------------------------------------------
    assert command("straight") == 0
    shown = capsys.readouterr().out
    assert f"{STEPS} steps of 16 samples (2 workers x 4 x 2), ZeRO 1" in shown
    assert "validation accuracy" in shown
    assert f"bundle  {straight / 'bundle'}" in shown
    assert [row["step"] for row in lines(straight, "validation")] == [6, 12]
    last = lines(straight, "train")[-1]
    assert (last["step"], last["total_steps"]) == (STEPS, STEPS)
    assert last["samples_per_s"] > 0
    assert sum(row["samples"] for row in lines(straight, "train")) == STEPS * 16
    assert list((straight / "tb").glob("events.out.tfevents.*"))
    for file in ("evaluation.json", "report.html", "timing.json", "config.yaml"):
        assert (straight / file).stat().st_size > 0, file
    assert json.loads((straight / "evaluation.json").read_text())["n"] == 24

    # the time of a step is split into all that it is spent on, and the run says what to change
    for row in lines(straight, "train"):
        parts = {name: row[f"{name}_s"] for name in PHASES}
        assert sum(parts.values()) == pytest.approx(row["step_s"])
        step_s = row["samples"] / row["samples_per_s"] / row["steps"]  # by the clock of the meter
        assert row["step_s"] - row["checkpoint_s"] == pytest.approx(step_s, rel=0.05, abs=0.02)
        assert min(parts["forward"], parts["backward"], parts["communication"], parts["optimizer"]) > 0
    assert lines(straight, "train")[-1]["checkpoint_s"] > 0  # the one of step 6
    assert re.search(r"^Training .* of its time.*\b(train|cluster|data|freeze)\.", shown, re.MULTILINE)
    assert "Where the time goes" in (straight / "report.html").read_text()

    # the bad row and the long one were counted, in both epochs, and cost nothing else
    assert "samples are longer than data.max_text_tokens" in shown
    assert (last["bad_rows"], last["cut_rows"]) == (2, 2)
    checkpoints = Checkpoints(straight / "checkpoints", rank=0, barrier=bool, keep_last=1)
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.loop["bad_rows"], latest.loop["cut_rows"]) == (STEPS, 2, 2)

    found = bundle.load("straight")
    assert (found.manifest["run"], found.manifest["data"]) == ("straight", "tiny")
    predictor = Predictor.load("straight", device="cpu")
    for row in found.golden():
        [answer] = predictor.predict([row["record"]])
        assert answer.probabilities == pytest.approx(row["answer"]["probabilities"], abs=1e-4)

    # -- the same name again: done --------------------------------------------------------------------------
    bundled = (straight / "bundle" / "manifest.json").read_text()
    assert command("straight") == 0
    again = capsys.readouterr().out
    assert f"bundle  {straight / 'bundle'}" in again
    assert "validation accuracy" not in again
    assert (straight / "bundle" / "manifest.json").read_text() == bundled

    # -- another that is stopped at its first checkpoint, and goes on ---------------------------------------
    watcher = stop_soon(halting)
    assert command("halting", "--no-evaluate") == watch.EXIT_STOPPED
    watcher.join()
    shown = capsys.readouterr().out
    assert "SIGTERM: saving at the next step" in shown
    assert "the same command goes on from there" in shown
    assert not (halting / "bundle").exists()
    stopped = Checkpoints(halting / "checkpoints", rank=0, barrier=bool, keep_last=1).latest()
    assert stopped is not None
    assert 6 <= stopped.step < STEPS
    assert stopped.loop["score"] >= 0 or stopped.step % 6  # what nobody validated is nobody's best
    assert command("halting", "--no-evaluate") == 0
    assert f"goes on at step {stopped.step}" in capsys.readouterr().out
    assert [row["step"] for row in lines(halting, "validation")] == [6, 12]
    steps = [row["step"] for row in lines(halting, "train")]
    assert steps == sorted(set(steps))

    one, other = (load_file(folder / "bundle" / "model.safetensors") for folder in (straight, halting))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=1e-5, rtol=1e-4, msg=f"{name}: {{}}".format)
    assert lines(halting, "validation")[-1]["loss"] == pytest.approx(
        lines(straight, "validation")[-1]["loss"], abs=1e-5
    )


@pytest.mark.long
def test_too_many_bad_rows_end_the_run_and_the_last_is_named(
    command: Command, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("strict", "data.max_bad_share=0", "--no-evaluate") == 2
    told, shown = capsys.readouterr()
    assert "1 rows cannot be used: image damaged (1)" in told  # a small data set is looked at before the first step
    assert "more than data.max_bad_share=0.0 of the split allows (0)" in shown
    assert "row 'train-5': images" in shown
    assert "Traceback" not in shown
    assert not (storage / "runs" / "strict" / "bundle").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_language_model_trains_too_at_every_stage(
    command: Command, storage: Path, tiny_backbone: Path, stage: int
) -> None:
    assert command("deep", "freeze.strategy=top:1", f"zero.stage={stage}", "train.max_steps=4", "--no-evaluate") == 0
    before = load_file(tiny_backbone / "model.safetensors")
    after = load_file(storage / "runs" / "deep" / "bundle" / "backbone" / "model.safetensors")
    moved = {name for name in after if not torch.equal(after[name].float(), before[name].float())}
    assert moved
    assert all("layer.1." in name for name in moved)
    assert Predictor.load("deep", device="cpu").predict([{"text": "what color is the shape?"}])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("decoder", 1), ("encoder-decoder", 3)])
def test_a_text_is_learnt_and_written(
    ray_cluster: cluster.Cluster, storage: Path, tiny_recipe: dict[str, Any], writers: dict[str, Path], tmp_path: Path,
    kind: str, stage: int,
) -> None:  # fmt: skip
    words = {"red": "the blue image", "blue": "red circle", "green": "not green"}
    rows = [{"text": f"what is {word}", "answer": answer} for word, answer in words.items()]
    splits = [("train", 32), ("validation", 2), ("test", 2)]
    lines = [json.dumps({**row, "split": split}) for split, times in splits for row in rows * times]
    (tmp_path / "words.jsonl").write_text("\n".join(lines) + "\n")
    assert prepare.main(["--source", f"jsonl:{tmp_path / 'words.jsonl'}", "--name", "words"]) == 0
    recipe = {
        "data": {"name": "words", "max_text_tokens": 16, "max_answer_tokens": 8},
        "model": {"backbone": str(writers[kind]), "join": "input", "dropout": 0.0},
        "freeze": {"strategy": "all"},
        "optim": {"lr": 5.0e-3, "lr_backbone": 5.0e-3},
        "train": {"micro_batch": 4, "epochs": 8, "eval_every_steps": 24, "eval_rows": 6},
        "cluster": {"workers": 2, "max_failures": 0},
        "zero": {"stage": stage},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train.main(["--config", str(tmp_path / "recipe.yaml"), "--name", "writer"]) == 0
    found = json.loads((storage / "runs" / "writer" / "evaluation.json").read_text())
    assert found["metrics"]["exact"]["value"] == 1.0
    assert found["metrics"]["perplexity"]["value"] < 1.5
    assert "BLEU" in (storage / "runs" / "writer" / "report.html").read_text()
    said = Predictor.load("writer", device="cpu").predict([{"text": "what is red"}])
    assert said[0].text == "the blue image"
