"""What the loop measures of itself, against sums done by hand, and the file it goes into."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from jobs.meter import METRICS_FILE, Log, Meter
from jobs.supervised import hits_of
from tests.conftest import classify


class Twins:
    """A group of two ranks that measured the same."""

    def sum(self, values: list[float]) -> list[float]:
        return [2 * value for value in values]


def micro(right: int, wrong: int, blank: int = 0, unlabelled: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and a batch with so many right and wrong answers, filled-up rows and rows without a label."""
    size = right + wrong + blank + unlabelled
    logits = torch.zeros(size, 3)
    logits[:, 1] = 1
    labels = torch.tensor([1] * right + [2] * wrong + [1] * blank + [-100] * unlabelled)
    weights = torch.tensor([1.0] * (right + wrong) + [0.0] * blank + [1.0] * unlabelled)
    return logits, {"classify/label": labels, "weight": weights}


def add(meter: Meter, loss: float, right: int, wrong: int, blank: int = 0, unlabelled: int = 0) -> None:
    logits, batch = micro(right, wrong, blank, unlabelled)
    tasks = classify("abc")
    meter.add(*hits_of({"classify": logits}, batch, tasks), torch.tensor(loss * len(logits)))


def test_the_figures_of_an_interval_over_all_ranks() -> None:
    meter = Meter()
    add(meter, 1.0, right=3, wrong=1)
    add(meter, 2.0, right=1, wrong=3, blank=2, unlabelled=2)
    meter.end_step(12)
    figures = meter.read(Twins())
    assert figures["loss"] == pytest.approx((4 * 1.0 + 8 * 2.0) / 12)
    assert figures["accuracy"] == pytest.approx(4 / 8)
    assert (figures["samples"], figures["steps"]) == (24, 1)
    assert figures["samples_per_s"] > 0
    again = meter.read(Twins())  # a new interval
    assert (again["loss"], again["samples"], again["steps"]) == (0, 0, 0)


def test_waiting_counts_after_the_first_ten_steps() -> None:
    meter = Meter()
    for step in range(14):
        time.sleep(0.02)
        meter.waited(5.0 if step < 10 else 0.005)
        meter.end_step(8)
    assert 0.1 < meter.wait_share() < 0.26  # a quarter, less what the machine adds


def test_what_lies_between_intervals_is_no_training() -> None:
    meter = Meter()
    for _ in range(12):
        meter.end_step(8)
    time.sleep(0.3)  # a validation
    meter.restart()
    meter.waited(0.05)
    time.sleep(0.05)
    meter.end_step(8)
    assert meter.wait_share() > 0.3


def test_a_short_start_has_no_wait_share() -> None:
    assert Meter().wait_share() == 0


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_the_log_is_written_once_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    log = Log(tmp_path, rank=0)
    for step in (10, 20, 30):
        log.write({"kind": "train", "step": step, "loss": 1 / step})
    Log(tmp_path, rank=1).write({"kind": "train", "step": 10, "loss": 9.0})
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    resumed = Log(tmp_path, rank=0)
    resumed.rewind(20)
    resumed.write({"kind": "train", "step": 21, "loss": 0.0})
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 21]
    assert all(row["time_s"] > 1e9 for row in rows(tmp_path))
    assert list((tmp_path / "tb").glob("events.out.tfevents.*"))


def test_a_run_that_never_saved_begins_anew(tmp_path: Path) -> None:
    log = Log(tmp_path, rank=0)
    log.rewind(0)
    log.write({"kind": "train", "step": 1})
    log.rewind(0)
    assert rows(tmp_path) == []
