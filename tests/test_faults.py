"""A run that is hurt on the way, and what becomes of it: workers killed or asked to end, bad losses, ranks held up.

Some of it runs in one process, without Ray; what workers do when they die is seen on a real Ray.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import cluster, loop, run, spike, stream, trace, vigil, watch
from jobs.loop import Plan
from jobs.meter import Log
from jobs.spike import BadLossError
from jobs.supervised import Supervised
from jobs.workers import Group, WorkersFailed
from mmagent import storage as storages
from mmagent.config import resolve
from mmagent.model import Batch
from mmagent.record import Record
from mmagent.shards import Dataset
from tests import ranks

Prepare = Callable[..., run.Run]


@pytest.fixture
def prepare(
    storage: Path, tiny_recipe: dict[str, Any], make_dataset: Callable[..., Dataset],
    make_records: Callable[..., list[Record]],
) -> Prepare:  # fmt: skip
    """``prepare("name", {"key": value})``: a run on 48 rows, of plain torch in one process, that exports nothing."""
    splits = {"train": make_records(48), "validation": make_records(8, "validation")}
    make_dataset(storage / "data" / "tiny", splits)
    settings = {
        "model.dropout": 0.1, "train.micro_batch": 4, "train.accumulation": 2,
        "train.max_steps": 12, "train.eval_every_steps": 6, "train.eval_rows": 8, "train.trace": True,
        "train.alarm_minutes": None, "zero.engine": "torch",
    }  # fmt: skip

    def made(name: str, overrides: dict[str, Any] | None = None) -> run.Run:
        config = resolve(tiny_recipe, settings | (overrides or {}))
        return run.prepare(config, storages.folder("runs", name), export=False)

    return made


def alone(plan: Plan, **more: Any) -> None:
    """Trains in this process, from the newest checkpoint."""
    loop.train(Group(rank=0, world=1, blocks=blocks_of(plan, 0), report=lambda _: True, **more), plan)


def blocks_of(plan: Plan, rank: int, world: int = 1) -> Callable[[str], Iterator[pa.Table]]:
    """The streams of a rank, without Ray."""

    def blocks(name: str) -> Iterator[pa.Table]:
        return stream.tables(*run.reads(plan, Dataset.open(storages.folder("data", "tiny")), name, world), rank)

    return blocks


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


# ---------------------------------------------------------------------------------------------- in one process


class Odd(Supervised):
    """A learner whose loss is `value` at forward pass number `at`, counted from 1, and at `times` of them."""

    at, times, value, rank = 5, 1, math.nan, 0

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._passes = 0

    def loss(self, out: Batch, batch: Batch) -> torch.Tensor:
        self._passes += 1
        usual = super().loss(out, batch)
        return usual * self.value if self.at <= self._passes < self.at + self.times else usual


def test_a_run_that_goes_on_is_bit_for_bit_the_one_that_was_not_stopped(prepare: Prepare) -> None:
    straight, halting = prepare("straight").plan, prepare("halting").plan
    alone(straight)
    stop = halting.folder / loop.STOP_FILE
    asked = iter([""] * 4 + ["SIGTERM"])
    alone(halting, asked=lambda: next(asked))
    assert saved(halting.folder) == [5]
    assert lines(halting.folder, "stop")[0]["reason"] == "rank 0: SIGTERM"
    assert sum(row["samples"] for row in lines(halting.folder, "train")) == 5 * 8  # nothing since the last line is lost
    assert not stop.exists()
    alone(halting)
    assert trace.read(halting.folder) == trace.read(straight.folder)
    assert [row["step"] for row in trace.read(straight.folder)["rank_0"]] == list(range(1, 13))
    same = ("score", "loss", "accuracy")
    for one, other in zip(lines(halting.folder, "validation"), lines(straight.folder, "validation"), strict=True):
        assert {key: one[key] for key in same} == {key: other[key] for key in same}


def test_checkpoints_by_steps_and_by_time_beside_those_of_validations(prepare: Prepare) -> None:
    plan = prepare("steps", {"train.checkpoint_every_steps": 4, "train.keep_last": 9}).plan
    alone(plan)
    assert saved(plan.folder) == [4, 6, 8, 12]
    scores = [
        json.loads((plan.folder / "checkpoints" / f"step_{step:08d}" / "loop.json").read_text())["score"]
        for step in saved(plan.folder)
    ]
    assert [score >= 0 for score in scores] == [False, True, False, True]
    plan = prepare("time", {"train.checkpoint_every_minutes": 1e-9, "train.keep_last": 20}).plan
    alone(plan)
    assert saved(plan.folder) == list(range(1, 13))


def test_the_notice_of_a_machine_that_goes_saves_once_and_training_goes_on(prepare: Prepare) -> None:
    plan = prepare("drained", {"train.keep_last": 9}).plan
    calls = iter(range(99))
    alone(plan, drained=lambda: next(calls) >= 3)
    assert saved(plan.folder) == [4, 6, 12]
    assert [row["step"] for row in lines(plan.folder, "drain")] == [4]


def test_a_torn_checkpoint_is_told_and_an_earlier_one_goes_on(prepare: Prepare) -> None:
    straight, torn = prepare("straight").plan, prepare("torn").plan
    alone(straight)
    asked = iter([""] * 7 + ["SIGTERM"])
    alone(torn, asked=lambda: next(asked))
    (file,) = (torn.folder / "checkpoints" / "step_00000008").glob("*.safetensors")
    os.truncate(file, 100)
    alone(torn)
    (line,) = lines(torn.folder, "torn")
    assert f"step_00000008 is torn and passed over: {file.name} is not what was written" in line["reason"]
    assert trace.read(torn.folder)["rank_0"] == trace.read(straight.folder)["rank_0"]


def test_a_loss_that_is_no_number_stops_the_run_and_its_rows_are_kept(prepare: Prepare) -> None:
    plan = replace(prepare("nan").plan, learner=Odd)  # the first forward pass of step 3
    with pytest.raises(BadLossError) as error:
        alone(plan)
    words, kept = str(error.value), pq.read_table(plan.folder / "inspect" / "step_3_rank_0.parquet")
    assert "the loss of step 3 is no number" in words
    assert "train.on_bad_loss=skip" in words
    assert str(plan.folder / "inspect") in words
    ids = trace.read(plan.folder)["rank_0"]
    assert [row["step"] for row in ids] == [1, 2]
    assert len(kept) == 8
    assert ", ".join(kept["id"].to_pylist()[:4]) in words
    assert kept.schema.metadata[b"losses"].startswith(b"nan,")
    assert kept["messages"][0].as_py()


def test_a_bad_batch_is_left_out_by_policy_and_moves_nothing(prepare: Prepare) -> None:
    """The run ends as one whose learning rate was nothing in that step would: its weights never met the batch."""
    plan = replace(prepare("skip", {"train.on_bad_loss": "skip"}).plan, learner=Odd)
    alone(plan)
    (skip,) = lines(plan.folder, "skip")
    assert (skip["step"], skip["skipped"]) == (3, 1)
    last = lines(plan.folder, "train")[-1]
    assert (last["step"], last["skipped"]) == (12, 1)
    assert math.isfinite(last["loss"])
    assert sum(row["samples"] for row in lines(plan.folder, "train")) == 11 * 8
    many = replace(prepare("many", {"train.on_bad_loss": "skip", "train.max_skips": 2}).plan, learner=Odd)
    Odd.times = 99
    try:
        with pytest.raises(BadLossError, match=r"3 bad ones in a row are more than train\.max_skips=2"):
            alone(many)
    finally:
        Odd.times = 1


def second_is_odd(rank: int, world: int, given: Path) -> None:
    """The loop of one of two workers, of which the second meets a loss that is no number."""
    plan = torch.load(given, weights_only=False)
    plan = replace(plan, learner=Odd if rank else Supervised)
    loop.train(Group(rank, world, blocks_of(plan, rank, world), lambda _: True), plan)


@pytest.mark.long
def test_what_one_rank_cannot_learn_from_no_rank_learns_from(prepare: Prepare, tmp_path: Path) -> None:
    """Only the second rank's loss is bad, and both leave the step out."""
    settings = {"train.on_bad_loss": "skip", "train.trace": False, "cluster.workers": 2, "zero.engine": "deepspeed"}
    plan = prepare("two", settings).plan
    torch.save(plan, tmp_path / "plan.pt")
    ranks.run("tests.test_faults:second_is_odd", tmp_path / "plan.pt", [2], timeout_s=200)
    assert [row["step"] for row in lines(plan.folder, "skip")] == [3]
    assert "that of rank 1 on the rows " in lines(plan.folder, "skip")[0]["reason"]
    assert {file.name for file in (plan.folder / "inspect").iterdir()} == {
        "step_3_rank_0.parquet", "step_3_rank_1.parquet",
    }  # fmt: skip
    assert saved(plan.folder) == [6, 9]  # they went on together to the end


