"""generate: a text that the language model writes token by token: translation, summary, dialogue, open questions,
captions, transcription."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import calibration as calibrations
from mmagent import metrics, text
from mmagent.calibration import Calibration
from mmagent.metrics import Number
from mmagent.reading import Reader, View
from mmagent.record import Record
from mmagent.tasks.task import IGNORED, Decision, Outcome, Task, divergence

_SURE = 1e-6  # the least doubt of a text, so that its odds are a number


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of one answer."""

    text: str | None  # None where a right answer was only weighed, as in validation
    chance: float  # logarithm of the probability that the model gives its likeliest tokens, all of them together
    likelihood: tuple[float, int] | None = None  # of the right answer: the logarithm of its probability, and its tokens
    tokens: tuple[tuple[str, float], ...] = ()  # each, and the logarithm of its probability
    stopped: bool = True  # the text came to an end by itself
    exact: bool = False  # each token of the right answer was the likeliest: greedy search would have written it


class Generate(Task):
    """The output is the logits of the answer's tokens, (rows, reply, vocabulary), each from what stands before it; rows
    are aligned at their ends, as `Writer` wants them."""

    kind: ClassVar[str] = "generate"
    generates: ClassVar[bool] = True
    score: ClassVar[str] = "likelihood"
    measures: ClassVar[tuple[str, ...]] = ("likelihood", "perplexity")
    main: ClassVar[str] = "chrf"

    def views(self, record: Record, reader: Reader) -> tuple[View, ...]:
        view, answer = reader.prompt(record), self.replied(record, reader)
        return (View(view.ids, reply=answer.reply, cut=view.cut + answer.cut),)

    def replied(self, record: Record, reader: Reader) -> View:
        reply, cut = reader.reply(golds[0]) if (golds := _golds(record)) else (None, 0)
        return View(np.zeros(0, np.int64), reply=reply, cut=cut)

    def head(self, width: int) -> nn.Module:
        """Raises: AssertionError: the language model's own output layer answers."""
        raise AssertionError("a task that generates has no head")

    def target(self, record: Record, view: View) -> dict[str, np.ndarray] | None:
        return None if view.reply is None else {"reply": view.reply}

    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        longest = max((len(target["reply"]) for target in targets if target is not None), default=1)
        out = torch.full((len(targets), longest), IGNORED, dtype=torch.int64)
        for row, target in enumerate(targets):
            if target is not None:
                out[row, longest - len(target["reply"]) :] = torch.from_numpy(target["reply"])
        return {self.key("reply"): out}

    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        """The mean over an answer's tokens of their negative log-likelihood: a long answer weighs as much as a short
        one."""
        reply = batch[self.key("reply")]
        each = F.cross_entropy(
            output.float().flatten(0, 1), reply.flatten(), ignore_index=IGNORED, reduction="none",
            label_smoothing=smoothing,
        ).view_as(reply)  # fmt: skip
        count = (reply != IGNORED).sum(1).clamp(min=1)
        return (each.sum(1) / count * batch["weight"]).sum() / size

    def distance(self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        """The mean over the right answer's tokens of the divergence of what comes next (arXiv:1606.07947, section
        3.1)."""
        known = (batch[self.key("reply")] != IGNORED).float()
        return (divergence(output, taught, temperature) * known).sum(1) / known.sum(1).clamp(min=1)

    def outputs(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(rows, reply, 4): of each token the logarithm of its probability and of the likeliest one's, whether it is
        that one, and whether it is a token at all."""
        reply = batch[self.key("reply")]
        chances = output.float().log_softmax(-1)
        top, place = chances.max(-1)
        own = chances.gather(-1, reply.clamp(min=0)[..., None])[..., 0]
        return torch.stack([own, top, (place == reply).float(), (reply != IGNORED).float()], dim=-1)

    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Answers of which each token was the likeliest."""
        reply = batch[self.key("reply")]
        known = (reply != IGNORED).any(1) & (batch["weight"] > 0)
        right = ((output.argmax(-1) == reply) | (reply == IGNORED)).all(1)
        return (right & known).sum(), known.sum()

    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> Written:
        """Of `outputs`, with the right answer given: what is known without writing one."""
        own, top, hit, real = (outputs[0, ..., column].astype(np.float64) for column in range(4))
        kept = real > 0
        exact = bool((hit[kept] > 0).all()) and bool(kept.any())
        return Written(None, float(top[kept].sum()), (float(own[kept].sum()), int(kept.sum())), exact=exact)

    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        """The confidence is the calibrated probability that the text is right as a whole, word for word."""
        scale = calibration.by_modalities.get(modalities, calibration.temperature)
        confidence = 1 / (1 + math.exp(-_odds(raw.chance) / scale))
        return Decision(
            text=raw.text, confidence=confidence, likelihood=raw.likelihood, tokens=raw.tokens, stopped=raw.stopped
        )

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        """Greedy search writes the right answer exactly where each of its tokens is the likeliest: that needs no
        writing to know."""
        logits = np.array([[_odds(raw.chance), 0.0] for raw in raws])
        return calibrations.fit(logits, np.array([0 if raw.exact else 1 for raw in raws]), modalities)

    def gold(self, record: Record) -> Any:
        """The right texts, and whether they were spoken alone: their errors are counted in words and letters then."""
        golds = _golds(record)
        return {"texts": golds, "heard": bool(record.audios) and not text.words(record)} if golds else None

    def right(self, outcome: Outcome) -> bool:
        return _same(outcome.decision.text or "", outcome.gold["texts"])

    def measure(self, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = 0) -> dict[str, Number]:
        """The likelihood (the geometric mean of a right token's probability) and perplexity, one over it; of written
        texts exact, BLEU and chrF (sacrebleu), ROUGE-L, and word and character error rate of what was heard."""
        return _measured(outcomes, seed, resamples)


def _measured(outcomes: Sequence[Outcome], seed: int, resamples: int) -> dict[str, Number]:
    parts: list[tuple[list[list[float]], Any]] = []
    if all(outcome.decision.likelihood is not None for outcome in outcomes):
        parts.append(([[*o.decision.likelihood] for o in outcomes if o.decision.likelihood], _likelihoods))
    if all(outcome.decision.text is not None for outcome in outcomes):
        said = [outcome.decision.text or "" for outcome in outcomes]
        golds = [list(outcome.gold["texts"]) for outcome in outcomes]
        parts += [_exact(said, golds), _rouge(said, golds), *_overlaps(said, golds)]
        if all(outcome.gold["heard"] for outcome in outcomes):
            parts += _errors(said, golds)
    groups = [outcome.group for outcome in outcomes]
    found: dict[str, Number] = {}
    for columns, from_sums in parts:
        found |= metrics.of_sums(np.array(columns, float), from_sums, groups=groups, seed=seed, resamples=resamples)
    return found


def _likelihoods(sums: np.ndarray) -> dict[str, np.ndarray]:
    mean = sums[:, 0] / np.maximum(sums[:, 1], 1)
    return {"likelihood": np.exp(mean), "perplexity": np.exp(-mean)}


def _exact(said: Sequence[str], golds: Sequence[list[str]]) -> tuple[list[list[float]], Any]:
    columns = [[float(_same(one, right)), 1.0] for one, right in zip(said, golds, strict=True)]
    return columns, lambda sums: {"exact": sums[:, 0] / sums[:, 1]}


def _rouge(said: Sequence[str], golds: Sequence[list[str]]) -> tuple[list[list[float]], Any]:
    """F of the longest common subsequence, the best over the right texts (Lin, 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    columns = [
        [max(scorer.score(gold, one)["rougeL"].fmeasure for gold in right), 1.0]
        for one, right in zip(said, golds, strict=True)
    ]
    return columns, lambda sums: {"rouge_l": sums[:, 0] / sums[:, 1]}


def _overlaps(said: Sequence[str], golds: Sequence[list[str]]) -> list[tuple[list[list[float]], Any]]:
    """BLEU and chrF, which sacrebleu makes of sums over the rows: the same numbers as its own on the whole."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    most = max(len(right) for right in golds)
    references = [[right[index] if index < len(right) else right[0] for right in golds] for index in range(most)]
    out = []
    for name, metric in (("bleu", BLEU(tokenize=_tokens_of(golds))), ("chrf", CHRF())):
        columns = metric._extract_corpus_statistics(list(said), references)

        def scores(sums: np.ndarray, name: str = name, metric: Any = metric) -> dict[str, np.ndarray]:
            rows = [metric._compute_score_from_stats([int(value) for value in row]).score for row in sums]
            return {name: np.array(rows) / 100}

        out.append((columns, scores))
    return out


def _errors(said: Sequence[str], golds: Sequence[list[str]]) -> list[tuple[list[list[float]], Any]]:
    """Edits over the length of what was said (jiwer), against the first right text."""
    import jiwer

    out = []
    for name, process in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
        columns = []
        for one, right in zip(said, golds, strict=True):
            # Case and punctuation are not heard.
            found = process(" ".join(_Words().tokenize(right[0])) or "-", " ".join(_Words().tokenize(one)))
            edits = found.substitutions + found.deletions + found.insertions
            columns.append([float(edits), float(found.hits + found.substitutions + found.deletions)])

        def rate(sums: np.ndarray, name: str = name) -> dict[str, np.ndarray]:
            return {name: sums[:, 0] / np.maximum(sums[:, 1], 1)}

        out.append((columns, rate))
    return out


class _Words:
    """Words of any language: runs of letters and digits, and each sign of a script that writes none apart."""

    _WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+")

    def tokenize(self, words: str) -> list[str]:
        return self._WORD.findall(unicodedata.normalize("NFC", words).lower())


def _tokens_of(golds: Sequence[list[str]]) -> str:
    """How sacrebleu shall find words: in Chinese its own way, in other scripts without spaces by signs."""
    joined = "".join(right[0] for right in golds)
    letters = max(1, sum(letter.isalpha() for letter in joined))
    if len(re.findall(r"[\u3040-\u30ff\u0e00-\u0e7f]", joined)) > letters / 10:
        return "char"
    return "zh" if len(re.findall(r"[\u3400-\u9fff]", joined)) > letters / 4 else "13a"


def _same(said: str, golds: Sequence[str]) -> bool:
    return any(_plain(said) == _plain(gold) for gold in golds)


def _plain(words: str) -> str:
    """Without case, doubled spaces, and the full stop at the end."""
    return " ".join(unicodedata.normalize("NFC", words).casefold().split()).rstrip(".。 ")


def _golds(record: Record) -> list[str]:
    target = record.target
    return [target.text] if target.text else [each for each in target.texts or () if each]


def _odds(chance: float) -> float:
    """The logarithm of p / (1 - p), of the logarithm of p."""
    chance = min(chance, math.log1p(-_SURE))
    return max(-50.0, chance - math.log(-math.expm1(chance)))
