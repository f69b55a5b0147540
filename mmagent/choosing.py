"""Which of many questions teach most when somebody labels them: those that the model is unsure of or answers otherwise
than the bundle before it, and not the same thing again and again.

Of the questions with the highest scores as many clusters are made as are wanted, weighed by the scores, and the
highest of each is taken (Zhdanov 2019, "Diverse mini-batch active learning", arXiv:1901.05954).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from mmagent.answer import Answer
from mmagent.batch import PartError
from mmagent.predictor import Predictor
from mmagent.record import Record

_POOL = 10  # questions for each that is wanted, from which clusters are made
_DISAGREES = 0.5  # of a score's scale: an answer that changed


@dataclass(frozen=True, slots=True)
class Weighed:
    """A question, and how much its right answer would teach."""

    answer: Answer  # of the present bundle
    score: float
    vector: np.ndarray  # (channels,), equal for questions that mean the same


def weigh(records: Sequence[Record], now: Predictor, before: Predictor | None = None) -> list[Weighed | None]:
    """Each record's answer and score, in one pass; none for one that cannot be answered.

    Args:
        now, before: the present bundle, and the one before it.
    """
    answers = now.attempt(records)
    others = before.attempt(records) if before is not None else [None] * len(records)
    out: list[Weighed | None] = []
    for record, answer, other in zip(records, answers, others, strict=True):
        if isinstance(answer, PartError):
            out.append(None)
            continue
        was = other if isinstance(other, Answer) else None
        out.append(Weighed(answer, score(answer, was), now.embed([now.prepare(record)])[0]))
    return out


def unsure(answer: Answer) -> float:
    """From 0 to 1: one minus the distance of the two likeliest answers, or one minus the confidence."""
    chances = sorted(answer.probabilities.values(), reverse=True)
    if answer.label is not None and len(chances) > 1:
        return 1.0 - (chances[0] - chances[1])
    return 1.0 - answer.confidence


def score(answer: Answer, before: Answer | None) -> float:
    """How much the right answer to a question would teach.

    Args:
        before: what the previous bundle answers.
    """
    return unsure(answer) + (_DISAGREES if before is not None and before.words != answer.words else 0.0)


def best(weighed: Sequence[Weighed], count: int, seed: int = 0) -> list[int]:
    """Places of the questions to label, those that teach most first."""
    if not weighed:
        return []
    # Vectors of words alone are shorter than those with media: they are filled up.
    width = max(len(each.vector) for each in weighed)
    vectors = np.stack([np.pad(each.vector, (0, width - len(each.vector))) for each in weighed])
    return choose([each.score for each in weighed], vectors, count, seed)


def choose(scores: Sequence[float], vectors: np.ndarray, count: int, seed: int = 0) -> list[int]:
    """Places of the questions to label, those that teach most first.

    Args:
        vectors: (questions, channels), equal for questions that mean the same.
    """
    values = np.asarray(scores, float)
    order = np.argsort(-values, kind="stable")[: _POOL * count]
    if len(order) <= count:
        return order.tolist()
    weights = np.maximum(values[order], 1e-6)
    clusters = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=1024)
    found = clusters.fit_predict(vectors[order], sample_weight=weights)
    best = {int(cluster): int(place) for place, cluster in reversed([*zip(order, found, strict=True)])}
    taken = sorted(best.values(), key=lambda place: -values[place])
    rest = [int(place) for place in order if int(place) not in set(taken)]  # of empty clusters
    return sorted((taken + rest)[:count], key=lambda place: -values[place])