def test_a_loss_that_jumps_is_told_from_one_that_varies() -> None:
    usual, rng = spike.Usual(), torch.Generator().manual_seed(0)
    losses = [2.0 * math.exp(-step / 50) + 0.2 * float(torch.rand(1, generator=rng)) for step in range(200)]
    for loss in losses:
        assert spike.fault(loss, usual, 10.0) == ""
        usual.add(loss)
    assert "jumped to 9" in spike.fault(9.0, usual, 10.0)
    assert spike.fault(9.0, usual, None) == ""
    assert spike.fault(math.inf, usual, None) == "is no number"
    assert spike.fault(0.9, usual, 10.0) == ""  # less than a run has at its start is no jump
    assert spike.fault(99.0, spike.Usual(), 10.0) == ""  # nothing is known yet
    exact = spike.Usual()
    for loss in losses[:50]:
        exact.add(loss)
    known = torch.tensor(losses[:50], dtype=torch.float64)
    assert (exact.mean, exact.variance) == pytest.approx((float(known.mean()), float(known.var(correction=0))))


class Held(Supervised):
    """A learner that is held up in its sixth forward pass."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._passes = 0

    def loss(self, out: Batch, batch: Batch) -> torch.Tensor:
        self._passes += 1
        if self._passes == 6:
            time.sleep(3.0)
        return super().loss(out, batch)


def test_no_step_for_long_raises_an_alarm_that_says_where_the_rank_stands(prepare: Prepare) -> None:
    plan = replace(prepare("held", {"train.alarm_minutes": 0.02}).plan, learner=Held)
    alarm, told = vigil.Alarm(plan.folder, 0.02), list[str]()
    thread = threading.Thread(target=alone, args=(plan,), daemon=True)
    thread.start()
    while thread.is_alive():
        told += alarm.look()
        time.sleep(0.05)
    text = "\n".join(told)
    assert f"rank 0 (process {os.getpid()} on " in text
    assert "is in the forward pass, in step 3, for " in text
    assert text.count("no step for") == 1
    assert text.endswith("the run goes on")
    assert "in loss" in (plan.folder / "ranks" / "rank_0.stack").read_text()
    assert [standing.phase for standing in vigil.read(plan.folder)] == ["end"]


def test_the_terminal_follows_a_run_that_drops_lines_and_writes_them_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the new lines are longer than the ones that were dropped."""
    log = Log(tmp_path, rank=0)
    log.write({"kind": "stop", "step": 4, "reason": "of an earlier start"})
    follower = watch.Follower(tmp_path / "metrics.jsonl")
    for step in (5, 6, 7):
        log.write({"kind": "stop", "step": step, "reason": "s"})
        time.sleep(0.002)
    follower.show()
    assert capsys.readouterr().out.count("saved at step") == 3
    log.rewind(5)
    told = {"kind": "restart", "step": 5, "count": 1, "pause_s": 1.0}
    log.write(told | {"reason": "a long reason " * 99})
    log.write({"kind": "stop", "step": 6, "reason": "again"})
    follower.show()
    shown = capsys.readouterr().out.splitlines()
    assert [line[:30] for line in shown] == [
        "the workers failed for the 1. ", "they go on from step 5, after ", "saved at step 6, and stopping:",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- on a real Ray


def at_step(folder: Path, step: int, rank: int, number: signal.Signals) -> threading.Thread:
    """Sends a signal to the process of a rank, once that rank has come to a step."""

    def watch() -> None:
        deadline = time.monotonic() + 250
        while time.monotonic() < deadline:
            for standing in vigil.read(folder):
                if standing.rank == rank and standing.step >= step and standing.phase != "end":
                    os.kill(standing.pid, number)
                    return
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def wake(folder: Path, rank: int) -> None:
    """Lets the process of a rank that was stopped go on, once the other one's stack was written again."""
    deadline, stack, before = time.monotonic() + 250, folder / "ranks" / "rank_0.stack", -1
    while time.monotonic() < deadline:
        ranks = [each for each in vigil.read(folder) if each.rank == rank]
        if ranks and psutil.Process(ranks[0].pid).status() == psutil.STATUS_STOPPED:
            before = stack.stat().st_size if before < 0 else before
            if stack.stat().st_size > before:
                time.sleep(1.5)  # the terminal looks twice a second
                os.kill(ranks[0].pid, signal.SIGCONT)
                return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three groups of workers: a minute and a half, on a busy machine many
def test_workers_killed_or_asked_to_end_cost_no_sample(
    ray_cluster: cluster.Cluster, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "zero.engine": "deepspeed", "cluster.workers": 2, "train.epochs": 20, "train.max_steps": 60,
        "train.eval_every_steps": 30, "train.checkpoint_every_steps": 7, "cluster.max_failures": 1,
        "train.alarm_minutes": 0.05,
    }  # fmt: skip
    straight, hurt = prepare("straight", settings), prepare("hurt", settings)

    # -- one that is not disturbed, but for a worker that stands still until somebody is told ---------------------
    at_step(straight.folder, 20, 1, signal.SIGSTOP)
    threading.Thread(target=wake, args=(straight.folder, 1), daemon=True).start()
    watch.fit(straight.fit, straight.stop, straight.folder, settings["train.alarm_minutes"])
    shown = capsys.readouterr().out
    assert "no step for 0." in shown
    assert all(re.search(rf"rank {rank} \(process .*, in step 2\d, for", shown) for rank in range(2))
    assert "the run goes on" in shown
    assert "in train" in (straight.folder / "ranks" / "rank_0.stack").read_text()
    assert [row["step"] for row in trace.read(straight.folder)["rank_1"]] == list(range(1, 61))

    # -- SIGTERM of one worker: all save at that step, and the run ends ------------------------------------------
    asking = at_step(hurt.folder, 10, 1, signal.SIGTERM)
    watch.fit(hurt.fit, hurt.stop, hurt.folder)
    asking.join()
    (stopped,) = lines(hurt.folder, "stop")
    assert stopped["reason"] == "rank 1: SIGTERM"
    assert 10 <= stopped["step"] == hurt.resumed_step() < 60

    # -- kill -9 of one worker: the group starts again -----------------------------------------------------------
    killing = at_step(hurt.folder, stopped["step"] + 10, 1, signal.SIGKILL)
    watch.fit(hurt.fit, hurt.stop, hurt.folder)
    killing.join()
    (restart,) = lines(hurt.folder, "restart")
    assert restart["count"] == 1
    assert stopped["step"] <= restart["step"] < 60
    assert "rank 1 was killed: by somebody, or by the kernel" in restart["reason"]
    assert "lower train.micro_batch=2 train.accumulation=4 (now 4 x 2)" in restart["reason"]
    assert "images (4, 3, 16, 16)" in restart["reason"]
    assert "the workers failed for the 1. time: rank 1 was killed" in capsys.readouterr().out
    assert trace.read(hurt.folder) == trace.read(straight.folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_all_ranks_would_meet_again_is_not_tried_again(ray_cluster: cluster.Cluster, prepare: Prepare) -> None:
    work = prepare("hopeless", {"zero.engine": "deepspeed", "optim.lr": 1e30, "cluster.max_failures": 3})
    with pytest.raises(WorkersFailed, match="is no number"):
        work.fit()
    assert not (work.folder / "failures.jsonl").exists()
