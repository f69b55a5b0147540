"""The split of a loop's time: all of it, each moment once, exchanges inside other phases with it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from jobs.phases import VALIDATION, Phases, Timed
from mmagent.stalls import PHASES


class Alone:
    def sum(self, values: list[float]) -> list[float]:
        return values


class Slower:
    """A group whose other rank took twice as long."""

    mine: list[float]

    def sum(self, values: list[float]) -> list[float]:
        self.mine = values
        return [*(3 * value for value in values[:-1]), 2 * values[-1]]


class Backend:
    """Exchanges that take a while."""

    name = "slow"

    def all_reduce(self, seconds: float, async_op: bool = False) -> Backend | None:
        time.sleep(0 if async_op else seconds)
        return self if async_op else None

    def wait(self) -> str:
        time.sleep(0.03)
        return "done"

    def get_rank(self) -> int:
        time.sleep(0.03)
        return 5


def step(phases: Phases) -> None:
    for name, seconds in (("wait", 0.02), ("copy", 0.01), ("forward", 0.03), ("backward", 0.04), ("optimizer", 0.01)):
        phases.enter(name)
        time.sleep(seconds)
    phases.enter("other")


def test_the_phases_of_steps_add_up_to_their_time() -> None:
    before = time.perf_counter()
    phases = Phases(torch.device("cpu"))
    began = time.perf_counter()
    for _ in range(3):
        step(phases)
    ended = time.perf_counter()
    found = phases.read(Alone(), 3)
    after = time.perf_counter()
    assert set(found) == {"step_s", *(f"{name}_s" for name in PHASES)}
    assert ended - began <= 3 * found["step_s"] <= after - before
    assert sum(found[f"{name}_s"] for name in PHASES) == pytest.approx(found["step_s"])
    # A busy machine may hold a phase up, and cannot hurry it.
    least = {"wait_s": 0.02, "copy_s": 0.01, "forward_s": 0.03, "backward_s": 0.04, "optimizer_s": 0.01}
    assert all(found[name] >= seconds for name, seconds in least.items())
    assert found["communication_s"] == found["checkpoint_s"] == 0
    again = phases.read(Alone(), 3)  # a new interval
    assert again["step_s"] * 3 <= time.perf_counter() - ended


def test_it_is_the_mean_over_ranks() -> None:
    phases, group = Phases(torch.device("cpu")), Slower()
    phases.enter("forward")
    time.sleep(0.02)
    found = phases.read(group, 1)
    assert group.mine[PHASES.index("forward")] >= 0.02
    assert found["forward_s"] == pytest.approx(1.5 * group.mine[PHASES.index("forward")])


def test_validation_is_no_part_of_a_step() -> None:
    phases = Phases(torch.device("cpu"))
    phases.enter(VALIDATION)
    with phases.within("communication"):
        time.sleep(0.05)
    phases.enter("checkpoint")
    with phases.within("communication"):
        time.sleep(0.02)
    found = phases.read(Alone(), 1)
    assert found["communication_s"] == 0
    assert found["checkpoint_s"] >= 0.02
    assert found["step_s"] == pytest.approx(found["checkpoint_s"] + found["other_s"])


def test_exchanges_count_wherever_they_are_made() -> None:
    phases = Phases(torch.device("cpu"))
    backend = Timed(Backend(), phases)
    assert backend.name == "slow"
    phases.enter("backward")
    backend.all_reduce(0.05)
    assert backend.get_rank() == 5
    assert backend.all_reduce(9.0, async_op=True).wait() == "done"
    found = phases.read(Alone(), 1)
    assert found["communication_s"] >= 0.08
    assert found["backward_s"] >= 0.03
    assert found["step_s"] < 9


def test_another_threads_exchanges_run_beside_the_loop() -> None:
    phases = Phases(torch.device("cpu"))
    phases.enter("forward")
    beside = threading.Thread(target=Timed(Backend(), phases).all_reduce, args=(0.05,))
    beside.start()
    beside.join()
    found = phases.read(Alone(), 1)
    assert found["communication_s"] == 0
    assert found["forward_s"] > 0.04


@pytest.mark.gpu
def test_a_gpus_phases_are_the_time_of_its_work() -> None:
    phases = Phases(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    x @ x
    torch.cuda.synchronize()
    phases.read(Alone(), 1)
    began = time.perf_counter()
    phases.enter("wait")
    time.sleep(0.05)
    phases.enter("forward")
    for _ in range(50):
        x @ x
    phases.enter("other")
    found = phases.read(Alone(), 1)
    assert found["step_s"] == pytest.approx(time.perf_counter() - began, rel=0.05)
    assert found["wait_s"] == pytest.approx(0.05, abs=0.01)
    assert found["forward_s"] > 0.005
