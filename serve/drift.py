"""How far what is asked now lies from what the bundle was made for: of its inputs, of its answers, of how sure it is;
for each kind of input.

    features.text, features.image, features.audio
                distance of what the bundle's encoders make of words, pictures and sounds to what they made of
                validation's, in its deviations, beyond chance (see `mmagent.familiar`)
    inputs      mean novelty of answers less a half, which validation data have (see `mmagent.tasks.Decision.novelty`)
    labels      population stability index of the labels that are answered, to those of training rows: sum over labels
                of (now - then) ln(now / then), less what chance makes of so few answers; above 0.2 is usually called a
                shift
    confidence  median confidence that validation had less the median now

Each over the last `OVER` answers of a kind of input; nothing is told of fewer than `FEWEST`.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mmagent.answer import Answer
from mmagent.calibration import Calibration
from mmagent.familiar import Familiar
from mmagent.targets import TaskInfo

OVER, FEWEST = 500, 50
_ALL = "all"
_SMOOTH = 0.5  # rows added to each label, on both sides


class Drift:
    """Of one bundle.

    Args:
        infos, calibration: the bundle's, by task.
        known: what validation looked like, by kind of input.
    """

    def __init__(
        self,
        infos: Mapping[str, TaskInfo],
        calibration: Mapping[str, Calibration],
        known: Mapping[str, Familiar] | None = None,
    ) -> None:
        self._infos, self._calibration, self._known = infos, calibration, dict(known or {})
        self._placed: dict[tuple[str, str], deque[np.ndarray]] = defaultdict(lambda: deque(maxlen=OVER))
        self._seen: dict[str, deque[Answer]] = defaultdict(lambda: deque(maxlen=OVER))

    def add(self, answer: Answer, modalities: str) -> None:
        placed = {
            part: familiar.placed(answer.states[part][None])[0]
            for part, familiar in self._known.items()
            if part in answer.states
        }
        bare = replace(answer, states={})  # what lies in memory is small
        for kind in (_ALL, modalities):
            self._seen[kind].append(bare)
            for part, vector in placed.items():
                self._placed[kind, part].append(vector)

    def told(self) -> dict[str, dict[str, float]]:
        """By kind of input (and ``all``) what can be told of it."""
        out = {}
        for kind, answers in self._seen.items():
            if len(answers) >= FEWEST and (found := self._features(kind) | self._of([*answers])):
                out[kind] = found
        return out

    def _features(self, kind: str) -> dict[str, float]:
        """Of a kind of input against validation rows of the same kind."""
        out = {}
        for part, familiar in self._known.items():
            rows = self._placed.get((kind, part))
            if rows is not None:
                distance = familiar.distance(np.stack(rows), None if kind == _ALL else kind)
                if distance is not None:
                    out[f"features.{part}"] = distance
        return out

    def _of(self, answers: list[Answer]) -> dict[str, float]:
        out: dict[str, float] = {}
        if novel := [each.novelty for each in answers if each.novelty is not None]:
            out["inputs"] = round(statistics.mean(novel) - 0.5, 4)
        task = Counter(each.task for each in answers).most_common(1)[0][0]
        mine = [each for each in answers if each.task == task]
        if (shift := self._shift(task, mine)) is not None:
            out["labels"] = shift
        if (then := _median(self._calibration.get(task))) is not None:
            out["confidence"] = round(then - statistics.median(each.confidence for each in mine), 4)
        return out

    def _shift(self, task: str, answers: list[Answer]) -> float | None:
        counts = self._infos[task].counts if task in self._infos else {}
        said = Counter(each.label for each in answers if each.label is not None)
        if not counts or not said:
            return None
        labels = sorted({*counts, *said})
        before, now = sum(counts.values()), sum(said.values())
        found = 0.0
        for label in labels:
            then = (counts.get(label, 0) + _SMOOTH) / (before + _SMOOTH * len(labels))
            share = (said.get(label, 0) + _SMOOTH) / (now + _SMOOTH * len(labels))
            found += (share - then) * math.log(share / then)
        return round(max(0.0, found - _chance(len(labels), before, now)), 4)


def _chance(labels: int, before: int, now: int) -> float:
    """What the index hardly ever exceeds where nothing has changed: it is as chi-squared of labels - 1 degrees, times 1
    / before + 1 / now (Yurdakul and Naranjo 2020, "Statistical properties of the population stability index"); its
    mean and three deviations."""
    degrees = labels - 1
    return (degrees + 3 * math.sqrt(2 * degrees)) * (1 / before + 1 / now)


def _median(calibration: Calibration | None) -> float | None:
    """The confidence that half of the validation answers had at least."""
    if calibration is None:
        return None
    return next((sure for sure, covered, _ in calibration.curve if covered >= 0.5), None)
