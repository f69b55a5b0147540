"""Submitted trainings that are hurt on purpose, on a Ray of their own: a head without room for workers, two machines.

All of it on the loopback of one machine: a machine is a raylet. See `tests.bench.faults`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from jobs import cluster, submission
from mmagent import storage
from tests import machines

_TIMEOUT_S = 300.0  # of a job that takes half a minute
_LOOK_S = 0.2  # at whether a job has ended: Ray is asked over HTTP, and tells nobody by itself
KINDS = ("worker killed", "controller killed", "machine killed", "job killed", "job stopped")


class Machines:
    """The Ray of the rounds."""

    def __init__(self) -> None:
        self._head: cluster.Cluster | None = None
        self._client: Any = None

    def round(
        self, kind: str, name: str, settings: Mapping[str, Any], step: int, rng: random.Random
    ) -> tuple[int, bool, str]:
        """Trains a run as a job, hurts it at a step, and submits it again where it did not go on by itself.

        Returns:
            how often it was hurt, whether it hung, and why it did not come to its end.
        """
        self.start()
        recipe = storage.root() / "bench" / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "jobs.train", "--config", str(recipe), "--name", name, "--no-evaluate"]
        hurts, job = 0, ""
        try:
            job = self._submit(command)
            hurts = self._hurt(kind, storage.folder("runs", name), step, rng, job)
            status = self._ended(job)
            if status != "SUCCEEDED":  # the same command goes on
                job = self._submit(command)
                status = self._ended(job)
            words = "" if status == "SUCCEEDED" else f"the job {status}: {self._said(job)}"
            return hurts, False, words
        except TimeoutError as error:  # it does not end, or never came to the step
            return hurts, True, f"{error}: {self._said(job)}"
        finally:
            recipe.unlink()
            with contextlib.suppress(Exception):
                if job and not self._client.get_job_status(job).is_terminal():
                    submission._stop(self._client, job)

    def close(self) -> None:
        if self._head is not None:
            cluster.stop(self._head)

    def start(self) -> None:
        """Starts it, or the machines that it has lost; the first time before anything imports Ray."""
        if self._head is None:
            self._head = cluster.start(num_cpus=1, object_store_bytes=200_000_000)
            os.environ |= self._head.environment
            self._client = submission._connect(self._head.dashboard)
        while len(self._raylets()) < 3:  # the head's, and two machines'
            machines.join(self._head)

    def _raylets(self) -> list[psutil.Process]:
        assert self._head is not None
        return [each for each in cluster.marked(self._head.id) if each.name() == "raylet"]

    def _submit(self, command: list[str]) -> str:
        assert self._head is not None
        variables = {**submission.job_variables(), "PYTHONPATH": str(cluster.CHECKOUT)}
        return submission._submit(self._client, self._head.dashboard, shlex.join(command), {"env_vars": variables})

    def _ended(self, job: str) -> str:
        deadline = time.monotonic() + _TIMEOUT_S
        while not (status := self._client.get_job_status(job)).is_terminal():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the job has not ended after {_TIMEOUT_S:.0f} s")
            time.sleep(_LOOK_S)
        return str(status.value)

    def _said(self, job: str) -> str:
        with contextlib.suppress(Exception):
            return str(self._client.get_job_logs(job))[-2000:]
        return ""

    def _hurt(self, kind: str, folder: Path, step: int, rng: random.Random, job: str) -> int:
        """Waits until both ranks have come to a step, and hurts the run."""
        standings = machines.workers_of(folder, step, _TIMEOUT_S)
        victim = standings[rng.randrange(len(standings))]
        if kind == "job stopped":
            self._client.stop_job(job)
            return 1
        hit: dict[str, Callable[[], psutil.Process]] = {
            "worker killed": lambda: psutil.Process(victim.pid),
            "machine killed": lambda: machines.machine_of(victim),
            "controller killed": lambda: self._called("ray::TrainController"),
            "job killed": lambda: self._called(f"--name {folder.name}"),
        }
        with contextlib.suppress(psutil.NoSuchProcess):
            hit[kind]().send_signal(signal.SIGKILL)
            return 1
        return 0

    def _called(self, words: str) -> psutil.Process:
        """The process of this Ray whose command line says so; the last one in a chain of shells."""
        assert self._head is not None
        found = []
        for process in cluster.marked(self._head.id):
            with contextlib.suppress(psutil.NoSuchProcess):
                if words in " ".join(process.cmdline()):
                    found.append(process)
        if not found:
            raise psutil.NoSuchProcess(0)
        return max(found, key=lambda process: process.pid)
