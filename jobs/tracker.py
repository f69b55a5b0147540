"""The process beside a command that sends a run's figures to tracking servers: started by `jobs.track`, not by hand.

It reads what it is to do from its standard input: a line of JSON, and later a line that says how the run ended. Where
that input is closed before, the command was killed, and so is the run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jobs import track
from jobs.ledgers import Ledger, Sheet, make
from mmagent import storage

_LOOK_S = 2.0  # between two looks into the files
_RETRY_S = (2.0, 30.0)  # between two tries of a server that does not answer: the first, the longest
_LAST_TRIES = 2  # after the end, of a server that never answered
_ROWS = 200  # sent at once
_FILES = ("config.yaml", "search.yaml", "evaluation.json", "report.html", "bundle/manifest.json", "bundle/README.md")
_PACKAGES = ("mmagent", "ray", "torch", "transformers", "deepspeed")


def main() -> int:
    spec = json.loads(sys.stdin.readline())
    storage.use(spec["root"])
    folder = Path(spec["folder"])
    say = _aside(folder / track.FOLDER / track.LOG)
    followers = [Follower(server, uri, spec["experiment"], folder, say) for server, uri in spec["servers"].items()]
    threads = [threading.Thread(target=each.follow, name=each.server, daemon=True) for each in followers]
    for thread in threads:
        thread.start()
    status = sys.stdin.readline().strip() or track.STOPPED
    for each in followers:
        each.end(status)
    deadline = time.monotonic() + spec["patience_s"]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        os._exit(1)  # a client may wait for its server for hours, also when Python ends
    return 0


def _aside(log: Path) -> Any:
    """What MLflow and W&B say goes into a file; what is given to the function that comes back, to the terminal."""
    terminal = os.fdopen(os.dup(1), "w", buffering=1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    return lambda line: print(line, file=terminal, flush=True)


class Follower:
    """Sends to one server, in a thread of its own: one that is down holds up no other.

    Args:
        uri: where it is, or the project.
        folder: of a run or a search.
        say: a line to who started the command.
    """

    def __init__(self, server: str, uri: str, experiment: str, folder: Path, say: Any) -> None:
        self.server = server
        self._uri, self._experiment, self._folder, self._say = uri, experiment, folder, say
        self._ledger: Ledger | None = None
        self._status = ""
        self._over = threading.Event()
        self._begun: dict[Path, str] = {}  # by this process

    def end(self, status: str) -> None:
        self._status = status
        self._over.set()

    def follow(self) -> None:
        """Until all is sent of a run that has ended."""
        pause_s, told, last_tries = _RETRY_S[0], False, _LAST_TRIES
        while True:
            last = self._over.is_set()
            try:
                self._send()
                if last:
                    self._close()
                    return
                pause_s = _RETRY_S[0]
                self._over.wait(_LOOK_S)
            except Exception as error:  # noqa: BLE001  whatever a server or its client raises, the training goes on
                words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                self._note(self._folder, error=words)
                if not told:
                    self._say(f"track.{self.server}={self._uri} takes nothing now ({words}); the run goes on, and it "
                              "is tried again")  # fmt: skip
                    told = True
                last_tries -= last
                if last and not self._begun and not last_tries:
                    return  # it has taken nothing so far: nobody waits for it
                if last:
                    time.sleep(_RETRY_S[0])  # until who waits for us has no more patience
                else:
                    self._over.wait(pause_s)
                pause_s = min(2 * pause_s, _RETRY_S[1])

    def _send(self) -> None:
        """What is new in every place."""
        if self._ledger is None:
            self._ledger = make(self.server, self._uri, self._folder / track.FOLDER)
        for place in track.places(self._folder):
            if not (place / "config.yaml").exists() and not (place / "search.yaml").exists():
                continue  # what is wrong with the recipe may be told yet
            known = track.note(place, self.server, self._uri)
            rows = track.unsent(place, known.get("until_s", 0.0))
            if place not in self._begun and (rows or place == self._folder):
                self._begin(place, known)
            while rows:
                part, rows = rows[:_ROWS], rows[_ROWS:]
                self._ledger.write(self._begun[place], part)
                sent = track.note(place, self.server, self._uri).get("sent", 0) + len(part)
                self._note(place, until_s=part[-1]["time_s"], sent=sent, error=None)

    def _begin(self, place: Path, known: Mapping[str, Any]) -> None:
        assert self._ledger is not None
        child = place != self._folder
        name = f"{self._folder.name}/{place.name}" if child else _name(place)
        sheet = Sheet(
            name=name, experiment=self._experiment, folder=place, id=known.get("id"),
            parent=self._begun[self._folder] if child else None, params=_params(place), facts=_facts(place),
        )  # fmt: skip
        self._begun[place] = id = self._ledger.begin(sheet)
        self._note(place, id=id, ended=None, error=None)

    def _close(self) -> None:
        assert self._ledger is not None
        for place in reversed(track.places(self._folder)):  # a search after its trials
            id = self._begun.get(place)
            if id is None:
                continue
            self._ledger.figures(id, _figures(place))
            self._ledger.facts(id, _bundle(place))
            trouble = ""
            for name in _FILES:
                if (file := place / name).is_file():
                    trouble = self._ledger.file(id, file, str(Path(name).parent)) or trouble
            status = self._status if place == self._folder else track.FINISHED
            self._ledger.end(id, status)
            self._note(place, ended=status, **({"files": trouble} if trouble else {}))
            if trouble and place == self._folder:
                self._say(f"track.{self.server} has the figures, but takes no files: {trouble}")
        self._ledger.close()

    def _note(self, place: Path, **changed: Any) -> None:
        known = track.note(place, self.server, self._uri)
        storage.publish_json(track.note_file(place, self.server), {**known, "uri": self._uri, **changed})


def _name(place: Path) -> str:
    """A run's name, with that of a learning curve before its points'."""
    return f"{place.parent.parent.name}/{place.name}" if place.parent.name == "points" else place.name


def _params(place: Path) -> dict[str, str]:
    """The resolved config by dotted keys."""
    file = place / "search.yaml"
    raw = yaml.safe_load((file if file.exists() else place / "config.yaml").read_text())
    return {key: str(value) for key, value in _flat(raw) if not key.startswith("track.")}


def _flat(tree: Any, path: str = "") -> Any:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}{key}.")
    else:
        yield path[:-1], tree


def _facts(place: Path) -> dict[str, str]:
    """Of the machine that the command runs on; what the workers have is in usage.jsonl."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "folder": str(place), "host": socket.gethostname(), "cores": str(os.cpu_count()),
        "python": platform.python_version(), "platform": platform.platform(), **versions,
    }  # fmt: skip


def _figures(place: Path) -> dict[str, float]:
    """What the test split said, and a search's winner."""
    found: dict[str, float] = {}
    if (file := place / "evaluation.json").is_file():
        result = json.loads(file.read_text())
        parts = {"": result, **{f"{name}/": part for name, part in result.get("tasks", {}).items()}}
        for name, part in parts.items():
            for key, metric in part.get("metrics", {}).items():
                for bound in ("value", "low", "high"):
                    if isinstance(metric.get(bound), (int, float)):
                        end = "" if bound == "value" else f"/{bound}"
                        found[f"{result['split']}/{name}{key}{end}"] = float(metric[bound])
    if (file := place / "winner.json").is_file():
        found["search/score"] = float(json.loads(file.read_text())["score"])
    return found


def _bundle(place: Path) -> dict[str, str]:
    """Which bundle came of it; its hash is that of its manifest, which holds those of its files."""
    manifest = place / "bundle" / "manifest.json"
    if not manifest.is_file():
        return {}
    name = json.loads(manifest.read_text()).get("name", "")
    return {"bundle": str(name), "bundle.path": str(manifest.parent), "bundle.sha256": storage.digest(manifest)}


if __name__ == "__main__":
    sys.exit(main())
