"""What the loop takes from a validation; and the whole of it, killed and gone on with any number of workers, on gloo
without Ray. With Ray it is run in test_train.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from jobs import engine, loop, run, stream
from jobs.checkpoint import Checkpoints
from jobs.loop import State, note
from jobs.workers import Group
from mmagent import storage as storages
from mmagent.config import resolve
from mmagent.order import Position
from mmagent.record import Record
from mmagent.shards import Dataset
from tests import ranks


def noted(measured: list[tuple[float, float]], min_gain: float = 0.0) -> State:
    """The state after validations of these scores and losses, one a step."""
    state = State()
    for step, (score, loss) in enumerate(measured, 1):
        state.step = step
        note(state, score, loss, min_gain)
    return state


@pytest.mark.parametrize(
    ("measured", "best", "unimproved"),
    [
        ([(0.5, 1.0), (0.7, 2.0)], 2, 0),
        ([(0.7, 1.0), (0.5, 0.1), (0.6, 0.1)], 1, 2),
        ([(0.7, 1.0), (0.7, 0.5)], 2, 0),
        ([(0.7, 0.5), (0.7, 0.5), (0.7, 0.6)], 1, 2),
        ([(1.0, 0.5), (1.0, 0.4), (1.0, 0.3)], 3, 2),
        ([(0.7, 0.5), (0.8, 0.9), (0.8, 0.7), (0.7, 0.1)], 3, 1),
    ],
)
def test_a_better_score_is_a_gain_and_of_equal_ones_a_lower_loss(
    measured: list[tuple[float, float]], best: int, unimproved: int
) -> None:
    state = noted(measured)
    assert (state.best_step, state.unimproved) == (best, unimproved)
    assert (state.score, state.loss) == measured[-1]


def test_less_than_the_least_gain_is_the_best_but_no_gain() -> None:
    state = noted([(0.70, 1.0), (0.75, 0.9), (0.75, 0.5), (0.79, 0.4)], min_gain=0.1)
    assert (state.best_step, state.best_score, state.unimproved) == (4, 0.79, 3)
    assert noted([(0.7, 1.0), (0.85, 2.0)], min_gain=0.1).unimproved == 0


def test_once_patience_is_used_up_the_rate_falls_to_its_end(tiny_recipe: dict[str, Any]) -> None:
    config = resolve(tiny_recipe, {"train.patience": 2, "train.cooldown": 0.5, "optim.final_share": 0.0})
    state = noted([(0.7, 1.0), (0.5, 0.1)])
    state.step = 30
    assert not loop.cool(state, config, 100)
    note(state, 0.6, 0.1, 0.0)
    state.step = 40
    assert "step 60 is the last" in loop.cool(state, config, 100)
    assert (state.cooling, state.end) == (40, 60)
    note(state, 0.9, 0.1, 0.0)  # a gain while it cools changes nothing
    assert not loop.cool(state, config, 100)
    peak = engine.schedule(40, 100, config)
    rates = [engine.cooldown(step, 40, 60, 100, config) for step in (40, 50, 59)]
    assert rates == pytest.approx([peak, peak / 2, peak / 20])


@pytest.mark.parametrize(("cooldown", "step", "last"), [(0.0, 40, 40), (0.25, 40, 50), (1.0, 80, 100)])
def test_a_cooldown_is_no_longer_than_the_run(
    tiny_recipe: dict[str, Any], cooldown: float, step: int, last: int
) -> None:
    config = resolve(tiny_recipe, {"train.patience": 1, "train.cooldown": cooldown})
    state = State(step=step, unimproved=1)
    assert loop.cool(state, config, 100)
    assert state.end == last


# ---------------------------------------------------------------------------------------------- killed, and gone on

STEPS, KILLED = 12, 7  # of 8 rows; the step whose rows a worker dies of
NEVER = 1 << 30  # rows are read ahead, also of steps behind the last


def work(rank: int, world: int, given: Path) -> None:
    """The whole loop of one of two workers, twice: to its end, and until one of them is killed."""
    straight, halting = torch.load(given, weights_only=False)
    loop.train(group_of(straight, rank, world), straight)
    loop.train(group_of(halting, rank, world, killed=KILLED if rank == 1 else NEVER), halting)


def go_on(rank: int, world: int, given: Path) -> None:
    """The loop of a copy of the killed run, for each number of workers one."""
    plan = torch.load(given, weights_only=False)[1]
    plan = replace(plan, folder=plan.folder.with_name(f"halting_{world}"))
    loop.train(group_of(plan, rank, world), plan)


def group_of(plan: loop.Plan, rank: int, world: int, killed: int = NEVER) -> Group:
    """A worker's group without Ray; what it read at which step goes to a file."""

    def blocks(name: str) -> Iterator[pa.Table]:
        layout = stream.layout_of(plan.config, world)
        if name == "validation":
            yield from stream.tables(plan.order, layout, Position(), 1, rank)
            return
        found = Checkpoints(plan.folder / "checkpoints", rank=0, barrier=bool, keep_last=1).latest()
        state = loop.restore(found) if found else State()
        left = STEPS - state.step
        for step, table in enumerate(stream.tables(plan.order, layout, state.position, left, rank), state.step + 1):
            if step == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            read = [
                row for row, weight in zip(table["id"].to_pylist(), table["weight"].to_pylist(), strict=True) if weight
            ]
            with open(plan.folder / f"read_{rank}.jsonl", "a") as file:
                file.write(json.dumps([step, read]) + "\n")
            yield table

    return Group(rank=rank, world=world, blocks=blocks, report=lambda _: True)


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def rows_of(folder: Path) -> dict[int, Counter[str]]:
    """What all workers read for each step; of one that was read twice, the second time."""
    out: dict[int, Counter[str]] = {}
    for file in folder.glob("read_*.jsonl"):
        mine = dict(json.loads(line) for line in file.read_text().splitlines())
        for step, names in mine.items():
            out[step] = out.get(step, Counter()) + Counter(names)
    return {step: names for step, names in out.items() if step <= STEPS}


