"""What `tests.bench.scale` measures, count by count: each of these makes so many things and says what they cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import psutil

from jobs import cluster
from mmagent import space as spaces
from mmagent import storage
from mmagent.space import Sample, Space

_REPORTS = 4  # of a trial
_IDLE_S = 15.0  # in which the head's share of a core is measured
_SETTLED_S = 5.0  # what comes with starting is over
_OBJECTS_OF_A_RUN = 4
_DIMENSIONS: dict[str, Any] = {
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "model.dropout": {"uniform": [0.0, 0.3]},
    "freeze.strategy": {"choice": ["connector", "all", "bias"]},
}
_SPACE = Space(space=_DIMENSIONS, method="tpe", scheduler="none")

_OWN: Sample = {"optim.lr": 1e-3, "model.dropout": 0.1, "freeze.strategy": "connector"}


class Points(Protocol):
    bytes_each: float  # of memory, as far as is known

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def measure(self, count: int) -> float:
        """The cost of so many; counts come in rising order."""


class _Plain:
    bytes_each = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


# -- trials ------------------------------------------------------------------------------------------------------------
def _metrics(number: int, report: int) -> dict[str, float]:
    loss = random.Random(f"{number}/{report}").random()
    return {
        "loss": loss, "score": 1.0 - loss, "step": report + 1.0, "total_steps": float(_REPORTS),
        "done": float(report == _REPORTS - 1), "seconds": 0.01 * (report + 1), "startup_s": 0.0,
    }  # fmt: skip


class Bookkeeping(_Plain):
    """A search without Tune and workers: samples are proposed, reports written, read back, compared and shown."""

    def __enter__(self) -> Self:
        self.measure(6)  # what is imported meanwhile is no cost of a trial's
        return self

    def measure(self, count: int) -> float:
        from jobs import proposing, search, trials
        from mmagent import contest

        dims, stages = spaces.dimensions(_SPACE), trials.Stages("steps", 1.0, float(_REPORTS), 4)
        with tempfile.TemporaryDirectory(dir=storage.root()) as place:
            folder, began = Path(place), time.process_time()
            proposals = trials.Proposals(_SPACE, dims, [_OWN], count, 0)
            done = []
            for number in range(count):
                id = f"t{number:03d}"
                given = proposals.suggest(id)
                assert given is not None
                sample = given["trial"]["sample"]
                home = folder / "trials" / id
                home.mkdir(parents=True)
                for report in range(_REPORTS):
                    metrics = _metrics(number, report)
                    trials._write(home, sample, metrics)
                    result = {trials.RANK: -metrics["loss"], trials.BUDGET: stages.spent(metrics)}
                    proposals.on_trial_result(id, result)
                proposals.on_trial_complete(id, result)
                reports = trials._read(home)
                done.append(trials.Trial(id, sample, metrics["score"], _REPORTS, 0.04, reports=reports))
            history = [search._as_json(each, folder) for each in done]
            storage.publish_json(folder / "trials.json", history)
            search._table(done)
            best = max(done, key=lambda each: each.quality or 0.0)
            verdict = {"trial": best.id, "score": best.quality, "why": "", "sample": dict(best.sample),
                       "own": {"scores": [done[0].quality], "mean": done[0].quality, "deviation": None}}  # fmt: skip
            scores = [(each["reports"][0]["sample"], each["reports"][0]["metrics"]["score"]) for each in history]
            contest.sections(_SPACE, dims, history, verdict, 1 / _REPORTS, proposing.importance(scores, dims))
            return time.process_time() - began


class Trials(_Plain):
    """`jobs.trials` as it is, over Tune's Tuner; the lanes' desk is the real one, and its workers report at once."""

    _CONCURRENT = 4

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self._head = cluster.start(num_cpus=4, object_store_bytes=200_000_000)
        self._stack.callback(cluster.stop, self._head)
        os.environ.update(self._head.environment)
        self._stack.callback(os.environ.pop, "RAY_ADDRESS", None)
        cluster.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, count: int) -> float:
        import ray

        from jobs import trials
        from jobs.lanes import Desk

        space = _SPACE.model_copy(update={"method": "random"})
        actor: Any = ray.remote(Desk)
        desk = actor.options(num_cpus=0, max_concurrency=1000).remote()
        lanes = [threading.Thread(target=_lane, args=(desk, at), daemon=True) for at in range(self._CONCURRENT)]
        with tempfile.TemporaryDirectory(dir=storage.root()) as place, trials.quiet():
            for lane in lanes:
                lane.start()
            began = time.process_time()
            done = trials.run(
                empty, Path(place), space, spaces.dimensions(space), [_OWN], desk,
                stages=trials.Stages("steps", 1.0, float(_REPORTS), 4), trials=count, concurrent=self._CONCURRENT,
                seed=0, metric=("", True), tell=lambda _: None,
            )  # fmt: skip
            took = time.process_time() - began
            ray.get(desk.close.remote())
            for lane in lanes:
                lane.join(30)
            ray.kill(desk)
        whole = sum(each.state == "done" and len(each.reports) == _REPORTS for each in done)
        if whole != count:
            raise RuntimeError(f"{whole} of {count} trials came to their end: {done[0]}")
        return took


def empty(sample: Sample, place: Path, name: str) -> Any:
    """A trial's job that is nothing."""
    from jobs.lanes import Job

    config: Any = Bare()
    return Job(name, _nothing, {}, config, place)


