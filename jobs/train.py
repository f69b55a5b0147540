"""Fine-tunes a language model with image and audio towers on a data set, and exports a bundle.

    python -m jobs.train --config jobs/recipes/easy_vqa.yaml --name demo [key.path=value ...]
    ray job submit --working-dir . -- python -m jobs.train --config jobs/recipes/easy_vqa.yaml --name demo

Ray Data streams the shards of ROOT/data/NAME into DeepSpeed ZeRO workers under Ray Train. The run's folder is
ROOT/runs/NAME: config.yaml, metrics.jsonl, tb/ (TensorBoard), checkpoints/, and at the end bundle/, evaluation.json and
report.html. The same --name given again goes on where the last checkpoint stands. Ctrl-C (or SIGTERM) saves a
checkpoint at the next step and ends; a second one ends at once.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from jobs import cluster
from jobs.cluster import ClusterError
from jobs.lock import LockError, locked
from mmagent import config as configs
from mmagent import storage
from mmagent.arguments import Parser
from mmagent.bundle import BundleError
from mmagent.config import Config, ConfigError
from mmagent.predictions import EvaluationError
from mmagent.shards import Dataset, DatasetError
from mmagent.text import BackboneError

EXIT_STOPPED = 130


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.train", __doc__, keys=configs.keys(), epilog=_all_keys())
    parser.add_argument("--config", required=True, type=Path, help="the recipe: a YAML file of sections")
    parser.add_argument("--name", required=True, help="the run's name; given again, the run goes on")
    parser.add_argument("--no-evaluate", action="store_true", help="leave out the test split and the report")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what the recipe says")
    args = parser.parse_args(argv)
    try:
        return train(args)
    except _user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(args: argparse.Namespace) -> int:
    """Trains, exports, evaluates; the exit status."""
    started = time.time()
    config = configs.load(args.config, args.overrides)
    folder = storage.folder("runs", args.name)
    Dataset.open(storage.folder("data", config.data.name))
    # A mistake in the recipe is told before Ray and torch are loaded, and Ray reads its environment when it is.
    cluster.connect()
    from jobs import run

    with locked(folder):
        work = run.prepare(config, folder)
        _tell(work, config)
        timing = _read_timing(folder)
        if not work.exported:
            timing = {"start_s": round(time.time() - started, 1)}
            began = time.time()
            if not _fit(work):
                print(f"stopped at step {work.resumed_step()}; the same command goes on from there")
                return EXIT_STOPPED
            timing |= _split_times(folder, began)
        if not args.no_evaluate and not (folder / "evaluation.json").exists():
            began = time.time()
            _evaluate(work)
            timing["evaluate_s"] = round(time.time() - began, 1)
        storage.publish_json(folder / "timing.json", timing)
    print(f"bundle  {folder / 'bundle'}")
    print(
        "time    "
        + ", ".join(f"{key.removesuffix('_s')} {value:g} s" for key, value in timing.items() if key.endswith("_s"))
    )
    return 0


def _tell(work: Any, config: Config) -> None:
    from mmagent import freeze

    step, plan = work.resumed_step(), work.plan
    print(
        f"run {work.name}: {work.dataset.rows('train')} rows of {work.dataset.path.name}, {plan.total_steps} steps of "
        f"{config.global_batch} samples ({config.cluster.workers} workers x {config.train.micro_batch} x "
        f"{config.train.accumulation}), ZeRO {config.zero.stage}" + (f"; goes on at step {step}" if step else ""),
        flush=True,
    )
    print(f"freeze.strategy={config.freeze.strategy}\n{freeze.show(plan.parts)}", flush=True)


def _fit(work: Any) -> bool:
    """Trains in a thread, so that this one can hear signals and show progress.

    Raises:
        WorkersFailed: as `Run.fit`.
    """
    result: dict[str, Any] = {}

    def fit() -> None:
        try:
            result["done"] = work.fit()
        except BaseException as error:  # noqa: BLE001  raised again below, in the main thread
            result["error"] = error

    def ask_to_stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        print(f"\n{signal.Signals(number).name}: saving at the next step; once more ends at once", flush=True)
        work.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    thread = threading.Thread(target=fit, daemon=True, name="fit")
    thread.start()
    follower = Follower(work.folder / "metrics.jsonl")
    while thread.is_alive():
        thread.join(0.5)
        follower.show()
    if "error" in result:
        raise result["error"]
    return bool(result["done"])


class Follower:
    """Shows the lines that the workers add to ``metrics.jsonl``: one line on a terminal, a log elsewhere."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen = file.stat().st_size if file.exists() else 0
        self._rates: list[float] = []
        self._terminal = sys.stdout.isatty()

    def show(self) -> None:
        if not self._file.exists():
            return
        if self._file.stat().st_size < self._seen:  # a resumed run dropped what it will write again
            self._seen = 0
        with open(self._file) as file:
            file.seek(self._seen)
            while (line := file.readline()).endswith("\n"):
                self._seen = file.tell()
                self._print(json.loads(line))

    def _print(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation":
            parts = ", ".join(
                f"{k.removeprefix('accuracy/')} {v:.1%}" for k, v in row.items() if k.startswith("accuracy/")
            )
            clear = "\r\x1b[K" if self._terminal else ""
            print(
                f"{clear}step {row['step']}: validation accuracy {row['accuracy']:.2%} ({parts}), "
                f"loss {row['loss']:.4f}",
                flush=True,
            )
            return
        step, total = row["step"], row["total_steps"]
        self._rates = [*self._rates[-5:], row["samples_per_s"]]
        per_step = row["samples"] / row["steps"]
        left_s = (total - step) * per_step / (sum(self._rates) / len(self._rates))
        line = (
            f"step {step}/{total} ({step / total:.0%})  loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  "
            f"{row['samples_per_s']:.0f} samples/s  waits {row['wait_share']:.1%}  {_clock(left_s)} left"
        )
        print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", flush=True)


def _read_timing(folder: Path) -> dict[str, float]:
    """What an earlier start of the same run wrote."""
    file = folder / "timing.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _split_times(folder: Path, began: float) -> dict[str, float]:
    """Seconds of starting the workers, training and exporting, from the times of the run's first and last lines."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = [row["time_s"] for row in rows if row["time_s"] >= began] or [began]
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    return {
        "workers_s": round(mine[0] - began, 1),
        "train_s": round(mine[-1] - mine[0], 1),
        "export_s": round(time.time() - mine[-1], 1),
        "wait_share": manifest["checkpoint"]["wait_share"],
    }


def _evaluate(work: Any) -> None:
    """Asks the test split once, if there is one, and writes evaluation.json, report.html and the model card."""
    from jobs.evaluate import describe, evaluate
    from jobs.summary import table_of

    if not work.dataset.rows("test"):
        print("the data set has no test split: no evaluation")
        return
    result = evaluate(
        work.plan.bundle,
        work.dataset,
        "test",
        out=work.folder,
        before=True,
        without="image" if work.config.model.image is not None else None,
        workers=work.config.cluster.workers,
        threads=work.config.cluster.threads,
        seed=work.config.seed,
    )
    describe(work.plan.bundle, work.dataset, result)
    print(table_of(result))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _all_keys() -> str:
    lines = [f"  {key:28s}{text}" for key, text in configs.keys().items()]
    return "keys of a recipe, which key.path=value overrides:\n" + "\n".join(lines)


def _user_errors() -> tuple[type[BaseException], ...]:
    """What the user can mend: told in one message. Those of modules that load Ray are known once it is loaded."""
    known: list[type[BaseException]] = [
        ConfigError, DatasetError, BackboneError, ClusterError, LockError, storage.StorageError,
    ]  # fmt: skip
    if "jobs.run" in sys.modules:
        from jobs.run import RunError
        from jobs.workers import WorkersFailed

        known += [RunError, WorkersFailed, BundleError, EvaluationError]
    return tuple(known)


if __name__ == "__main__":
    sys.exit(main())
