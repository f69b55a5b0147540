"""Evidence by taking away (M. Zeiler, R. Fergus 2014, arXiv:1311.2901): a part of a question is worth what the answer's
score loses without it. It needs nothing of a model but its score, so it is for those whose language model brings words,
pictures and sounds together in ways of its own.

Words are left out of the record, which is then read anew; a window of two by two regions of a picture (of two stretches
of a sound) is filled with its mean. The score is the logarithm of the answer's probability, or what its task makes of
it; of a text that was written, of the whole of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mmagent.answer import Answer
from mmagent.batch import Sample
from mmagent.evidence import BINS, GRID, ExplainError, Place, Word, part
from mmagent.predictor import Predictor
from mmagent.record import Message, Record, Target, compose, segments

_WORD = re.compile(r"\w+|[^\w\s]")
_MOST = 128  # words that are left out one by one; longer texts are in runs
_WINDOW = 2  # regions, and stretches, that are taken away together
_ROWS = 8  # of one forward pass

Found = tuple[list[Word], list[np.ndarray], list[np.ndarray]]  # words, (GRID, GRID) each, (BINS,) each


def find(predictor: Predictor, sample: Sample, answer: Answer) -> Found:
    """What the score loses without each part; none where it gains.

    Raises:
        ExplainError: the answer is nothing that has a score, or hangs on places among the words.
    """
    task = predictor.tasks[sample.task]
    if task.kind == "relate":
        raise ExplainError("relate asks about two places in a text, which move where a word of it is left out")
    if task.generates:
        if not answer.text:
            raise ExplainError("nothing was written, so there is nothing to explain")
        sample = predictor.prepare(replace(sample.record, target=Target(text=answer.text)))
    words = _words(sample.record)
    pictures = [(which, at) for which in range(len(sample.images)) for at in _windows(GRID, 2)]
    sounds = [(which, at) for which in range(len(sample.audios)) for at in _windows(BINS, 1)]

    def variants() -> Iterator[Sample]:
        yield sample
        for word in words:
            assert word.place is not None
            less = predictor.prepare(unsaid(sample.record, [word.place]))
            yield replace(less, images=sample.images, audios=sample.audios)
        for kind, windows in (("image", pictures), ("audio", sounds)):
            for which, places in windows:
                yield covered(sample, [(kind, which, place) for place in places])

    whole, *scores = _scores(predictor, variants(), answer)
    lost = iter(np.maximum(whole - np.array(scores), 0.0).tolist())
    found = [replace(word, weight=next(lost)) for word in words]
    images = [np.zeros((2, GRID * GRID)) for _ in sample.images]  # sum and count of the windows over each region
    audios = [np.zeros((2, BINS)) for _ in sample.audios]
    for places, sums in ((pictures, images), (sounds, audios)):
        for which, at in places:
            sums[which][:, at] += np.array([[next(lost)], [1.0]])
    grids = [(total / count).reshape(GRID, GRID) for total, count in images]
    return found, grids, [total / count for total, count in audios]


def covered(sample: Sample, units: Sequence[tuple[str, int, int]]) -> Sample:
    """A sample with regions of its pictures and stretches of its sounds filled with their mean."""
    images, audios = [image.copy() for image in sample.images], [audio.copy() for audio in sample.audios]
    for kind, which, place in units:
        if kind == "image":
            image = images[which]
            rows, columns = (part(size, at, GRID) for size, at in zip(image.shape, divmod(place, GRID), strict=False))
            image[rows, columns] = sample.images[which].mean((0, 1)).astype(image.dtype)
        elif kind == "audio":
            audios[which][part(len(audios[which]), place, BINS)] = sample.audios[which].mean(0)
    return replace(sample, images=tuple(images), audios=tuple(audios))


def unsaid(record: Record, places: Sequence[Place]) -> Record:
    """A record without some of its words."""
    messages = list(record.messages)
    for number in {place.message for place in places}:
        parts = list(segments(messages[number].content))
        for place in sorted((each for each in places if each.message == number), reverse=True):
            kind, words = parts[place.part]
            parts[place.part] = kind, words[: place.start] + words[place.end :]
        messages[number] = replace(messages[number], content=compose(parts))
    return replace(record, messages=tuple(messages))


def _words(record: Record) -> list[Word]:
    """The words of all messages; `start` and `end` count in `mmagent.text.words`."""
    texts = [
        (number, which, words)
        for number, message in enumerate(record.messages)
        for which, (kind, words) in enumerate(segments(message.content))
        if kind == "text"
    ]
    each = -(-sum(len(_WORD.findall(words)) for *_, words in texts) // _MOST)
    lines = list(_lines(record.messages))
    out: list[Word] = []
    end = 0
    for number, which, words in texts:
        found = list(_WORD.finditer(words))
        base, line = lines[number]
        for at in range(0, len(found), each):
            run = found[at : at + each]
            place = Place(number, which, run[0].start(), run[-1].end())
            shown = " ".join(words[place.start : place.end].split())
            start = base + max(0, line.find(shown, max(0, end - base)))
            end = start + len(shown)
            out.append(Word(shown, start, end, (), 0.0, place))
    return out


def _lines(messages: Sequence[Message]) -> Iterator[tuple[int, str]]:
    """Of each message, where its words begin in `mmagent.text.words`, and these words."""
    said = [" ".join("".join(w for kind, w in segments(m.content) if kind == "text").split()) for m in messages]
    alone = sum(map(bool, said)) <= 1
    at = 0
    for message, words in zip(messages, said, strict=True):
        opening = "" if alone or not words else f"{message.role}: "
        yield at + len(opening), words
        at += len(opening) + len(words) + bool(words)


def _windows(size: int, axes: int) -> list[list[int]]:
    """The places of each window, in a line or in a square that is counted by rows."""
    starts = range(size - _WINDOW + 1)
    if axes == 1:
        return [[start + n for n in range(_WINDOW)] for start in starts]
    square = range(_WINDOW)
    return [[(row + r) * size + column + c for r in square for c in square] for row in starts for column in starts]


def _scores(predictor: Predictor, samples: Iterator[Sample], answer: Answer) -> list[float]:
    out: list[float] = []
    group: list[Sample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == _ROWS:
            out += _scored(predictor, group, answer)
            group = []
    return out + (_scored(predictor, group, answer) if group else [])


@torch.no_grad()
def _scored(predictor: Predictor, samples: Sequence[Sample], answer: Answer) -> list[float]:
    """How much the model says the answer to each: of several views the chosen candidate's, or the first."""
    task = predictor.tasks[samples[0].task]
    batch = predictor.tensors(samples)
    output = predictor.model(batch)[task.name]
    which = int(answer.label) if answer.label is not None and samples[0].record.candidates else 0
    row, rows = 0, []
    for sample in samples:
        rows.append(row + next((n for n, view in enumerate(sample.views) if view.index == which), 0))
        row += len(sample.views)
    if task.generates:
        own = {key: value for key, value in batch.items() if key.startswith(f"{task.name}/")}
        tokens: Any = task.outputs(output, own).float()  # (rows, reply, 4): the first its chance, the last its being
        return [float(each) for each in (tokens[..., 0] * (tokens[..., 3] > 0)).sum(1)]
    return [float(each) for each in task.evidence(output[rows], answer)]
