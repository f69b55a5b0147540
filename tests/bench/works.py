"""What goes on while machines fall ill (`tests.bench.cluster`): a training, a search and a service, each of which tells
what it has lost and how long it stood still.

A command that ends in failure is given once more, as an operator or a Kubernetes job would do. All of it is tiny: the
model and the data of `tests.bench.lab`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import yaml

from jobs import trace, vigil, watch
from mmagent import config as configs
from mmagent import storage
from mmagent.config import Config
from tests.bench import lab
from tests.bench.hurt import Groups
from tests.network import SERVE_PORT, Machine, Machines

_LOOK_S = 0.1
_STARTS = 4  # of a command, at the most
_ENDS_S = 900.0  # in which a command comes to its end
_SETUP = "stage 1, connector"  # what is frozen is not sent around
_KEY = "a-key-for-the-measurement-alone"
_TRIES = 4  # of a request: the client's own, each at another machine
_CLIENTS, _PAUSE_S = 3, 0.3


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a work."""

    lost: int
    recover_s: float  # the longest that it stood still since the fault
    words: str


class Work(Protocol):
    def begin(self) -> None: ...

    def ready(self) -> None:
        """Returns when it is in the middle of its work."""

    def hurt(self) -> None:
        """The fault happens now."""

    def end(self) -> Told: ...


