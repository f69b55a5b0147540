"""Whether a candidate may take a bundle's place: the same questions asked of both, compared by rules.

Each question is answered rightly or not (`mmagent.tasks.Task.right`); a check is about the mean difference of that, the
candidate's minus the present bundle's, with an interval by a paired bootstrap over groups of questions (Efron and
Tibshirani 1993, chapter 8): those about one picture are not independent.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmagent import fairness, metrics
from mmagent.config import ConfigError
from mmagent.predictions import slice_masks
from mmagent.tasks import Task

_RESAMPLES = 2000
NOISY = "noisy "  # in front of a modality, in the column without
FIXED, NEW, EARLIER = "fixed", "new", "earlier"  # sets of questions: the test split; of this feedback; of that before


class Rules(BaseModel):
    """The file of a gate's rules."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    confidence: float = Field(0.95, gt=0.5, lt=1, description="of intervals")
    max_loss: float = Field(
        0.02, ge=0, description="of right answers to the fixed test set, or of what a slice of it may lose: a "
        "candidate is refused where the interval lies below minus this",
    )  # fmt: skip
    min_rows: int = Field(30, gt=0, description="of a slice that is judged")
    min_gain: float = Field(0.0, description="of right answers to the new feedback's test part, in the mean")
    max_ece_rise: float = Field(0.03, ge=0, description="of the calibration error on the fixed test set")
    max_blind_loss: float | None = Field(
        None, ge=0, description="as max_loss, where a modality was taken away; none: that is told, and not judged, "
        "since a model that never trained without it guesses there",
    )  # fmt: skip
    max_noisy_loss: float | None = Field(
        None, ge=0, description="as max_loss, where a modality is noisy (see `mmagent.disturbed`); none: that is told, "
        "and not judged",
    )  # fmt: skip
    noisy_rows: int = Field(300, ge=0, description="of the fixed test set that are asked with each modality noisy")
    max_gap: float | None = Field(
        None, ge=0, le=1, description="between groups of a slice column, of each of `mmagent.fairness`: a candidate is "
        "refused where the interval lies above this; none: that is told, and not judged",
    )  # fmt: skip
    swap: str | None = Field(
        None, description="a list of pairs of words (see `jobs.counterfactual`), beside this file: also asks with "
        "words swapped",
    )  # fmt: skip
    max_swapped: float = Field(0.05, ge=0, le=1, description="of answers that change with them, as max_gap")
    max_verbatim: float | None = Field(
        0.02, ge=0, le=1, description="share of written answers that hold a run of training text; none: not judged"
    )
    max_slowdown: float = Field(1.5, gt=0, description="of the time of one answer, to the present bundle's")
    test_rows: int = Field(2000, gt=0, description="of the fixed test set that are asked, drawn by the seed")
    slices: tuple[str, ...] = Field(("modalities",), description="keys of meta whose values are judged apart")


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison, and what the rules say of it."""

    name: str  # of what all are asked alike; of a part of it, behind a comma
    rows: int
    before: float
    after: float
    low: float  # of the difference
    high: float
    rule: str  # in words
    passed: bool | None  # none: it is told, and judged by no rule

    def to_dict(self) -> dict[str, Any]:
        numbers = {"before": self.before, "after": self.after, "low": self.low, "high": self.high}
        told = {key: round(float(value), 6) for key, value in numbers.items()}
        return {"name": self.name, "rows": self.rows, **told, "rule": self.rule, "passed": self.passed}


def load(file: Path) -> Rules:
    """Reads rules.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, with the nearest right one, or a value out of range.
    """
    try:
        rules = Rules.model_validate(yaml.safe_load(file.read_text()) or {})
        return rules if rules.swap is None else rules.model_copy(update={"swap": str(file.parent / rules.swap)})
    except OSError as error:
        raise ConfigError(f"cannot read the gate's rules {file}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the gate's rules {file} are not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, Rules.model_fields, n=1, cutoff=0.0)[0]
            raise ConfigError(f"the gate's rules {file}: unknown key {key!r}: did you mean {near!r}?") from error
        raise ConfigError(f"the gate's rules {file}: {key}: got {first['input']!r:.80}, {first['msg']}") from error


def compare(before: pa.Table, after: pa.Table, rules: Rules, *, seed: int = 0) -> list[Check]:
    """The checks of two tables of `mmagent.predictions`, of the same questions, with a column ``set``.

    Raises:
        ValueError: they are of different questions.
    """
    keys = ("set", "id", "without")
    if not before.num_rows:
        rule = "questions to judge by: a test split, or feedback enough for a part to test with"
        return [Check("questions", 0, 0.0, 0.0, 0.0, 0.0, rule, False)]
    if any(before[key].to_pylist() != after[key].to_pylist() for key in keys):
        raise ValueError("the two bundles were asked different questions")
    sets, without = (np.array(before[key].to_pylist(), object) for key in ("set", "without"))
    pair = _Pair(before, after, rules, seed)
    out = []
    whole = without == ""
    for name, mask in ((FIXED, (sets == FIXED) & whole), (EARLIER, (sets == EARLIER) & whole)):
        if mask.any():
            out.append(pair.check(name, mask, _loss_rule(rules.max_loss), -rules.max_loss))
            out += [
                pair.check(f"{name}, {told}", mask & part, _loss_rule(rules.max_loss), -rules.max_loss)
                for told, part in _slices(before)
                if (mask & part).sum() >= rules.min_rows
            ]
    fresh = (sets == NEW) & whole
    if fresh.any():
        out.append(pair.gain(NEW, fresh))
    for taken in sorted({*without} - {""}):
        mask = (sets == FIXED) & (without == taken)
        if mask.sum() >= rules.min_rows:
            noisy = taken.startswith(NOISY)
            key = "max_noisy_loss" if noisy else "max_blind_loss"
            out.append(pair.hard(f"{FIXED}, {'with' if noisy else 'without'} {taken}", mask, key))
    if (error := _calibration(before, after, (sets == FIXED) & whole, rules)) is not None:
        out.append(error)
    return out


def gaps(before: pa.Table, after: pa.Table, tasks: Mapping[str, Task], rules: Rules, *, seed: int = 0) -> list[Check]:
    """The checks of gaps between groups of the fixed test set, for each slice column but the kinds of input."""
    out = []
    for name, task in tasks.items():
        for column in rules.slices:
            if column == "modalities":
                continue
            sides = [_gap(table, name, task, column, seed) for table in (before, after)]
            if sides[0] is None or sides[1] is None:
                continue
            rows = sum(group["n"] for group in sides[1]["groups"].values())
            for what in ("accuracy", "demographic_parity", "equalized_odds"):
                if what in sides[1] and what in sides[0]:
                    told = f"{FIXED}, {name}, gap of {what.replace('_', ' ')} between groups of {column}"
                    out.append(bounded(told, rows, sides[0][what]["value"], sides[1][what], rules.max_gap, "max_gap"))
    return out


def _gap(table: pa.Table, name: str, task: Task, column: str, seed: int) -> Mapping[str, Any] | None:
    plain = pc.and_(pc.equal(table["set"], FIXED), pc.equal(table["without"], ""))
    mine = table.filter(pc.and_(pc.and_(plain, pc.is_null(table["error"])), pc.equal(table["task"], name)))
    return fairness.gaps(mine, task, column, seed) if mine.num_rows else None


def bounded(name: str, rows: int, before: float, after: Mapping[str, float], most: float | None, key: str) -> Check:
    """The check of something that should be small, as it is after, with its interval.

    Args:
        after: value, low, high.
        most: refused where the interval lies above it; none: it is told alone.
    """
    low, high = (float(after[side] - before) for side in ("low", "high"))
    if most is None:
        return Check(name, rows, before, after["value"], low, high, f"told alone: {key} is not given", None)
    rule = f"not surely above {most:g}"
    return Check(name, rows, before, after["value"], low, high, rule, bool(after["low"] <= most))


def slower(before_ms: float, after_ms: float, rules: Rules) -> Check:
    """The check of the time of one answer."""
    ratio = after_ms / before_ms
    rule = f"at most {rules.max_slowdown:g} times"
    return Check("one answer, ms", 1, before_ms, after_ms, ratio, ratio, rule, ratio <= rules.max_slowdown)


def passed(checks: Sequence[Check]) -> bool:
    return all(each.passed is not False for each in checks)


def flips(before: pa.Table, after: pa.Table, *, each: int = 6, seed: int = 0) -> dict[tuple[str, str], str]:
    """Questions that only one of the two answers rightly, (set, id) to the heading they are shown under."""
    was, now = (_right(table) for table in (before, after))
    names = {(False, True): "right now, wrong before", (True, False): "wrong now, right before"}
    found: dict[str, list[tuple[str, str]]] = {}
    columns = (before[key].to_pylist() for key in ("set", "id", "without"))
    for a, b, part, id, without in zip(was, now, *columns, strict=True):
        if not without and (heading := names.get((bool(a), bool(b)))):
            found.setdefault(heading, []).append((part, id))
    out: dict[tuple[str, str], str] = {}
    for heading, ids in sorted(found.items(), reverse=True):
        ranked = sorted(ids, key=lambda key: (zlib.crc32(f"{seed}:{key}".encode()), key))
        out |= dict.fromkeys(ranked[:each], heading)
    return out


class _Pair:
    def __init__(self, before: pa.Table, after: pa.Table, rules: Rules, seed: int) -> None:
        self._was, self._now, self._rules, self._seed = _right(before), _right(after), rules, seed
        groups = before["group"].to_pylist()
        self._groups = np.unique(np.array(groups, object).astype(str), return_inverse=True)[1]

    def interval(self, name: str, mask: np.ndarray) -> tuple[float, float]:
        """Of the mean difference over the rows of a mask."""
        change = (self._now - self._was)[mask]
        _, places = np.unique(self._groups[mask], return_inverse=True)
        count = int(places.max()) + 1
        sums, sizes = np.bincount(places, change, count), np.bincount(places, minlength=count)
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
        tail = (1 - self._rules.confidence) / 2
        low, high = np.quantile((drawn @ sums) / (drawn @ sizes), [tail, 1 - tail])
        return float(low), float(high)

    def check(self, name: str, mask: np.ndarray, rule: str, least: float) -> Check:
        low, high = self.interval(name, mask)
        return self._made(name, mask, low, high, rule, bool(high >= least))

    def hard(self, name: str, mask: np.ndarray, key: str) -> Check:
        """Of questions that lack something, or are noisy; judged where the rules have a number for that."""
        most: float | None = getattr(self._rules, key)
        if most is not None:
            return self.check(name, mask, _loss_rule(most), -most)
        low, high = self.interval(name, mask)
        return self._made(name, mask, low, high, f"told alone: {key} is not given", None)

    def gain(self, name: str, mask: np.ndarray) -> Check:
        rules = self._rules
        low, high = self.interval(name, mask)
        gained = float((self._now - self._was)[mask].mean())
        few = int(mask.sum()) < rules.min_rows
        rule = f"at least {rules.min_gain:+.3g} in the mean"
        rule += f", not judged below {rules.min_rows} rows" if few else ""
        return self._made(name, mask, low, high, rule, None if few else gained >= rules.min_gain)

    def _made(self, name: str, mask: np.ndarray, low: float, high: float, rule: str, passed: bool | None) -> Check:
        before, after = float(self._was[mask].mean()), float(self._now[mask].mean())
        return Check(name, int(mask.sum()), before, after, low, high, rule, passed)


def _right(table: pa.Table) -> np.ndarray:
    """(rows,) 1.0 where an answer is right; none is wrong."""
    return np.array([bool(each) for each in table["right"].to_pylist()], float)


def _loss_rule(loss: float) -> str:
    return f"not surely below {-loss:+.3g}"


def _slices(table: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """Every task, class and kind of input, and the classes of each kind of input."""
    tasks = np.array(table["task"].to_pylist(), object)
    labels = np.array(table["label"].to_pylist(), object)
    kinds = list(slice_masks(table))
    for task in sorted({*tasks}):
        mine = tasks == task
        if len({*tasks}) > 1:
            yield task, mine
        classes = _classes(task, labels[mine])
        yield from ((f"{task}={label}", mine & (labels == label)) for label in classes)
        for name, mask in kinds:
            yield f"{task}, {name}", mine & mask
            if name.startswith("modalities="):
                yield from ((f"{task}={label}, {name}", mine & mask & (labels == label)) for label in classes)


def _classes(task: str, labels: np.ndarray) -> list[str]:
    """The labels of a task that gives one."""
    return sorted({each for each in labels if each is not None}) if task.startswith(("classify", "relate")) else []


def _calibration(before: pa.Table, after: pa.Table, mask: np.ndarray, rules: Rules) -> Check | None:
    wanted = pa.array(mask)
    errors = []
    for table in (before, after):
        part = table.filter(wanted)
        part = part.filter(pc.and_(pc.is_null(part["error"]), pc.invert(pc.starts_with(part["task"], "regress"))))
        if part.num_rows < rules.min_rows:
            return None
        errors.append(metrics.calibration(metrics.Marked(part["confidence"].to_numpy(), _right(part) > 0))["ece"])
    was, now = errors
    rise, name, rule = now - was, f"{FIXED}, calibration error", f"at most {rules.max_ece_rise:+.3g}"
    return Check(name, int(mask.sum()), was, now, rise, rise, rule, bool(rise <= rules.max_ece_rise))


def told(verdict: Mapping[str, Any]) -> list[str]:
    """A gate's checks as lines for a terminal: those that fail, and those of whole sets."""
    lines = [f"{'':24s}{'rows':>6s}{'before':>9s}{'after':>9s}{'change':>9s}"]
    for each in verdict["checks"]:
        if each["passed"] is False or "," not in each["name"]:
            mark = {True: "", False: "  REFUSED", None: "  (not judged)"}[each["passed"]]
            change = each["after"] - each["before"]
            lines.append(
                f"{each['name'][:40]:24s}{each['rows']:>6d}{each['before']:>9.3f}{each['after']:>9.3f}{change:>+9.3f}"
                f"  {each['rule']}{mark}"
            )
    return lines
