"""A run from its first step to its report, as a terminal sees it: what is told, signals, progress, times."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from jobs import check, diagnosis, track
from jobs.vigil import Alarm
from mmagent import defaults, stalls, storage, wording
from mmagent.config import Config
from mmagent.report import Section
from mmagent.shards import Dataset

if TYPE_CHECKING:  # they bring Ray, which reads its environment when it is imported
    from jobs.run import Run

EXIT_STOPPED = 130
_CHECKED_BYTES = 32 << 20  # of shards that are looked at without being asked: some seconds


def complete(
    config: Config, folder: Path, *, name: str | None = None, bundle: Path | None = None, test: bool = True
) -> bool:
    """Trains a run, or goes on with it, exports it and asks the test split; whether it came to the end.

    Args:
        folder, name, bundle: see `jobs.run.prepare`.
        test: whether the test split is asked.

    Raises:
        DatasetError, BackboneError, RunError, WorkersFailed: see `jobs.run`.
    """
    from jobs import run

    started = time.time()
    work = run.prepare(config, folder, name=name, bundle=bundle)
    tell(work)
    with track.following(config.track, folder) as end:
        done = _complete(work, config, folder, started, test=test)
        end.status = track.FINISHED if done else track.STOPPED
    return done


def _complete(work: Run, config: Config, folder: Path, started: float, *, test: bool) -> bool:
    """All that follows the check of a run that began at a time."""
    dataset = Dataset.open(storage.folder("data", config.data.name))  # all of it, also where few labels are drawn
    _look(dataset, config)
    _warn(dataset)
    timing = _read_timing(folder)
    if not work.exported:
        timing = {"start_s": round(time.time() - started, 1)}
        began = time.time()
        if not fit(work.fit, work.stop, folder, config.train.alarm_minutes):
            print(f"stopped at step {work.resumed_step()}; the same command goes on from there")
            return False
        timing |= _split_times(work, began)
    if test and not (folder / "evaluation.json").exists():
        began = time.time()
        evaluate_once(work, folder)
        timing["evaluate_s"] = round(time.time() - began, 1)
    storage.publish_json(folder / "timing.json", timing)
    print(f"bundle  {work.plan.bundle}")
    print(
        "time    "
        + ", ".join(f"{key.removesuffix('_s')} {value:g} s" for key, value in timing.items() if key.endswith("_s"))
    )
    return True


def rehearse(config: Config, name: str) -> int:
    """Tells what a run would train and take, by a few of its steps; the exit status: 1 where it would not fit.

    Raises:
        DatasetError, BackboneError, RunError, RehearsalError, RanksFailed: see `jobs.run` and `jobs.rehearsal`.
    """
    from jobs import estimate, rehearsal, run

    with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=storage.root()) as folder:
        work = run.prepare(config, Path(folder) / name)
        tell(work)
        _warn(Dataset.open(storage.folder("data", config.data.name)))
        told = estimate.forecast(work.plan, rehearsal.rehearse(work.plan, work.dataset))
    print("\n".join([*told.lines, *(f"would not fit: {trouble}" for trouble in told.troubles)]))
    return 1 if told.troubles else 0


def _look(dataset: Dataset, config: Config) -> None:
    """Checks a small data set that nobody has checked as it is now."""
    files = [file for split in dataset.splits for file in dataset.shard_files(split)]
    if diagnosis.read(dataset) is None and sum(map(storage.size, files)) <= _CHECKED_BYTES:
        try:
            check.check(dataset, config, workers=1)
        except OSError as error:  # a folder that may be read alone: no reason not to train on it
            print(
                f"the data set was not checked: {error.strerror or error}: {error.filename or dataset.path}", flush=True
            )


def _warn(dataset: Dataset) -> None:
    """What the last check of the data set found that matters."""
    for line in diagnosis.known(dataset):
        print(line, flush=True)


def tell(work: Run) -> None:
    """What is about to be trained: rows, steps, parts."""
    from mmagent import freeze

    step, plan, config = work.resumed_step(), work.plan, work.config
    share = config.share(config.cluster.workers)
    print(
        f"run {work.name}: {work.dataset.rows('train')} rows of {work.dataset.name}, {plan.total_steps} steps of "
        f"{share.batch} samples ({share.world} workers x {share.micro_batch} x {share.passes}), "
        f"ZeRO {config.zero.stage}" + (f"; goes on at step {step}" if step else ""),
        flush=True,
    )
    for line in work.notes:
        print(line, flush=True)
    print(f"freeze.strategy={config.freeze.strategy}\n{freeze.show(plan.parts)}", flush=True)


def fit(
    work: Callable[[], bool], stop: Callable[[], None], folder: Path, alarm_minutes: float | None = None
) -> bool:  # fmt: skip
    """Trains in a thread, so that this one can hear signals and show progress; whether it came to its end.

    Args:
        work, stop: of `jobs.run.Run`: trains; asks to save and end.
        folder: the run's own, which the workers write their figures into.
        alarm_minutes: a step that takes longer raises an alarm.

    Raises:
        WorkersFailed: as `work`.
    """
    result: dict[str, Any] = {}

    def train() -> None:
        try:
            result["done"] = work()
        except BaseException as error:  # noqa: BLE001  raised again below, in the main thread
            result["error"] = error

    def ask_to_stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        print(f"\n{signal.Signals(number).name}: saving at the next step; once more ends at once", flush=True)
        stop()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    storage.watch(folder / "metrics.jsonl")
    thread = threading.Thread(target=train, daemon=True, name="fit")
    thread.start()
    follower, alarm = Follower(folder / "metrics.jsonl"), Alarm(folder, alarm_minutes)
    while thread.is_alive():
        thread.join(0.5)
        follower.show()
        for line in alarm.look():
            follower.say(line)
    for number, handler in before.items():
        signal.signal(number, handler)
    if "error" in result:
        raise result["error"]
    if spent := stalls.shares(_lines(folder / "metrics.jsonl")):
        print(stalls.sentence(spent), flush=True)
    return bool(result["done"])


class Follower:
    """Shows the lines that the workers add to ``metrics.jsonl``: one line on a terminal, a log elsewhere."""

    def __init__(self, file: Path) -> None:
        self._file, self._of, self._seen = file, 0, 0  # the file's number, and how far it was read
        self._shown_s = max((row["time_s"] for row in whole_lines(file)), default=0.0)
        self._rates: list[float] = []
        self._terminal = sys.stdout.isatty()
        self._told_cut = False

    def show(self) -> None:
        if not self._file.exists():
            return
        with open(self._file) as file:
            # A resumed run drops what it will write again: then the file is another one.
            number = os.fstat(file.fileno()).st_ino
            self._of, self._seen = number, self._seen if number == self._of else 0
            file.seek(self._seen)
            while (line := file.readline()).endswith("\n"):
                self._seen = file.tell()
                row = json.loads(line)
                if row["time_s"] > self._shown_s:
                    self._shown_s = row["time_s"]
                    self._print(row)

    def say(self, line: str) -> None:
        """A line that stays."""
        print(("\r\x1b[K" if self._terminal else "") + line, flush=True)

    def _print(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation":
            self.say(validated(row))
        if row["kind"] in _EVENTS:
            self.say(_EVENTS[row["kind"]].format(**row))
        if row["kind"] != "train":
            return
        if row["cut_rows"] and not self._told_cut:
            self._told_cut = True
            seen = row["step"] * row["samples"] / row["steps"]
            self.say(
                f"{row['cut_rows']:,} of the first {seen:,.0f} samples are longer than data.max_text_tokens or "
                "data.max_answer_tokens allows, and are cut"
            )
        step, total = row["step"], row["total_steps"]
        self._rates = [*self._rates[-5:], row["samples_per_s"]]
        per_step = row["samples"] / row["steps"]
        left_s = (total - step) * per_step / (sum(self._rates) / len(self._rates))
        line = (
            f"step {step}/{total} ({step / total:.0%})  loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  "
            f"{row['samples_per_s']:.0f} samples/s  waits {row['wait_share']:.1%}  {clock(left_s)} left"
        )
        print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", flush=True)


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """What an earlier start wrote into a file of JSON lines, but for a line that a kill cut off."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


