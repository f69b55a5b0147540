"""How good the default recipe is on tasks of several kinds, through the documented commands alone.

    make bench-quality          (python -m tests.bench.quality [--only KIND.MODALITY] [key.path=value ...]; SCALE=small)

For each task `jobs.prepare`, `jobs.train` with jobs/recipes/small.yaml and `jobs.evaluate`. Beside the main metric
stand a reference measured here, and what the same commands reach where training's answers are shuffled among its rows:
no better than chance, or the test would leak. That run is cut short: the tasks on texts are learned from right answers
within its steps, so it would show a leak; towers from scratch have learned little by then, and of them it shows less.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC, SVR

from jobs import evaluate, prepare, train
from jobs.speech import render
from mmagent import storage
from mmagent.arguments import Parser
from mmagent.measurement import Row, publish, table
from mmagent.speech import Clip
from tests.bench import drawings, pair, rays, templates

CHECKOUT = Path(__file__).parents[2]
RECIPE = CHECKOUT / "jobs/recipes/small.yaml"
SMALL = os.environ.get("SCALE") == "small"
SHUFFLED = "shuffled"
_SHUFFLED_STEPS = 120
_ANSWERS = ("label", "spans", "answers", "value", "candidates", "answer")  # columns of a row that are its answer


class Case(NamedTuple):
    """A task on a modality: its rows, the metric that counts, what is reached without learning, and a reference."""

    rows: list[dict[str, Any]]
    metric: str
    chance: float  # percent
    reference: float | None  # percent
    what: str
    goal: str | None
    overrides: tuple[str, ...] = ()  # of the recipe
    writes: bool = False  # the model is one that writes (see `pair`)


def _templates(kind: str, metric: str) -> Case:
    rows = list(templates.rows(kind, 60 if SMALL else 1200))
    chance = {"relate": _commonest, "extract": _unanswered}.get(kind, lambda _: 0.0)(rows)
    what = "tag: sentences written in a hurry" if kind == "noisy" else f"{kind}: sentences of forms"
    return Case(rows, metric, chance, None, f"{what}; test's names never seen", None if kind == "noisy" else ">= 95.0")


def _drawings() -> Case:
    """Statements about drawings that are true or false of them, against what their words alone say."""
    rows = [
        {"text": row["text"], "image": _uri("image/png", row["picture"]), "label": row["label"], "split": row["split"]}
        for row in drawings.rows(120 if SMALL else 6000)
    ]
    what = "classify: whether a statement is true of a drawing never seen; towers from scratch"
    return Case(rows, "accuracy", _commonest(rows), None, what, None)


class _Digits:
    """The handwritten digits of scikit-learn, split by a fixed order."""

    def __init__(self) -> None:
        found = load_digits()
        self.pixels, self.labels = found.images, found.target
        self._flat = found.images.reshape(len(found.images), -1)
        order = np.random.default_rng(0).permutation(len(self.labels))[: 200 if SMALL else None]
        self.train, self.test = order[: int(len(order) * 0.7)], order[int(len(order) * 0.8) :]
        self.parts = {"train": self.train, "validation": order[len(self.train) : -len(self.test)], "test": self.test}

    def rows(self, answer: Callable[[int, random.Random], dict[str, Any]]) -> list[dict[str, Any]]:
        rng = random.Random(0)
        return [
            {"image": _uri("image/png", _png(self.pixels[i])), "split": split, **answer(int(self.labels[i]), rng)}
            for split, part in self.parts.items()
            for i in part
        ]

    def reached(self, model: Any) -> float:
        """What a model of scikit-learn reaches on the pixels, percent: accuracy, or R2."""
        fitted = model.fit(self._flat[self.train], self.labels[self.train])
        return 100 * float(fitted.score(self._flat[self.test], self.labels[self.test]))


def _pictures() -> Case:
    digits = _Digits()
    rows = digits.rows(lambda digit, _: {"label": f"digit {digit}"})
    what = "classify: handwritten digits of scikit-learn, towers from scratch; reference: an RBF SVM on the pixels"
    return Case(rows, "accuracy", _commonest(rows), digits.reached(SVC(gamma=0.001)), what, ">= 97.0")


def _numbers() -> Case:
    digits = _Digits()
    rows = digits.rows(lambda digit, _: {"value": float(digit)})
    what = "regress: the number that a handwritten digit shows; reference: support vector regression on the pixels"
    return Case(rows, "r2", 0.0, digits.reached(SVR(gamma=0.001, C=10.0)), what, ">= 90.0")


def _captions() -> Case:
    """Pictures and their captions, one candidate a row: learnt from the other rows, ranked among all of the test."""

    def caption(digit: int, rng: random.Random) -> dict[str, Any]:
        words = f"a {rng.choice(_HANDS)} handwritten {_WORDS[digit]}"
        return {"task": "match", "candidates": [words], "label": words}

    what = "match: handwritten digits and their captions, one right one a row, four that cannot be told apart"
    chance = 100 * 5 / (len(_HANDS) * len(_WORDS))
    return Case(_Digits().rows(caption), "recall_at_5", chance, None, what, ">= 97.0")


def _open_questions() -> Case:
    """easy-VQA with its answers written out, word by word."""
    import easy_vqa

    rows: list[dict[str, Any]] = []
    for split, asked, images in (
        ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    ):
        order = random.Random(0).sample(range(len(asked[0])), (120, 40)[split == "test"] if SMALL else _OPEN[split])
        for place, index in enumerate(order):
            own = "validation" if split == "train" and place % 12 == 0 else split
            known = {"text": asked[0][index], "answer": _sentence(asked[0][index], asked[1][index])}
            rows.append({**known, "image": str(images[asked[2][index]]), "task": "generate", "split": own})
    told = Counter(row["answer"] for row in rows if row["split"] == "test")
    best = Counter((row["text"], row["answer"]) for row in rows if row["split"] == "test")
    blind: dict[str, int] = {}
    for (question, _), count in best.items():
        blind[question] = max(blind.get(question, 0), count)
    what = "generate: easy-VQA in its open form, MiniLM with a fresh decoder; reference: a question's commonest answer"
    chance, reference = 100 * max(told.values()) / told.total(), 100 * sum(blind.values()) / told.total()
    overrides = ("freeze.strategy=all", "data.max_answer_tokens=16", "train.epochs=4")
    return Case(rows, "exact", chance, reference, what, ">= 95.0", overrides, writes=True)


def _sentence(question: str, answer: str) -> str:
    """The answer as one would say it."""
    return answer if answer in ("yes", "no") else f"it is {answer}"


def _sounds() -> Case:
    """Spoken digits: synthetic voices, some heard in the test alone."""
    voices = [f"{accent}+{voice}" for accent in ("en-us", "en-gb-scotland", "en-gb-x-rp") for voice in _VOICES]
    clips = {
        (word, voice, index): Clip(word, voice, 120 + 25 * index, 30 + 12 * index)
        for word in _WORDS
        for voice in (voices[:6] if SMALL else voices)
        for index in range(1 if SMALL else 4)
    }
    encoded = dict(render(clips.values(), workers=2))
    rng = random.Random(0)
    rows = []
    for (word, voice, _), clip in clips.items():
        split = "test" if voice.endswith(("+f5", "+m7")) else "validation" if rng.random() < 0.1 else "train"
        rows.append({"audio": _uri("audio/flac", encoded[clip]), "label": word, "split": split})
    what = "classify: digits spoken by synthetic voices, those of the test never heard in training"
    return Case(rows, "accuracy", _commonest(rows), None, what, ">= 95.0")


_WORDS = "zero one two three four five six seven eight nine".split()
_HANDS = ("neat", "hasty", "bold", "thin")
_OPEN = {"train": 16_000, "test": 2_000}
_VOICES = ("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m7", "klatt2", "Andrea", "Mario", "linda")
CASES: dict[str, Callable[[], Case]] = {
    "tag.text": lambda: _templates("tag", "micro_f1"),
    "tag.noisy_text": lambda: _templates("noisy", "micro_f1"),
    "relate.text": lambda: _templates("relate", "micro_f1"),
    "extract.text": lambda: _templates("extract", "f1"),
    "classify.image": _pictures,
    "classify.text_image": _drawings,
    "classify.audio": _sounds,
    "regress.image": _numbers,
    "match.image": _captions,
    "generate.image": _open_questions,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("tests.bench.quality", __doc__)
    parser.add_argument("--only", action="append", choices=list(CASES), help="this task alone; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the recipe")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    with rays.borrowed():
        for name in args.only or CASES:
            rows += _measure(name, CASES[name](), args.overrides)
            print(table(rows), flush=True)
            publish("quality", rows, CHECKOUT, keep=True)  # what was measured stays, whatever comes after
    return 0


def _measure(name: str, case: Case, overrides: Sequence[str]) -> Iterator[Row]:
    learned = _reached(case, case.rows, overrides)
    guessed = _reached(case, list(_shuffled(case.rows)), [*overrides, f"train.max_steps={_SHUFFLED_STEPS}"])
    yield Row(f"quality.{name}", learned, "%", f"{case.metric}, {case.what}", case.goal)
    if case.reference is not None:
        yield Row(f"quality.{name}.reference", case.reference, "%", f"{case.metric} of the reference")
    limit = f"<= {case.chance + 5:.1f}"
    yield Row(f"quality.{name}.{SHUFFLED}", guessed, "%", f"{case.metric} after answers shuffled in training", limit)


def _reached(case: Case, rows: Sequence[dict[str, Any]], overrides: Sequence[str]) -> float:
    """The metric on the test split, percent, after the three commands."""
    with tempfile.TemporaryDirectory(prefix="mmagent-quality-") as place:
        name, file = Path(place).name, Path(place) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [f"data.name={name}", *case.overrides, *overrides]
        if case.writes:
            pair.write(Path(place) / "pair")
            given.append(f"model.backbone={place}/pair")
        try:
            if (
                prepare.main(["--source", f"jsonl:{file}", "--name", name])
                or train.main(["--config", str(RECIPE), "--name", name, *given])
                or evaluate.main(["--bundle", name, "--data", name, "--out", f"eval/{name}"])
            ):
                raise SystemExit(2)
            found = json.loads((storage.resolve(f"eval/{name}") / "evaluation.json").read_text())
            return 100 * float(found["metrics"][case.metric]["value"])
        finally:
            for kind in ("data", "runs", "eval"):
                shutil.rmtree(storage.root() / kind / name, ignore_errors=True)


def _shuffled(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Training and validation with answers of other rows; spans of a text that is too short for them are cut to it."""
    rng = random.Random(0)
    known = [row for row in rows if row["split"] != "test"]
    answers = [{key: row[key] for key in _ANSWERS if key in row} for row in known]
    rng.shuffle(answers)
    for row, answer in zip(known, answers, strict=True):
        yield {**row, **answer, **_fitted(row, answer)}
    yield from (row for row in rows if row["split"] == "test")


