"""What the demo found out: its figures with their goals, and where the time went, read from what its jobs wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent.measurement import Row

TIMING_FILE = "timing.json"
_STEPS = {  # of timing.json, in their order
    "start_s": "training prepares itself",
    "workers_s": "workers start",
    "train_s": "training",
    "export_s": "bundle",
    "evaluate_s": "evaluation",
}
_FORMS = {  # goals in percent
    "text": ("questions in text", ">= 99.0"),
    "speech_known": ("questions spoken by voices of the training", ">= 97.0"),
    "speech_unseen": ("questions spoken by voices never heard", ">= 90.0"),
    "paraphrase": ("questions in words never read", ">= 80.0"),
}
_BEFORE = {
    "majority": "the most frequent answer to each question's text, without looking",
    "linear_probe": "a linear model on features before fine-tuning",
}


class FindingsError(RuntimeError):
    """A figure that the run should have left is not there."""


@dataclass(frozen=True)
class Times:
    """Seconds of the demo's steps as the demo saw them."""

    total_s: float | None  # from the start of training to the third answer; none: the run was made earlier
    prepare_s: float
    train_s: float  # the whole job: with export and evaluation
    serve_s: float

    def seconds(self, timing: Mapping[str, float]) -> tuple[float, str]:
        """From shards to answer, and how it was measured."""
        if self.total_s is not None:
            return self.total_s, "from the start of training to the third answer"
        return sum(_steps(timing).values()) + self.serve_s, "an earlier training by its own clock"

    def breakdown(self, run: Path) -> str:
        """Where the time went, for a terminal."""
        timing = _read(run / TIMING_FILE)
        steps = [
            ("shards (not counted below)", self.prepare_s),
            *_steps(timing).items(),
            ("service starts", self.serve_s),
        ]
        if self.total_s is not None:
            known = sum(seconds for _, seconds in steps[1:])
            steps.append(("job submission, questions, the rest", max(0.0, self.total_s - known)))
        lines = [f"  {what:<36}{seconds:>7.0f} s" for what, seconds in steps]
        return "\n".join(["where the time went:", *lines])


def findings(run: Path, times: Times) -> list[Row]:
    """The demo's figures.

    Raises:
        FindingsError: evaluation.json or timing.json is not there, or lacks a figure.
    """
    evaluation, timing = _read(run / "evaluation.json"), _read(run / TIMING_FILE)
    try:
        seconds, how = times.seconds(timing)
        return [
            *(
                Row(f"demo.accuracy.{form}", _percent(evaluation["slices"][f"form={form}"]), "%", f"test: {what}", goal)
                for form, (what, goal) in _FORMS.items()
            ),
            *(
                Row(f"demo.accuracy.{name}", _percent(evaluation["before"][name]), "%", f"before: {what}")
                for name, what in _BEFORE.items()
            ),
            Row(
                "demo.blind_gap", evaluation["blind"]["gap"], "fraction",
                "|mean confidence - accuracy| on all test questions without their image", "<= 0.05",
            ),
            Row(
                "demo.wait_share", timing["wait_share"], "fraction",
                "share of step time spent waiting for data, after the first ten steps", "<= 0.03",
            ),
            Row("demo.seconds", seconds, "s", f"from shards to answer: {how}", "<= 1200"),
        ]  # fmt: skip
    except KeyError as error:
        raise FindingsError(
            f"{run}: evaluation.json or {TIMING_FILE} lacks {error}; was the run made by another version? "
            f"Delete {run} and run the demo again"
        ) from error


def _steps(timing: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the training's steps. A run from before may lack the shorter ones; never the training itself."""
    return {what: timing[key] for key, what in _STEPS.items() if key in timing or key == "train_s"}


def _percent(part: Mapping[str, Any]) -> float:
    return 100.0 * float(part["metrics"]["accuracy"]["value"])


def _read(file: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(file.read_text())
        return value
    except (OSError, ValueError) as error:
        raise FindingsError(f"cannot read {file}: {error}; the training did not finish, run the demo again") from error