class _NoRetries:
    max_failures = 0


class Bare:
    """What of a config a desk looks at."""

    cluster = _NoRetries()


def _nothing(group: Any) -> None:
    pass


def _lane(desk: Any, lane: int) -> None:
    """A lane whose workers have nothing to do."""
    import ray
    from ray import cloudpickle

    start, number = ray.get(desk.began.remote(lane)), 0
    while (given := ray.get(desk.take.remote(lane, start, number))) is not None:
        job = cloudpickle.loads(given)
        for report in range(_REPORTS):
            if not ray.get(desk.report.remote(job.name, _metrics(number, report))):
                break
        ray.get(desk.finished.remote(lane, number, ""))
        number += 1


# -- objects -----------------------------------------------------------------------------------------------------------
class _Objects(_Plain):
    """Files below a storage root of their own, more with each point."""

    def __enter__(self) -> Self:
        from jobs import states, status  # noqa: F401  what they bring takes longer than a point

        self._before = storage.variables()
        self._root = Path(tempfile.mkdtemp(prefix=".scale-", dir=storage.root()))
        storage.use({storage.ROOT_VARIABLE: str(self._root)})
        self._made = 0
        return self

    def __exit__(self, *_: object) -> None:
        storage.use(self._before)
        shutil.rmtree(self._root)

    def _fill(self, folder: Path, count: int) -> None:
        """Shards, 10,000 in a folder, of one byte."""
        for number in range(self._made, count):
            if number % 10_000 == 0 or number == self._made:
                place = folder / f"{number // 10_000:03d}"
                place.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(place / f"part-{number:07d}.parquet", os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, b"0")
            os.close(descriptor)
        self._made = count


class Shards(_Objects):
    def measure(self, count: int) -> float:
        from mmagent.record import SCHEMA_VERSION
        from mmagent.shards import FORMAT_VERSION, INFO_FILE, Dataset

        folder = storage.folder("data", "scale")
        self._fill(folder, count)
        digest = hashlib.sha256(b"0").hexdigest()
        shards = [{"file": f"{at // 10_000:03d}/part-{at:07d}.parquet", "rows": 1, "bytes": 1, "sha256": digest}
                  for at in range(count)]  # fmt: skip
        info = {"format_version": FORMAT_VERSION, "schema_version": SCHEMA_VERSION, "name": "scale", "task": "classify",
                "tasks": {}, "splits": {"train": {"rows": count, "shards": shards}}}  # fmt: skip
        (folder / INFO_FILE).write_text(json.dumps(info))
        return _timed(lambda: Dataset.open(folder))


class States(_Objects):
    def measure(self, count: int) -> float:
        from jobs import states
        from mmagent import features

        self._fill(storage.root() / features.FOLDER, count)
        found = states.held_bytes()
        assert found == count, found
        return _timed(states.held_bytes)


