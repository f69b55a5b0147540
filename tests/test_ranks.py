"""Ranks without Ray: what ends one of them is told, and the others end."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from jobs.ranks import RanksFailed, together
from jobs.workers import Group
from mmagent.config import Config, resolve


def killed(group: Group) -> None:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.all(True)


def failed(group: Group) -> None:
    if group.rank == 0:
        raise ValueError("no such thing")
    group.all(True)


@pytest.fixture
def config(tiny_recipe: dict[str, Any]) -> Config:
    return resolve(tiny_recipe, {"cluster.workers": 2})


def test_a_worker_that_is_killed_is_told_as_memory(config: Config) -> None:
    with pytest.raises(RanksFailed, match=r"killed, most likely by the kernel for memory.*train\.micro_batch"):
        together(killed, 2, config)


def test_the_error_of_a_worker_is_told_and_the_others_end(config: Config) -> None:
    with pytest.raises(RanksFailed, match="ValueError: no such thing"):
        together(failed, 2, config)
