"""How far what is asked now lies from what the bundle was made for: of its inputs, of its answers, of how sure it is;
for each kind of input.

    inputs      mean novelty of answers less a half, which validation data have (see `mmagent.tasks.Decision.novelty`)
    labels      population stability index of the labels that are answered, to those of training rows: sum over labels
                of (now - then) ln(now / then); above 0.2 is usually called a shift
    confidence  median confidence that validation had less the median now

Each over the last `OVER` answers of a kind of input; nothing is told of fewer than `FEWEST`.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Mapping

from mmagent.calibration import Calibration
from mmagent.predictor import Answer
from mmagent.targets import TaskInfo

OVER, FEWEST = 500, 50
_ALL = "all"
_SMOOTH = 0.5  # rows added to each label, on both sides


class Drift:
    """Of one bundle.

    Args:
        infos, calibration: the bundle's, by task.
    """

    def __init__(self, infos: Mapping[str, TaskInfo], calibration: Mapping[str, Calibration]) -> None:
        self._infos, self._calibration = infos, calibration
        self._seen: dict[str, deque[Answer]] = defaultdict(lambda: deque(maxlen=OVER))

    def add(self, answer: Answer, modalities: str) -> None:
        for kind in (_ALL, modalities):
            self._seen[kind].append(answer)

    def told(self) -> dict[str, dict[str, float]]:
        """By kind of input (and ``all``) what can be told of it."""
        out = {}
        for kind, answers in self._seen.items():
            if len(answers) >= FEWEST and (found := self._of([*answers])):
                out[kind] = found
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
        return round(found, 4)


def _median(calibration: Calibration | None) -> float | None:
    """The confidence that half of the validation answers had at least."""
    if calibration is None:
        return None
    return next((sure for sure, covered, _ in calibration.curve if covered >= 0.5), None)