_EVENTS = {
    "note": "{note}",
    "restart": "the workers failed for the {count}. time: {reason}\nthey go on from step {step}, after {pause_s:g} s",
    "skip": "left out, {skipped} so far: {reason}",
    "drain": "a machine of the run is to go: saved at step {step}; Ray moves the workers when it goes",
    "stop": "saved at step {step}, and stopping: {reason}",
    "torn": "{reason}",
}


def validated(row: Mapping[str, Any]) -> str:
    """A validation's line of ``metrics.jsonl`` in words: the score that checkpoints are chosen by, and its parts."""
    main = row["main"]
    written = (lambda value: f"{value:.2%}") if wording.is_share(main) else "{:.4g}".format
    parts = {key.removeprefix(f"{main}/"): value for key, value in row.items() if key.startswith(f"{main}/")}
    told = ", ".join(f"{key} {written(value)}" for key, value in parts.items())
    shown = f"{wording.name(main)} {written(row.get(main, row['score']))}" + (f" ({told})" if told else "")
    return f"step {row['step']}: validation {shown}, loss {row['loss']:.4f}"


def _read_timing(folder: Path) -> dict[str, float]:
    """What an earlier start of the same run wrote."""
    file = folder / "timing.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def _split_times(work: Run, began: float) -> dict[str, float]:
    """Seconds of starting the workers, training and exporting, from the times of the run's first and last lines."""
    mine = [row["time_s"] for row in _lines(work.folder / "metrics.jsonl") if row["time_s"] >= began] or [began]
    assert work.plan.bundle is not None
    manifest = json.loads((work.plan.bundle / "manifest.json").read_text())
    return {
        "workers_s": round(mine[0] - began, 1),
        "train_s": round(mine[-1] - mine[0], 1),
        "export_s": round(time.time() - mine[-1], 1),
        "wait_share": manifest["checkpoint"]["wait_share"],
    }


def evaluate_once(work: Run, out: Path, more: Sequence[Section] = ()) -> bool:
    """Asks the test split, where there is one, and writes evaluation.json and report.html into `out`, and the card;
    whether there is one. `more`: sections of the report."""
    from jobs.evaluate import evaluate
    from jobs.page import describe
    from jobs.summary import table_of

    if not work.dataset.rows("test"):
        print("the data set has no test split: no evaluation")
        return False
    assert work.plan.bundle is not None
    takes = json.loads((work.plan.bundle / "manifest.json").read_text())["modalities"]
    shown = defaults.modalities(work.dataset).intersection(takes)
    result = evaluate(
        work.plan.bundle,
        work.dataset,
        "test",
        out=out,
        before=True,
        without="image" if "image" in shown else None,
        workers=work.config.cluster.workers,
        threads=work.config.cluster.threads,
        seed=work.config.seed,
        more=more,
    )
    describe(work.plan.bundle, work.dataset, result)
    print(table_of(result))
    return True


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
