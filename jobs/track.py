"""A run in MLflow and at Weights & Biases, by a line in its recipe (`track.mlflow`, `track.wandb`).

    python -m jobs.train --config RECIPE --name NAME track.mlflow=http://127.0.0.1:5000
    python -m jobs.search ... track.wandb=PROJECT      # a run for the search, with its trials below it

What is sent is what rank 0 writes into the run's folder anyway, by a process of its own beside the command
(`jobs.tracker`): the file is the queue, so a server that is slow or down costs a training nothing, no figure is lost
while the folder is there, and the memory that is taken is bounded. How far each server is stands in
runs/NAME/track/SERVER.json, with the id that it gave the run: a run that goes on goes on there. At the end the command
waits a while for what is left, says what did not arrive, and sends it when it is given again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent import storage
from mmagent.config import ConfigError, TrackConfig

FOLDER = "track"  # in that of a run
LOG = "log.txt"  # what MLflow and W&B themselves say
FINISHED, STOPPED, FAILED = "FINISHED", "KILLED", "FAILED"  # MLflow's words
SERVERS = {"mlflow": "mlflow", "wandb": "wandb"}  # a key of `track`, and the package that it wants
_PATIENCE_S = 30.0  # for what is left at the end
_BELOW = ("trials", "seeds")  # folders of a search, with those of runs
_GRACE_S = 5.0  # for the process to end by itself


@dataclass(slots=True)
class End:
    """How what is tracked ended; the caller says so."""

    status: str = FINISHED


@dataclass(frozen=True, slots=True)
class Left:
    """What a server does not have."""

    server: str
    rows: int  # lines of figures
    error: str

    def __str__(self) -> str:
        what = f"{self.rows} lines of figures" if self.rows else "the end of the run"
        return f"{self.server} does not have {what}: {self.error or 'it was too slow'}; the same command sends the rest"


def wanted(track: TrackConfig) -> list[str]:
    """The servers that a recipe names."""
    return [server for server in SERVERS if getattr(track, server) is not None]


def check(track: TrackConfig) -> None:
    """
    Raises:
        ConfigError: the package that a server wants is not installed.
    """
    for server in wanted(track):
        if importlib.util.find_spec(SERVERS[server]) is None:
            raise ConfigError(
                f"track.{server}={getattr(track, server)} needs the package {SERVERS[server]}, which is not "
                "installed: pip install -c constraints.txt -e '.[track]', or leave the key out"
            )


@contextlib.contextmanager
def following(track: TrackConfig, folder: Path, *, patience_s: float = _PATIENCE_S) -> Iterator[End]:
    """Has what is written into a folder, that of a run or a search, sent to the servers while the block lasts."""
    end = End()
    if not wanted(track) or all(_ended(folder, server, getattr(track, server)) for server in wanted(track)):
        yield end
        return
    process = _start(track, folder, patience_s)
    try:
        yield end
    except BaseException as error:
        end.status = STOPPED if isinstance(error, KeyboardInterrupt) else FAILED
        raise
    finally:
        _finish(process, end.status, patience_s)
        for line in left(track, folder):
            print(line, flush=True)


def left(track: TrackConfig, folder: Path) -> list[Left]:
    """What the servers do not have of a run or search."""
    found = []
    for server in wanted(track):
        known = {place: note(place, server, getattr(track, server)) for place in places(folder)}
        rows = sum(len(unsent(place, each.get("until_s", 0.0))) for place, each in known.items())
        error = next((str(each["error"]) for each in known.values() if each.get("error")), "")
        if rows or not known[folder].get("ended"):
            found.append(Left(server, rows, error))
    return found


def places(folder: Path) -> list[Path]:
    """The folders whose figures are sent: that of a run, or of a search and its trials."""
    return [folder, *sorted(file.parent for file in folder.glob("*/*/config.yaml") if file.parts[-3] in _BELOW)]


def unsent(place: Path, until_s: float) -> list[dict[str, Any]]:
    """The lines of figures behind a time. A run that goes on writes those that it drops again, with a later one."""
    if (place / "search.yaml").exists():  # its figures are its trials'
        return []
    file = place / "metrics.jsonl"
    try:
        text = file.read_text()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if row["kind"] in ("train", "validation") and row["time_s"] > until_s]


def note(place: Path, server: str, uri: str) -> dict[str, Any]:
    """How far a server is with a run; nothing of what another address was sent."""
    try:
        found: dict[str, Any] = json.loads(note_file(place, server).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if found.get("uri") == uri else {}


def note_file(place: Path, server: str) -> Path:
    """Where that stands; of a trial with its search, which may make the trial's folder anew."""
    if place.parent.name in _BELOW:
        return place.parent.parent / FOLDER / f"{server}-{place.name}.json"
    return place / FOLDER / f"{server}.json"


def _ended(folder: Path, server: str, uri: str) -> bool:
    """Whether a server has all of a run that came to its end."""
    known = note(folder, server, uri)
    return known.get("ended") == FINISHED and not unsent(folder, known.get("until_s", 0.0))


def _start(track: TrackConfig, folder: Path, patience_s: float) -> subprocess.Popen[str]:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    spec = {
        "folder": str(folder), "root": storage.variables(), "experiment": track.experiment,
        "servers": {server: getattr(track, server) for server in wanted(track)}, "patience_s": patience_s,
    }  # fmt: skip
    # A session of its own: Ctrl-C in a terminal is the command's, which then says how the run ended.
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.tracker"], stdin=subprocess.PIPE, text=True, start_new_session=True,
        cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    _tell(process, json.dumps(spec))
    return process


def _finish(process: subprocess.Popen[str], status: str, patience_s: float) -> None:
    _tell(process, status)
    try:
        process.wait(patience_s + _GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        with contextlib.suppress(BrokenPipeError):
            if process.stdin:
                process.stdin.close()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # it has ended: what is left is told at the end
        process.stdin.write(line + "\n")
        process.stdin.flush()
