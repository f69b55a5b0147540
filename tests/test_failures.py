"""Failures of workers: counted, with a pause that grows, and explained by what each rank told last."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import failures, forecast, vigil
from jobs.vigil import Post
from mmagent.config import resolve

KILLED = "WorkerHealthCheckFailedError: The actor died unexpectedly before finishing. Worker unexpectedly exits"


def test_the_pause_doubles_until_the_run_gets_on(tmp_path: Path) -> None:
    steps = [0, 0, 0, 20, 20, 40, *[40] * 8]
    noted = [failures.note(tmp_path, "a", step, "why") for step in steps]
    assert [each.count for each in noted] == list(range(1, 15))
    assert [each.pause_s for each in noted] == [1, 2, 4, 1, 2, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert failures.last(tmp_path, "a") == noted[-1]
    assert failures.last(tmp_path, "b") is None  # of the command given again
    assert failures.note(tmp_path, "b", 40, "why").count == 1
    assert len(failures.read(tmp_path)) == 15


def test_the_pause_ends_where_the_run_is_asked_to_stop(tmp_path: Path) -> None:
    failure = failures.Failure("a", 1, 0, "why", pause_s=0.3, time_s=0.0)
    began = time.monotonic()
    failures.wait(failure, lambda: True)
    assert time.monotonic() - began < 0.2
    failures.wait(failure, lambda: False)
    assert time.monotonic() - began >= 0.3


def test_what_a_rank_told_last_outlives_it(tmp_path: Path) -> None:
    child = os.fork()
    if not child:  # pragma: no cover
        post = Post(tmp_path, 1)
        post.at("data", step=36)
        post.at("forward", shapes={"ids": (32, 512), "image": (40, 3, 224, 224)})
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    (standing,) = vigil.read(tmp_path)
    assert (standing.rank, standing.pid, standing.step, standing.phase) == (1, child, 36, "forward")
    assert standing.shapes == {"ids": [32, 512], "image": [40, 3, 224, 224]}
    assert standing.free_bytes > 0


def test_a_batch_of_very_many_tensors_is_told_without_its_shapes(tmp_path: Path) -> None:
    post = Post(tmp_path, 0)
    post.at("forward", step=3, shapes={f"tensor_{index}": (1, 2, 3) for index in range(999)})
    (standing,) = vigil.read(tmp_path)
    assert (standing.step, standing.phase, standing.shapes) == (3, "forward", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (KILLED, "was killed: by somebody, or by the kernel for want of memory"),
        ("OutOfMemoryError: Task was killed due to the node running low on memory.", "ran out of memory"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "ran out of memory"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...", "ran out of memory"),
    ],
)
def test_a_rank_that_died_is_told_with_its_batch_and_the_setting_to_lower(
    tmp_path: Path, tiny_recipe: dict[str, Any], words: str, said: str
) -> None:
    post = Post(tmp_path, 1)
    post.at("data", step=36)
    post.at("backward", shapes={"ids": (32, 512), "mask": (32, 512), "image": (40, 3, 224, 224)})
    config = resolve(tiny_recipe, {"train.micro_batch": 32})
    told = {each.rank: each for each in vigil.read(tmp_path)}
    line = forecast.explain({0: "RuntimeError: Connection closed by peer", 1: words}, told, config)
    assert line.startswith(f"rank 1 {said}; it last said that it is in the backward pass, in step 37, ")
    assert "on a batch of image (40, 3, 224, 224), ids (32, 512)" in line
    assert "MiB were free when the step began" in line
    assert "lower train.micro_batch=16 train.accumulation=2 (now 32 x 1), or train.micro_batch=auto" in line


def test_another_error_is_told_in_its_own_words(tiny_recipe: dict[str, Any]) -> None:
    line = forecast.explain({0: "ValueError: a bad thing\nTraceback ..."}, {}, resolve(tiny_recipe, {}))
    assert line == "rank 0: ValueError: a bad thing"
    before = forecast.explain({0: KILLED}, {}, resolve(tiny_recipe, {"train.micro_batch": 1}))
    assert "before its first step" in before
    assert "train.micro_batch=" not in before


def test_the_alarm_says_who_waits_for_whom(tmp_path: Path) -> None:
    alarm = vigil.Alarm(tmp_path, minutes=0.002)
    posts = [Post(tmp_path, rank) for rank in range(3)]
    for post in posts:
        post.at("data", step=7)
    assert alarm.look() == []
    posts[0].at("collective")
    posts[2].at("backward")
    time.sleep(0.2)
    told = alarm.look()
    assert told[0].startswith("no step for 0.0 minutes")
    assert "rank 0" in told[1]
    assert "waits for the other ranks, in step 8, for 0 s" in told[1]
    assert "waits for data, in step 8" in told[2]
    assert "the others wait for rank 1" in told[4]
    assert alarm.look() == []  # once
    for post in posts:
        post.at("export", step=8)
    time.sleep(0.2)
    assert alarm.look() == []  # takes what it takes
    assert vigil.Alarm(tmp_path, minutes=None).look() == []