class _Command:
    """A command on the head, given again until it succeeds."""

    def __init__(self, machines: Machines, command: Sequence[str], said: Path) -> None:
        self._machines, self._command, self._said = machines, command, said
        self.starts = 0
        self.hung = False
        self._over = threading.Event()
        self._stop = threading.Event()
        self.done = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=said.stem)

    def begin(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        deadline = time.monotonic() + _ENDS_S
        with open(self._said, "ab") as said:
            while not self.done and self.starts < _STARTS and not self._stop.is_set():
                self.starts += 1
                process = self._machines.run(self._machines.head, self._command, said)
                while process.poll() is None and time.monotonic() < deadline and not self._stop.is_set():
                    time.sleep(_LOOK_S)
                if process.poll() is None:
                    self.hung = not self._stop.is_set()
                    process.kill()
                    process.wait()
                    break
                self.done = process.returncode == 0
                if not self.done:
                    self._wait_for_ray()
        self._over.set()

    def _wait_for_ray(self) -> None:
        deadline = time.monotonic() + 300
        while self._machines.alive() == 0 and time.monotonic() < deadline and not self._stop.is_set():
            time.sleep(1.0)

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def end(self) -> str:
        """Waits for its end; nothing, or how it failed."""
        self._over.wait(_ENDS_S + 60)
        if self.done:
            return ""
        last = self._said.read_text(errors="replace").strip().splitlines()[-1:]
        how = "it hung" if self.hung else f"it failed {self.starts} times"
        return f"{how}: {last[0] if last else 'it said nothing'} ({self._said})"

    def stop(self) -> None:
        self._stop.set()
        self._over.wait(30)


class _Progress:
    """When a count was seen to grow; looked at until it is told to stop."""

    def __init__(self, count: Any, over: Any) -> None:
        self._count, self._over = count, over
        self.at: list[tuple[float, int]] = []  # time, count
        self._thread = threading.Thread(target=self._follow, daemon=True, name="progress")
        self._thread.start()

    def _follow(self) -> None:
        most = -1
        while not self._over():
            if (now := self._count()) > most:
                most = now
                self.at.append((time.monotonic(), now))
            time.sleep(_LOOK_S)

    def wait(self, count: int, timeout_s: float = _ENDS_S) -> None:
        deadline = time.monotonic() + timeout_s
        while (not self.at or self.at[-1][1] < count) and not self._over():
            if time.monotonic() > deadline:
                raise TimeoutError(f"it has not come to {count}: {self.at[-1:]}")
            time.sleep(_LOOK_S)

    def pause_s(self, since: float) -> float:
        """The longest time without progress that ended after `since`."""
        times = [at for at, _ in self.at]
        gaps = [after - max(before, since) for before, after in itertools.pairwise(times) if after > since]
        return max(gaps, default=0.0)


class Training:
    """Two ranks on two machines; what they learn from is set beside a run that nobody hurt."""

    EPOCHS = 40

    def __init__(self, machines: Machines, backbone: Path, name: str, epochs: int = EPOCHS) -> None:
        self._machines, self.folder, self._epochs = machines, storage.folder("runs", name), epochs
        self.config = self._config(backbone)
        shutil.rmtree(self.folder, ignore_errors=True)
        recipe = storage.root() / "bench" / f"{name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(self.config.model_dump(mode="json")))
        command = [sys.executable, "-m", "jobs.train", "--config", str(recipe), "--name", name, "--no-evaluate"]
        said = storage.root() / "bench" / f"{name}.said"
        said.unlink(missing_ok=True)
        self._command = _Command(machines, command, said)

    def _config(self, backbone: Path) -> Config:
        made = lab.References(backbone, None).config(_SETUP, 2)  # type: ignore[arg-type]  # nothing runs in a group
        settings = {
            "train.epochs": self._epochs, "train.eval_every_steps": 64, "train.checkpoint_every_steps": 16,
            "cluster.threads": 2, "cluster.max_failures": 5,
        }  # fmt: skip
        return configs.override(made, settings)

    @property
    def steps(self) -> int:
        return lab.ROWS * self._epochs // lab.BATCH

    def reference(self) -> lab.Trace:
        """Of a run that nobody hurt, without Ray; kept."""
        import torch

        from jobs import run

        place = storage.root() / "bench" / f"cluster_{lab.code()}_{self._epochs}"
        if not (place / "whole").exists():
            shutil.rmtree(place, ignore_errors=True)
            plan = run.prepare(self.config, place, export=False).plan
            torch.save(plan, place / "plan.pt")
            groups = Groups()
            try:
                ended = groups.run(place / "plan.pt", 2, None, place / "said", _ENDS_S)
            finally:
                groups.close()
            if any(ended.statuses):
                raise RuntimeError(f"nobody hurt it, and it ended with {ended.statuses}: see {place}/said")
            (place / "whole").touch()
        return trace.read(place)

    def begin(self) -> None:
        self._command.begin()
        self._progress = _Progress(self._step, lambda: self._command.over)

    def _step(self) -> int:
        return max((each.step for each in vigil.read(self.folder)), default=-1)

    def ready(self) -> None:
        self._progress.wait(self.steps // 4 + 3)  # in the middle of an epoch

    def victim(self) -> Machine:
        """The machine of a rank."""
        return self._machines.of(vigil.read(self.folder)[-1].pid)

    def hurt(self) -> None:
        self._hurt = time.monotonic()

    def end(self, reference: lab.Trace | None = None) -> Told:
        failed = self._command.end()
        mine, theirs = (lab.by_step(found) for found in (trace.read(self.folder), reference or {}))
        lost, again = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
        for step in {*mine, *theirs}:
            here, there = (Counter((step, each) for each in ids.get(step, ())) for ids in (mine, theirs))
            lost, again = lost + (there - here), again + (here - there)
        words = f"training of {self.steps} steps: {lost.total()} samples lost, {again.total()} repeated"
        words += f", the command given {self._command.starts} times" if self._command.starts > 1 else ""
        return Told(
            lost.total() + again.total() + bool(failed), self._progress.pause_s(self._hurt),
            f"{words}{'; ' + failed if failed else ''}",
        )  # fmt: skip

    def stop(self) -> None:
        self._command.stop()


class Search:
    """Four trials of one worker, two at a time."""

    TRIALS = 4

    def __init__(self, machines: Machines, backbone: Path, name: str) -> None:
        self.folder = storage.folder("search", name)
        shutil.rmtree(self.folder, ignore_errors=True)
        made = lab.References(backbone, None).config(_SETUP, 1)  # type: ignore[arg-type]  # nothing runs in a group
        settings = {"train.epochs": 6, "cluster.max_failures": 5, "train.trace": False}
        recipe, space = (storage.root() / "bench" / f"{name}{end}" for end in (".yaml", "_space.yaml"))
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(configs.override(made, settings).model_dump(mode="json")))
        told = {
            "method": "random", "trials": self.TRIALS, "concurrent": 2, "scheduler": "none", "seeds": 1,
            "space": {"optim.lr": {"loguniform": [1.0e-4, 1.0e-2]}},
        }  # fmt: skip
        space.write_text(yaml.safe_dump(told))
        command = [sys.executable, "-m", "jobs.search", "--config", str(recipe), "--space", str(space), "--name", name]
        said = storage.root() / "bench" / f"{name}.said"
        said.unlink(missing_ok=True)
        self._command = _Command(machines, command, said)

    def begin(self) -> None:
        self._command.begin()
        self._progress = _Progress(self._reports, lambda: self._command.over)

    def _reports(self) -> int:
        return sum(len(watch.whole_lines(file)) for file in self.folder.glob("trials/*/reports.jsonl"))

    def ready(self) -> None:
        self._progress.wait(2)

    def hurt(self) -> None:
        self._hurt = time.monotonic()

    def end(self) -> Told:
        failed = self._command.end()
        file = self.folder / "trials.json"
        ended = json.loads(file.read_text()) if file.exists() else []
        whole = [each for each in ended if each["state"] in ("done", "stopped") and each["quality"] is not None]
        lost = self.TRIALS - len(whole)
        words = f"search: {lost} of {self.TRIALS} trials lost"
        words += f", the command given {self._command.starts} times" if self._command.starts > 1 else ""
        return Told(
            lost + bool(failed), self._progress.pause_s(self._hurt), f"{words}{'; ' + failed if failed else ''}"
        )

    def stop(self) -> None:
        self._command.stop()


@dataclass(frozen=True, slots=True)
class _Asked:
    began: float
    ended: float
    answer: str  # its id; empty: none came
    failed: tuple[float, ...]  # when tries failed
    why: str = ""


class Service:
    """A replica on each machine, and clients outside that ask one machine after the other: a request that fails at one
    is asked again at the next, as behind a balancer."""

    def __init__(self, machines: Machines, bundle: Path, replicas: int) -> None:
        self._machines, self._bundle, self._replicas = machines, bundle, replicas
        self._said = storage.root() / "bench" / "cluster_service.said"
        self.store_port: int | None = None  # of a proxy before Redis
        self.addresses: list[str] = []  # in place of the machines' own
        self._asked: list[_Asked] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Deploys it, or deploys it anew."""
        host = "0.0.0.0" if self._machines.apart else self._machines.head.host
        command = [sys.executable, "-m", "serve.start", "--bundle", str(self._bundle), "--host", host]
        command += ["--port", str(SERVE_PORT), "--store", self._machines.store(self.store_port), "--cpus", "0.1"]
        command += ["--min-replicas", str(self._replicas), "--max-replicas", str(self._replicas)]
        for _ in range(_STARTS):  # Serve waits a minute for its proxies, which a busy machine may not be enough for
            with open(self._said, "wb") as said:
                process = self._machines.run(self._machines.head, command, said, MMAGENT_API_KEYS=_KEY)
                if process.wait(400) == 0:
                    return
        raise RuntimeError(f"the service did not start: {self._said.read_text()[-2000:]}")

    def begin(self) -> None:
        self._asked, self._stop = [], threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(at,), daemon=True) for at in range(_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def ready(self) -> None:
        deadline = time.monotonic() + 300
        while sum(bool(each.answer) for each in list(self._asked)) < 5 * _CLIENTS:
            if time.monotonic() > deadline:
                why = next((each.why for each in reversed(self._asked) if each.why), "nobody answered")
                raise TimeoutError(f"the service does not answer: {why}")
            time.sleep(_LOOK_S)

    def hurt(self) -> None:
        self._hurt = time.monotonic()

    def end(self) -> Told:
        time.sleep(2.0)
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        after = [each for each in self._asked if each.ended > self._hurt]
        lost = [each for each in after if not each.answer]
        failed = [at for each in self._asked for at in each.failed if at > self._hurt]
        gone = self._gone([each.answer for each in self._asked if each.answer])
        words = f"service: {len(lost)} of {len(after)} requests without an answer, {len(failed)} tries again"
        words += f", {gone} answers whose trace is gone" if gone else ""
        if lost:
            words += f" ({lost[0].why})"
        return Told(len(lost) + gone, max(failed, default=self._hurt) - self._hurt, words)

    def stop(self) -> None:
        self._stop.set()

    def _client(self, number: int) -> None:
        with httpx.Client(headers=self._headers, timeout=httpx.Timeout(10.0, connect=2.0)) as client:
            for turn in itertools.count(number):
                if self._stop.is_set():
                    return
                asked = self._ask(client, turn)
                with self._lock:
                    self._asked.append(asked)
                time.sleep(_PAUSE_S)

    def _ask(self, client: httpx.Client, turn: int) -> _Asked:
        began, why = time.monotonic(), ""
        failed: list[Any] = []
        addresses = self.addresses or self.own()
        for number in range(_TRIES):
            address = addresses[(turn + number) % len(addresses)]
            body = {"text": f"what colour is it {turn}"}
            try:
                answer = client.post(f"{address}/v1/predict", json=body)
                if answer.status_code == 200:
                    return _Asked(began, time.monotonic(), str(answer.json()["id"]), tuple(failed))
                why = f"{address}: status {answer.status_code}: {answer.text[:120]}"
            except (httpx.HTTPError, ValueError, KeyError) as error:
                why = f"{address}: {type(error).__name__}: {error}"
            failed.append(time.monotonic())
            time.sleep(0.5 * 2**number)  # as the official clients do
        return _Asked(began, time.monotonic(), "", tuple(failed), why)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {_KEY}"}

    def own(self) -> list[str]:
        hosts = [each.host for each in self._machines.others] if self._machines.apart else [self._machines.head.host]
        return [f"http://{host}:{SERVE_PORT}" for host in hosts]

    def _gone(self, answers: Sequence[str]) -> int:
        """How many answers the service knows nothing of any more."""
        gone = 0
        addresses = self.own()
        with httpx.Client(headers=self._headers, timeout=httpx.Timeout(10.0, connect=2.0)) as client:
            for number, answer in enumerate(answers):
                for turn in range(_TRIES):
                    with contextlib.suppress(httpx.HTTPError):
                        found = client.get(f"{addresses[(number + turn) % len(addresses)]}/v1/answers/{answer}")
                        if found.status_code in (200, 404):
                            gone += found.status_code == 404
                            break
        return gone


def bundle(backbone: Path) -> Path:
    """An untrained one, which answers as fast as another."""
    import torch

    from mmagent import bundle as bundles
    from mmagent.assembly import assemble, load_language, load_reading
    from mmagent.calibration import Calibration
    from mmagent.targets import TaskInfo
    from mmagent.tasks import make_all

    place = storage.root() / "bench" / "cluster_served" / "bundle"
    shutil.rmtree(place, ignore_errors=True)
    config = lab.References(backbone, None).config(_SETUP, 1)  # type: ignore[arg-type]  # nothing runs in a group
    tasks = {"classify": TaskInfo("classify", ("red", "green", "blue", "black"))}
    torch.manual_seed(0)
    encoder, tokenizer = load_language(config.model, tasks), load_reading(config.model)
    model = assemble(config.model, make_all(tasks), encoder)
    bundles.save(
        place, name="cluster_served", config=config, tasks=tasks, task="classify", state=model.state_dict(),
        backbone=encoder, tokenizer=tokenizer, calibration={"classify": Calibration()}, origin={},
    )  # fmt: skip
    return place