def test_a_run_that_cools_down_ends_and_goes_on_where_it_stood(
    storage: Path, tiny_recipe: dict[str, Any], make_dataset: Callable[..., Dataset],
    make_records: Callable[..., list[Record]],
) -> None:  # fmt: skip
    make_dataset(storage / "data" / "tiny", {"train": make_records(44), "validation": make_records(8, "validation")})
    settings = {
        "train.micro_batch": 8, "train.max_steps": STEPS, "train.epochs": 9, "train.eval_every_steps": 4,
        "train.patience": 1, "train.min_gain": 1.0, "train.cooldown": 0.4, "train.keep_last": 9, "zero.stage": 0,
        "zero.engine": "torch", "optim.final_share": 0.0, "optim.schedule": "constant",
        "train.checkpoint_every_steps": 1, "cluster.workers": 1,
    }  # fmt: skip
    plan = run.prepare(resolve(tiny_recipe, settings), storages.folder("runs", "cool"), export=False).plan
    loop.train(group_of(plan, 0, 1), plan)
    rows = [json.loads(line) for line in (plan.folder / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: (row["lr"], row["total_steps"]) for row in rows if row["kind"] == "train"}
    assert max(rates) == 11  # no gain at 8, so three steps more: the fewest that are two fifths of 8
    assert rates[8] == (pytest.approx(1e-3), STEPS)
    assert [rates[step] for step in (9, 10, 11)] == [(pytest.approx(1e-3 * left / 3), 11) for left in (3, 2, 1)]
    assert any("step 11 is the last" in row["note"] for row in rows if row["kind"] == "note")
    for step in (10, 11):  # as if it had been killed in between
        shutil.rmtree(next((plan.folder / "checkpoints").glob(f"*{step}")))
    wanted = losses(plan.folder)
    loop.train(group_of(plan, 0, 1), plan)
    assert losses(plan.folder) == wanted
    loop.train(group_of(plan, 0, 1), plan)  # there is nothing left to do
    assert losses(plan.folder) == wanted


@pytest.mark.long
@pytest.mark.timeout(900)  # half a minute; on a machine where much else runs, many
@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    storage: Path, tiny_recipe: dict[str, Any], make_dataset: Callable[..., Dataset],
    make_records: Callable[..., list[Record]], stage: int,
) -> None:  # fmt: skip
    """With as many workers the losses are the same to the last bit; with more or fewer, each row is read once all the
    same, and the losses differ by rounding."""
    make_dataset(storage / "data" / "tiny", {"train": make_records(44), "validation": make_records(8, "validation")})
    still = {"model.dropout": 0.0, "model.audio.dropout": 0.0}  # a worker has a dropout of its own
    settings = {
        "train.micro_batch": 4, "train.global_batch": 8, "train.max_steps": STEPS, "train.eval_every_steps": 1,
        "train.epochs": 9, "cluster.workers": 2, "zero.stage": stage, "data.window_rows": 20, **still,
    }  # fmt: skip
    plans = [
        run.prepare(resolve(tiny_recipe, settings), storages.folder("runs", name), export=False).plan
        for name in ("straight", "halting")
    ]
    torch.save(plans, storage / "given.pt")
    with pytest.raises(AssertionError):
        ranks.run("tests.test_loop:work", storage / "given.pt", (2,), timeout_s=400)
    straight, halting = (plan.folder for plan in plans)
    reached = max(losses(halting))
    assert sorted(losses(straight)) == list(range(1, STEPS + 1))
    assert 1 <= reached < KILLED
    for world in (1, 2, 3):
        shutil.copytree(halting, halting.with_name(f"halting_{world}"))
        for file in halting.with_name(f"halting_{world}").glob("read_*"):
            file.unlink()
    ranks.run("tests.test_loop:go_on", storage / "given.pt", (1, 2, 3), timeout_s=400)
    wanted = losses(straight)
    assert losses(halting.with_name("halting_2")) == wanted
    for world in (1, 2, 3):
        folder = halting.with_name(f"halting_{world}")
        assert losses(folder) == pytest.approx(wanted, rel=1e-4), world
        read = rows_of(folder)
        assert read == {step: rows_of(straight)[step] for step in read}
        assert max(read) == STEPS
        assert min(read) <= reached + 1