def _fitted(row: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Spans and answers of another text, as places of this one."""
    out: dict[str, Any] = {}
    if "spans" in answer:
        out["spans"] = [span for span in answer["spans"] if span["end"] <= len(row["text"])]
    if answer.get("answers"):
        [given] = answer["answers"]
        start = min(given["answer_start"], len(row["context"]) - 1)
        text = row["context"][start : start + len(given["text"])]
        shift = len(text) - len(text.lstrip())
        out["answers"] = [{"text": text.strip(), "answer_start": start + shift}]
    return out


def _commonest(rows: Sequence[dict[str, Any]]) -> float:
    """The share of the commonest label in the test, percent."""
    counted = Counter(row["label"] for row in rows if row["split"] == "test")
    return 100 * max(counted.values()) / counted.total()


def _unanswered(rows: Sequence[dict[str, Any]]) -> float:
    """The share of the test's questions that have no answer, percent: what one gets who never answers."""
    asked = [row for row in rows if row["split"] == "test"]
    return 100 * sum(not row["answers"] for row in asked) / len(asked)


def _png(pixels: np.ndarray) -> bytes:
    """(8, 8) of 0 to 16 -> an encoded picture of 64 x 64."""
    file = io.BytesIO()
    Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def _uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


if __name__ == "__main__":
    sys.exit(main())
