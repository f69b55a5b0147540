"""One submitted job, from its upload to its exit code: what `ray job submit` does, with three things more.

The exit code is the command's own; a stream of logs that breaks off is taken up again; and a command that already runs
in the cluster is followed instead of started twice (a terminal was closed, a connection was lost).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import cluster, parcel
from mmagent import storage

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_TIMEOUT_S = 60.0
RETRY_S = 2.0
AGENT_TIMEOUT_S = 60.0  # in which the part of a new Ray that starts jobs is there, also on a busy machine
# How long Ray lets a job write its last checkpoint when it is stopped; its own choice is 3 seconds.
JOB_STOP_WAIT_S = 30


class JobFailed(RuntimeError):
    """A job that did not succeed; the message says how it ended."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NoCluster(RuntimeError):
    """No Ray answers at the address, or it refuses; the message says what to do."""


def run(address: str, command: Sequence[str], working_dir: Path) -> float:
    """Submits a command, prints its logs while it runs, and returns after how many seconds it succeeded.

    Ctrl-C stops the job before it leaves.

    Raises:
        JobFailed: it failed or was stopped.
        NoCluster: nobody answers at `address`, or the token is wrong.
        ParcelError: the working directory is far larger than code is.
    """
    start = time.monotonic()
    client = _connect(address)
    variables = job_variables()
    job_id = _running(client, shlex.join(command))
    if job_id:
        print(f"already running, its output follows: {shlex.join(command)}")
    else:
        parcel.check(working_dir)
        print(f"$ {as_typed(address, command, variables)}")
        runtime_env = {"working_dir": str(working_dir), "env_vars": variables}
        job_id = _submit(client, address, shlex.join(command), runtime_env)
    sys.stdout.flush()
    try:
        asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        _stop(client, job_id)
        raise
    info = client.get_job_info(job_id)
    if info.status.value != "SUCCEEDED":
        code = info.driver_exit_code
        reason = f"exit code {code}" if code else (info.message or "").strip()
        raise JobFailed(f"`{shlex.join(command)}` {info.status.value.lower()}: {reason}", code or 1)
    return time.monotonic() - start


def job_variables() -> dict[str, str]:
    """What travels in a job's runtime environment."""
    return {
        **storage.variables(),
        "PYTHONUNBUFFERED": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_WAIT_S),
    }


def as_typed(address: str, command: Sequence[str], env_vars: Mapping[str, str]) -> str:
    """The shell command that does the same."""
    env = json.dumps({"env_vars": dict(env_vars)})
    submit = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--runtime-env-json", env, "--"]
    return f"RAY_AUTH_MODE=token {shlex.join([*submit, *command])}"


def _connect(address: str) -> JobSubmissionClient:
    cluster.adopt(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # What is packed and what is left out, a dozen lines for each job, is .rayignore's business and known.
    logging.getLogger("ray").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)
    try:
        with _only(address):
            return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise NoCluster(
            f"no Ray takes jobs at {address}: {str(error).strip()}\n"
            "Start one with `cluster/local.sh up`, or set RAY_ADDRESS; where it asks for "
            "a token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where it does not lie in ~/.ray/auth_token"
        ) from error


@contextlib.contextmanager
def _only(address: str) -> Iterator[None]:
    """Ray lets its variables win over the address that it is given: for this moment they say the same."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _submit(client: JobSubmissionClient, address: str, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """A Ray that has just begun answers before it can start a job."""
    end = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > end:
                raise NoCluster(
                    f"Ray at {address} starts no job: no agent of it was there for {AGENT_TIMEOUT_S:.0f} s; look at "
                    "dashboard_agent.log in its folder of logs, or stop it and start another"
                ) from error
        time.sleep(RETRY_S)


def _running(client: JobSubmissionClient, entrypoint: str) -> str | None:
    """The job that runs this very command, if there is one."""
    for job in client.list_jobs():
        if job.submission_id and job.entrypoint == entrypoint and not job.status.is_terminal():
            return str(job.submission_id)
    return None


async def _follow(client: JobSubmissionClient, job_id: str) -> None:
    """Prints the job's output until it has ended; output is repeated from its start when the stream is taken up."""
    printed = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job_id):
                fresh = text[max(0, printed - seen) :]
                seen += len(text)
                printed = max(printed, seen)
                print(fresh, end="", flush=True)
        except (RuntimeError, OSError) as error:
            print(f"[the stream of logs broke off: {error}]", file=sys.stderr)
        # The stream ends a moment before the job is marked as ended.
        if client.get_job_status(job_id).is_terminal():
            return
        await asyncio.sleep(RETRY_S)


def _stop(client: JobSubmissionClient, job_id: str) -> None:
    print(f"\nstopping the job {job_id} ...", file=sys.stderr)
    client.stop_job(job_id)
    end = time.monotonic() + STOP_TIMEOUT_S
    while not client.get_job_status(job_id).is_terminal():
        if time.monotonic() > end:
            print(f"it still runs after {STOP_TIMEOUT_S:.0f} s: `ray job stop {job_id}`", file=sys.stderr)
            return
        time.sleep(0.5)
