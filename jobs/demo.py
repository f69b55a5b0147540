"""Walks the whole way once, on real input: shards, training on Ray, bundle, service, three answers over HTTP.

    python -m jobs.demo run                   what `make demo` does
    python -m jobs.demo search                `make demo-search`: trials, the winner served, the same questions
    python -m jobs.demo serve --bundle demo   `make serve BUNDLE=demo`: a run's name or a bundle folder

Ray is started on this machine and recorded in ROOT/cluster.json (`jobs.local`), unless RAY_ADDRESS names one. Every
step is a job that is submitted; each can be repeated, and goes on where it was interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from jobs import client, cluster, interview, submission
from jobs.findings import FindingsError, Times, findings
from jobs.interview import InterviewError
from jobs.parcel import ParcelError
from mmagent import measurement, storage
from mmagent.arguments import Parser
from mmagent.shards import Dataset, DatasetError

DATA = "easy_vqa"
RECIPE = "jobs/recipes/easy_vqa.yaml"
SPACE = "jobs/recipes/easy_vqa_space.yaml"
RUN, SEARCH = "demo", "demo_search"
SERVE_PORT = 8000  # of a Ray that was not started here


@dataclass(frozen=True)
class Target:
    """The Ray that is worked on."""

    jobs_address: str
    service: str  # where the served agent answers
    ours: bool

    def submit(self, module: str, *arguments: str) -> float:
        """Runs a command as a job; returns its seconds."""
        print(f"\n== {module}", flush=True)
        return submission.run(self.jobs_address, ["python", "-m", module, *arguments], cluster.CHECKOUT)


def run() -> int:
    """Returns the exit status: 0 where two answers are right and the third is an honest doubt."""
    target = _ray()
    prepare_s = _prepare(target)
    folder = storage.folder("runs", RUN)
    fresh = not folder.exists()
    start = time.monotonic()
    train_s = target.submit("jobs.train", "--config", RECIPE, "--name", RUN)
    serve_s = _serve(target, RUN)
    passed = _interview(target, folder / "bundle")
    times = Times(
        total_s=time.monotonic() - start if fresh else None, prepare_s=prepare_s, train_s=train_s, serve_s=serve_s
    )
    rows = findings(folder, times)
    measurement.publish("demo", rows, cluster.CHECKOUT)
    print(f"\n{measurement.table(rows)}\n\n{times.breakdown(folder)}")
    print(f"\nreport: {folder / 'report.html'}\nfigures: {storage.root() / 'bench' / 'demo.json'}")
    _say_goodbye(target)
    return 0 if passed else 1


def search() -> int:
    """Returns the exit status: 0 where the winner's bundle gave the answers, right ones or not. SCALE=small is a short
    one."""
    target = _ray()
    _prepare(target)
    small = os.environ.get("SCALE") == "small"
    name = f"{SEARCH}_small" if small else SEARCH
    target.submit("jobs.search", "--config", RECIPE, "--space", _small_space() if small else SPACE, "--name", name)
    folder = storage.folder("search", name)
    _serve(target, str(folder / "bundle"))
    _interview(target, folder / "bundle")
    print(f"\nreport: {folder / 'report.html'}")
    _say_goodbye(target)
    return 0


def _small_space() -> str:
    """The same space, with few trials on little data: the way, not what it finds."""
    space = yaml.safe_load((cluster.CHECKOUT / SPACE).read_text())
    small = {**space, "trials": 4, "seeds": 1, "set": {**space["set"], "data.share": 0.02, "train.epochs": 2}}
    file = storage.root() / "bench" / "small_space.yaml"
    storage.publish(file, yaml.safe_dump(small))
    return str(file)


def serve(bundle: str) -> int:
    target = _ray()
    _serve(target, bundle)
    _say_goodbye(target)
    return 0


def _ray() -> Target:
    if address := os.environ.get("RAY_ADDRESS"):
        print(f"using the Ray that RAY_ADDRESS names: {address}")
        return Target(address, f"http://{cluster.HOST}:{SERVE_PORT}", ours=False)
    file = cluster.record()
    found, new = cluster.ensure(file)
    print(f"{'started' if new else 'using'} the Ray of {file}: dashboard {found.dashboard}")
    os.environ["RAY_AUTH_MODE"] = "token"  # Ray's own client reads it from here
    return Target(found.dashboard, f"http://{cluster.HOST}:{found.serve_port}", ours=True)


def _prepare(target: Target) -> float:
    return target.submit("jobs.prepare", "--source", "easy_vqa", "--name", DATA)


def _serve(target: Target, bundle: str) -> float:
    return target.submit("serve.start", "--bundle", bundle, "--port", target.service.rsplit(":", 1)[1])


def _interview(target: Target, bundle: Path) -> bool:
    """Asks the three questions, prints the answers; whether they are as they should be."""
    questions = interview.questions(Dataset.open(storage.folder("data", DATA)))
    name = interview.name_of(bundle)
    answered = interview.ask(target.service, questions, name)
    print(f"\n{interview.table(answered)}\n")
    print(f"ask it yourself:\n\n  {client.curl(target.service, client.question(questions[0].record, name))}")
    return all(item.passed for item in answered)


def _say_goodbye(target: Target) -> None:
    print(f"\nthe agent goes on answering at {target.service} (API: {target.service}/docs)")
    print("to end it: make stop" if target.ours else "to end it: python -m serve.start --stop")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.demo", __doc__)
    parser.add_argument("command", choices=("run", "search", "serve"))
    parser.add_argument("--bundle", help="with serve: a run's name or a bundle folder")
    options = parser.parse_args(argv)
    if (options.command == "serve") != bool(options.bundle):
        parser.error("--bundle belongs to serve: python -m jobs.demo serve --bundle demo")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped `make` stops the job, as Ctrl-C does
    commands = {"run": run, "search": search}
    try:
        return serve(options.bundle) if options.command == "serve" else commands[options.command]()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here; `make stop` ends Ray", file=sys.stderr)
        return 130
    except submission.JobFailed as error:
        print(f"error: {error}; its output stands above", file=sys.stderr)
        return error.exit_code
    except (
        cluster.ClusterError, submission.NoCluster, ParcelError, client.ServiceError, storage.StorageError,
        DatasetError, InterviewError, FindingsError,
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