class Status(_Objects):
    def measure(self, count: int) -> float:
        from jobs import status

        line = {"kind": "train", "step": 1, "total_steps": 1, "samples": 1, "samples_per_s": 1.0}
        lines = json.dumps(line) + "\n" + json.dumps({"kind": "validation", "score": 0.5}) + "\n"
        for number in range(self._made, count // _OBJECTS_OF_A_RUN):
            place = storage.root() / "runs" / f"r{number:06d}"
            (place / "bundle").mkdir(parents=True)
            for file, text in (("metrics.jsonl", lines), ("config.yaml", "{}\n"), ("bundle/manifest.json", "{}\n")):
                (place / file).write_text(text)
        self._made = count // _OBJECTS_OF_A_RUN
        return _timed(lambda: status.main(["--json"]))


def _timed(call: Callable[[], Any]) -> float:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        began = time.process_time()
        call()
        return time.process_time() - began


# -- replicas and nodes ------------------------------------------------------------------------------------------------
_DEPLOY = """
import json, logging, sys, time
import ray
from ray import serve
from ray.serve.config import ProxyLocation
ray.init(log_to_driver=False, logging_level=logging.ERROR)
serve.start(proxy_location=ProxyLocation.Disabled)

@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1)
class Nothing:
    def __call__(self):
        return None

for line in sys.stdin:
    began = time.perf_counter()
    handle = serve.run(Nothing.options(num_replicas=int(line)).bind(), name="nothing", route_prefix=None)
    handle.remote().result()
    print(json.dumps(time.perf_counter() - began), flush=True)
"""


class Replicas:
    """Each count is reached from the one before; the cost is what Serve's controller takes of a core afterwards."""

    bytes_each = 0.0

    def __enter__(self) -> Self:
        self._stack, self._had = contextlib.ExitStack(), 0
        self._head = cluster.start(num_cpus=4, object_store_bytes=200_000_000)
        self._stack.callback(cluster.stop, self._head)
        pipe = subprocess.PIPE
        self._driver = subprocess.Popen(
            [sys.executable, "-c", _DEPLOY], env={**os.environ, **self._head.environment}, stdin=pipe, stdout=pipe,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._stack.callback(self._driver.wait, 30)
        self._stack.callback(self._driver.kill)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, count: int) -> float:
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        free = psutil.virtual_memory().available
        self._driver.stdin.write(f"{count}\n")
        self._driver.stdin.flush()
        ready_s = float(json.loads(self._driver.stdout.readline()))
        print(f"replicas: {count} are ready after {ready_s:.1f} s", flush=True)
        self.bytes_each = max(0.0, (free - psutil.virtual_memory().available) / (count - self._had))
        self._had = count
        for process in cluster.marked(self._head.id):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("ServeController" in word for word in process.cmdline()):
                    return _share(process)
        raise RuntimeError("Serve has no controller")


_LISTED = """
import logging, sys, time
import ray
ray.init(log_to_driver=False, logging_level=logging.ERROR)
wanted = int(sys.argv[1])
end = time.monotonic() + 120
while sum(node["Alive"] for node in ray.nodes()) < wanted and time.monotonic() < end:
    time.sleep(0.2)
found = sum(node["Alive"] for node in ray.nodes())
assert found >= wanted, f"{found} of {wanted} nodes are there"
"""


class Nodes:
    """Raylets without resources that join one head."""

    bytes_each = 0.0

    def __enter__(self) -> Self:
        self._head = cluster.start(num_cpus=1, object_store_bytes=100_000_000)
        self._joined = 0
        return self

    def __exit__(self, *_: object) -> None:
        cluster.stop(self._head)

    def measure(self, count: int) -> float:
        free, before = psutil.virtual_memory().available, self._joined
        command = [sys.executable, "-c", _MANY, str(count - before), self._head.address]
        environment = {**os.environ, **self._head.environment, cluster.MARK: self._head.id}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=580)
        self._joined = count
        listed = [sys.executable, "-c", _LISTED, str(count + 1)]
        subprocess.run(listed, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=180)
        self.bytes_each = max(0.0, (free - psutil.virtual_memory().available) / (count - before))
        gcs = next(each.find() for each in self._head.processes if each.name == "gcs_server")
        assert gcs is not None
        return _share(gcs)


# As `tests.machines.join`, many in one process.
_MANY = """
import sys
from ray.scripts import scripts

count, address = int(sys.argv[1]), sys.argv[2]
class Constants:
    ENABLE_RAY_CLUSTER = True
    def __getattr__(self, name):
        return getattr(known, name)
known, scripts.ray_constants = scripts.ray_constants, Constants()
for _ in range(count):
    scripts.start.main(
        ["--address", address, "--num-cpus=0", "--num-gpus=0", "--node-ip-address=127.0.0.1",
         "--object-store-memory=80000000", "--disable-usage-stats", "--include-log-monitor=false"],
        standalone_mode=False,
    )
"""


def _share(process: psutil.Process) -> float:
    """Of a core, while nothing goes on."""
    time.sleep(_SETTLED_S)
    began, before = time.monotonic(), process.cpu_times()
    time.sleep(_IDLE_S)
    after = process.cpu_times()
    used_s = after.user + after.system - before.user - before.system
    return max(1e-4, float(used_s / (time.monotonic() - began)))
