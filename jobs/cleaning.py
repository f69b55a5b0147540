"""What of feedback is learned from. Nothing is thrown away in silence: what is set aside has its reason.

By rule, before a model is asked:

- what is no training row (the question was not kept, no right answer was said);
- a label that the task does not have, unless heads may grow and the label has rows enough; a value far out of range;
- one key said several things of one question: the last counts;
- keys contradict each other over one question: a trusted key decides, else the majority; a tie teaches nobody.

Then by a model that has learned from the others (`jobs.crossfit`): a key whose corrections it contradicts much more
often than those of other keys is set aside, but for those corrections that it would have made itself.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import binom

from jobs import answers
from jobs.scrubbing import Scrub, scrubbed
from mmagent import feedback
from mmagent.feedback import Said
from mmagent.record import Record
from mmagent.targets import TargetError, TaskInfo, labels_of

_NEW_ROWS = 3  # that a label needs which nobody trained on
_DEVIATIONS = 10.0  # from the mean of the training values
JUDGED = 10  # corrections of a key, below which it is not judged
_MARGIN = 0.1  # of contradictions that any key may have more than the others
_SURE = 0.01  # chance that an honest key is set aside


@dataclass(frozen=True, slots=True)
class Offer:
    """A record made of feedback."""

    said: Said
    record: Record
    question: bytes  # equal for questions that a model cannot tell apart

    @property
    def answer(self) -> str:
        """What it says is right, to be compared."""
        target = self.record.target
        spans = sorted((s["start"], s["end"], s["label"]) for s in target.spans or ())
        labels = sorted(target.labels) if target.labels is not None else None
        return repr((target.label, labels, target.value, target.text, target.texts, spans))


@dataclass(frozen=True, slots=True)
class Aside:
    """Feedback that is not learned from."""

    id: str
    key: str
    reason: str  # a few words, the same for all that are set aside alike
    message: str
    final: bool = False  # it is not looked at again, where the round that set it aside was accepted

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "key": self.key, "reason": self.reason, "message": self.message}


def offers(said: Iterable[Said], scrub: Scrub | None = None) -> tuple[list[Offer], list[Aside]]:
    """The training rows that feedback makes; what makes none.

    Args:
        scrub: takes personal data out of a text.
    """
    made: list[Offer] = []
    aside: list[Aside] = []
    for each in said:
        try:
            record = feedback.record(each)
            record = scrubbed(record, scrub) if scrub is not None else record
        except TargetError as error:
            aside.append(Aside(each.id, each.key, error.reason, str(error)))
            continue
        except ValueError as error:
            aside.append(Aside(each.id, each.key, "cannot be scrubbed", str(error)))
            continue
        made.append(Offer(each, record, answers.question(record)))
    return made, aside


def by_rule(
    given: Sequence[Offer], infos: Mapping[str, TaskInfo], *, grow: bool = False, trusted: Iterable[str] = ()
) -> tuple[list[Offer], list[Aside]]:
    """What stands after the rules that need no model; what does not.

    Args:
        given: the oldest first.
        infos: the tasks of the bundle that is refitted.
        grow: whether labels that it does not have may be learned.
        trusted: keys whose word counts more than any number of others'.
    """
    kept, aside = [], []
    fresh = Counter(label for each in given for label in _unknown(each, infos))
    for each in given:
        if words := _refused(each, infos, grow=grow, fresh=fresh):
            aside.append(Aside(each.said.id, each.said.key, *words))
        else:
            kept.append(each)
    kept, more = _latest(kept)
    aside += more
    kept, more = _agreed(kept, set(trusted))
    return kept, [*aside, *more]


def _unknown(offer: Offer, infos: Mapping[str, TaskInfo]) -> set[str]:
    known = infos.get(offer.record.task)
    return set(labels_of(offer.record)) - set(known.labels) if known else set()


def _refused(
    offer: Offer, infos: Mapping[str, TaskInfo], *, grow: bool, fresh: Mapping[str, int]
) -> tuple[str, str] | None:
    task, info = offer.record.task, infos.get(offer.record.task)
    if info is None:
        return "unknown task", f"the bundle has no task {task!r}, but {', '.join(infos)}"
    for label in sorted(_unknown(offer, infos)):
        if not grow:
            return "unknown label", f"{label!r} is no label of {task}: --grow lets it learn new ones"
        if fresh[label] < _NEW_ROWS:
            return "rare new label", f"{label!r} is new and has {fresh[label]} rows; {_NEW_ROWS} or more are wanted"
    value = offer.record.target.value
    if value is not None and info.deviation and abs(value - (info.mean or 0.0)) > _DEVIATIONS * info.deviation:
        return "value out of range", f"{value:g} is more than {_DEVIATIONS:g} deviations from the mean {info.mean:g}"
    return None


def _latest(given: Sequence[Offer]) -> tuple[list[Offer], list[Aside]]:
    """The last word of each key on each question."""
    last = {(each.said.key, each.question): each for each in given}
    kept = [each for each in given if last[each.said.key, each.question] is each]
    aside = [
        Aside(
            each.said.id,
            each.said.key,
            "said again",
            f"the same key said more of this question: {last_of.said.id}",
            True,
        )
        for each in given
        if (last_of := last[each.said.key, each.question]) is not each
    ]
    return kept, aside


def _agreed(given: Sequence[Offer], trusted: set[str]) -> tuple[list[Offer], list[Aside]]:
    """One row for each question."""
    by_question: dict[bytes, list[Offer]] = defaultdict(list)
    for each in given:
        by_question[each.question].append(each)
    kept: list[Offer] = []
    aside: list[Aside] = []
    for group in by_question.values():
        asked = [each for each in group if each.said.key in trusted] or group
        votes = Counter(each.answer for each in asked).most_common()
        tie = len(votes) > 1 and votes[0][1] == votes[1][1]
        best = None if tie else next(each for each in asked if each.answer == votes[0][0])
        if best is not None:
            kept.append(best)
        for each in group:
            if each is best:
                continue
            same = best is not None and each.answer == best.answer
            reason = "agrees with another" if same else "contradiction"
            words = f"{len(group)} keys answer this question: " + (
                "it is kept once" if same else "they are even" if best is None else "this is not what most of them say"
            )
            aside.append(Aside(each.said.id, each.said.key, reason, words, final=best is not None))
    order = {each.said.id: place for place, each in enumerate(given)}
    return sorted(kept, key=lambda each: order[each.said.id]), aside


def suspects(contradicted: Mapping[str, Sequence[bool]]) -> dict[str, str]:
    """The keys to set aside, and why.

    Args:
        contradicted: by key, of each of its corrections, whether a model that did not learn from this key answers
            otherwise.
    """
    judged = {key: list(found) for key, found in contradicted.items() if len(found) >= JUDGED}
    if len(judged) < 2:
        return {}
    rates = {key: sum(found) / len(found) for key, found in judged.items()}
    out: dict[str, str] = {}
    for key, found in judged.items():
        usual = statistics.median(rate for other, rate in rates.items() if other != key)
        allowed = min(0.95, usual + _MARGIN)
        if binom.sf(sum(found) - 1, len(found), allowed) < _SURE:
            out[key] = (
                f"{sum(found)} of {len(found)} corrections of this key contradict a model that learned from all "
                f"others; usual is {usual:.0%}"
            )
    return out


def without(given: Sequence[Offer], wrong: Mapping[str, bool], keys: Mapping[str, str]) -> tuple[
    list[Offer], list[Aside]
]:  # fmt: skip
    """What stands without suspicious keys.

    Args:
        wrong: by feedback, whether the model contradicts it.
        keys: of `suspects`.
    """
    kept = [each for each in given if each.said.key not in keys or not wrong.get(each.said.id, True)]
    out = [each for each in given if each.said.key in keys and wrong.get(each.said.id, True)]
    return kept, [Aside(each.said.id, each.said.key, "suspicious key", keys[each.said.key], True) for each in out]


def records(given: Sequence[Offer]) -> list[Record]:
    return [replace(each.record, weight=1.0) for each in given]
