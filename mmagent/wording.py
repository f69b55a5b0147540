"""How the metrics of an evaluation are called and written: in the terminal, in the report, on the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmagent.charts import SPACE, number, percent

_NAMES = {
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "f1": "F1",
    "ece": "calibration error",
    "map": "mean average precision",
    "subset_accuracy": "all labels right",
    "exact": "exact",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
    "spearman": "rank correlation",
    "mrr": "mean reciprocal rank",
    "auc": "AUC",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "wer": "word error rate",
    "cer": "character error rate",
}
_NO_SHARES = {"mae", "rmse", "r2", "spearman", "nll", "brier", "perplexity"}  # in another unit, or below zero
_BESIDE = {  # what is shown beside the main metric, by kind of task
    "classify": ("macro_f1",),
    "relate": ("macro_f1",),
    "multilabel": ("macro_f1", "map", "subset_accuracy"),
    "regress": ("mae", "rmse", "spearman"),
    "match": ("recall_at_1", "recall_at_5", "auc"),
    "tag": ("precision", "recall", "exact"),
    "extract": ("exact",),
    "generate": ("exact", "bleu", "rouge_l", "perplexity", "wer", "cer"),
}
_ANSWERS = {  # what an answer of a task is, on the card
    "classify": "one of {count} labels",
    "multilabel": "any of {count} labels",
    "regress": "a number",
    "match": "the candidate that fits best",
    "tag": "the spans of a text that are of {count} types",
    "relate": "how two marked spans of a text stand to each other: one of {count} relations",
    "extract": "the part of a text that answers a question, or that there is none",
    "generate": "a text",
}
BEFORE = {"majority": "majority answer", "linear_probe": "linear probe", "constant": "constant answer"}


def name(metric: str) -> str:
    """``macro_f1`` as ``macro F1``."""
    return _NAMES.get(metric) or metric.replace("_", " ")


def heading(words: str) -> str:
    """With a capital letter in front."""
    return words[:1].upper() + words[1:]


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction of one, which is written in percent."""
    return metric not in _NO_SHARES


def written(metric: str, value: float) -> str:
    return percent(value) if is_share(metric) else number(value)


def value(block: Mapping[str, Any], metric: str) -> str:
    """A metric of a part of an evaluation; a dash where that has none."""
    found = block["metrics"].get(metric)
    return "–" if found is None else written(metric, found["value"])


def interval(metric: str, found: Mapping[str, float | None]) -> str:
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return "–"
    first = written(metric, low).removesuffix(f"{SPACE}%")
    return f"{first} – {written(metric, high)}".replace(" ", SPACE)


def beside(block: Mapping[str, Any]) -> list[str]:
    """The metrics to show beside the main one, of those that there are."""
    return [metric for metric in _BESIDE.get(block["kind"], ()) if metric in block["metrics"]]


def answers(kind: str, count: int) -> str:
    """What a task of this kind answers, in a few words; `count`: its labels."""
    return _ANSWERS[kind].format(count=count)


def cut(block: Mapping[str, Any]) -> str:
    """How many rows were longer than the model reads."""
    return (
        f"{block['cut']:,} of {block['n']:,} rows are longer than the model reads (data.max_text_tokens, "
        "data.max_answer_tokens): their oldest words, or the end of what is to be written, are left out"
    )
