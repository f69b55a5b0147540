"""Learning from use on easy-VQA cut in time: what is gained on the new part, what is lost on the old, and for how much.

    make bench-continual        (python -m tests.bench.continual)

SCALE=small for a short one. What an earlier start of it has finished is taken as it is: remove what begins with
``continual`` below the storage root to measure anew.

The first bundle is trained without two colours and one shape. Then questions about pictures that show them are asked of
a real service in three rounds, by ten API keys, and corrected; `jobs.refine` learns after each round, judges and
promotes. Beside it, on the same feedback: plain fine-tuning on the new rows alone, and full retraining on base data and
feedback. In a run of its own two of the ten keys, a fifth of the corrections, are wrong on purpose.

- `continual.gain_share`: right answers gained on the new part, ours to full retraining's, after the last round.
- `continual.time_share`: seconds of steps of all rounds, looking for suspicious keys among them, to retraining's.
- `continual.old_loss_points`, `continual.naive_old_loss_points`: right answers lost on the old part.
- `continual.poisoned_loss_points`: right answers of both parts, clean feedback's run less the poisoned one's.
- `continual.feedback_lost`: corrections that were acknowledged and are not in the segments.
- `continual.clean_accepted`: rounds of clean feedback whose candidate the gate accepted.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from jobs import cluster, prepare, refine, train
from mmagent import channels, feedback, storage
from mmagent.arguments import Parser
from mmagent.measurement import Row, publish, table
from mmagent.predictor import Predictor
from serve import keys as key_files
from serve.config import ServeConfig
from serve.service import Service
from tests.bench import rays
from tests.serving import running

SMALL = os.environ.get("SCALE") == "small"
RECIPE = cluster.CHECKOUT / "jobs/recipes/easy_vqa.yaml"
NEW = {"teal", "brown", "triangle"}
SHAPES = {"circle", "rectangle", "triangle"}
BASE_ROWS = {"train": 240, "validation": 60, "test": 80} if SMALL else {"train": 6000, "validation": 600, "test": 1500}
ROUNDS, CORRECTIONS, NEW_TEST = (1, 60, 40) if SMALL else (3, 500, 600)
KEYS, LIARS = 10, 2
SETTINGS = (
    "model.audio=null", f"train.epochs={1 if SMALL else 6}", "train.eval_every_steps=200", "train.eval_rows=512",
    "cluster.workers=2", "cluster.max_failures=0",
)  # fmt: skip


class Asked(NamedTuple):
    """A question about a picture."""

    words: str
    answer: str
    picture: Path


class Part(NamedTuple):
    """Easy-VQA, cut in time."""

    base: Mapping[str, list[Asked]]
    rounds: list[list[Asked]]
    new_test: list[Asked]


class Score(NamedTuple):
    """Shares of right answers."""

    old: float
    new: float


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    Parser("tests.bench.continual", __doc__).parse_args(argv)
    with rays.borrowed():
        part = cut()
        _prepared("continual_base", part.base)
        _trained("continual-base", "continual_base")
        scores: dict[str, list[Score]] = {}
        lost, accepted = 0, []
        for channel, liars in (("continual-clean", 0), ("continual-poisoned", LIARS)):
            found, missing, fine = _rounds(channel, part, liars)
            scores[channel], lost = found, lost + missing
            accepted += fine if not liars else []
        scores["naive"] = _naive(part)
        scores["full"] = _retrained(part)
        rows = _figures(part, scores, lost, accepted)
        publish("continual", rows, checkout)
    print(table(rows))
    return 0


def cut() -> Part:
    """The same for every start: a draw by a seed."""
    import easy_vqa

    old: dict[str, list[Asked]] = {}
    new: dict[str, list[Asked]] = {}
    for part, (words, answers, shown), images in (
        ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    ):
        names: dict[int, set[str]] = defaultdict(set)  # colour and shape of each picture, as far as answers tell
        for asked, answer, image in zip(words, answers, shown, strict=True):
            names[image] |= {answer} if answer not in ("yes", "no") else set()
            if answer == "yes":
                names[image] |= {word for word in asked.strip("?").split() if word in NEW | SHAPES}
        rows = [
            (Asked(asked, answer, Path(images[image])), names[image])
            for asked, answer, image in zip(words, answers, shown, strict=True)
        ]
        random.Random(0).shuffle(rows)
        old[part] = [row for row, seen in rows if not NEW & (seen | {*row.words.strip("?").split()})]
        new[part] = [row for row, seen in rows if NEW & seen]
    at = BASE_ROWS["train"]
    base = {
        "train": old["train"][:at],
        "validation": old["train"][at : at + BASE_ROWS["validation"]],
        "test": old["test"][: BASE_ROWS["test"]],
    }
    rounds = [new["train"][n * CORRECTIONS : (n + 1) * CORRECTIONS] for n in range(ROUNDS)]
    return Part(base, rounds, new["test"][:NEW_TEST])


# -- ours --------------------------------------------------------------------------------------------------------------


def _rounds(channel: str, part: Part, liars: int) -> tuple[list[Score], int, list[bool]]:
    """Scores before the first round and after each, corrections that were lost, and whether each was accepted."""
    record = storage.root() / "bench" / f"{channel}.json"
    if record.is_file():
        told = json.loads(record.read_text())
        return [Score(*each) for each in told["scores"]], told["lost"], told["accepted"]
    bundle = storage.folder("runs", "continual-base") / "bundle"
    channels.append(channel, bundle, share=1.0, act="promote", by="bench")
    scores, lost, accepted = [score(bundle, part)], 0, []
    for number, corrections in enumerate(part.rounds, 1):
        lost += _corrected(channel, corrections, liars, seed=number)
        status = refine.main(["--channel", channel, "--grow", "--promote"])
        if status not in (0, refine.EXIT_REFUSED):
            raise SystemExit(2)
        accepted.append(status == 0)
        scores.append(score(Path(channels.read(channel).bundle), part))
        print(f"{channel}, round {number}: old {scores[-1].old:.3f}, new {scores[-1].new:.3f}", flush=True)
    storage.publish_json(record, {"scores": scores, "lost": lost, "accepted": accepted})
    return scores, lost, accepted


def _corrected(channel: str, corrections: Sequence[Asked], liars: int, seed: int) -> int:
    """Asks and corrects over HTTP, as users would; how many acknowledged corrections are not in the segments."""
    labels = sorted({row.answer for row in corrections})
    with _serving(channel) as (address, secrets), ThreadPoolExecutor(4) as threads, httpx.Client(timeout=60) as client:

        def correct(number: int) -> str:
            row, key = corrections[number], number % KEYS
            headers = {"Authorization": f"Bearer {secrets[key]}"}
            picture = f"data:image/png;base64,{base64.b64encode(row.picture.read_bytes()).decode()}"
            asked = client.post(
                f"{address}/v1/predict", json={"text": row.words, "image": picture}, headers=headers
            ).raise_for_status()
            right = row.answer
            if key < liars:
                right = random.Random(f"{seed}/{number}").choice([each for each in labels if each != right])
            body = {"answer": asked.json()["id"], "label": right}
            taken = client.post(f"{address}/v1/feedback", json=body, headers=headers).raise_for_status()
            return str(taken.json()["id"])

        ids = set(threads.map(correct, range(len(corrections))))
    return len(ids - {each.id for each in feedback.read(feedback.folder()).said})


@contextmanager
def _serving(channel: str) -> Iterator[tuple[str, list[str]]]:
    """A service of a channel's bundle, and the secrets of ten keys."""
    file = storage.root() / "bench" / f"{channel}.keys.json"
    file.unlink(missing_ok=True)
    secrets = [
        key_files.add(
            file, key_files.Key(id=f"key_{channel[10:]}{n}", name=f"k{n}", hashes={}, scopes=("ask", "feedback")),
            days=None,
        )
        for n in range(KEYS)
    ]  # fmt: skip
    predictor = Predictor.load(channels.read(channel).bundle, device="cpu", threads=1)
    with running(Service(predictor, ServeConfig(keys=str(file)), channel)) as address:
        yield address, secrets


# -- what a user would do instead --------------------------------------------------------------------------------------


def _naive(part: Part) -> list[Score]:
    """Plain fine-tuning on each round's new rows alone, one after the other."""
    before = storage.folder("runs", "continual-base") / "bundle"
    scores = [score(before, part)]
    for number, corrections in enumerate(part.rounds, 1):
        name = f"continual-naive{number}"
        held = max(1, len(corrections) // 10)
        _prepared(name, {"train": corrections[held:], "validation": corrections[:held], "test": corrections[:held]})
        _trained(name, name, f"start.bundle={before}", "train.epochs=6", "train.global_batch=32")
        before = storage.folder("runs", name) / "bundle"
        scores.append(score(before, part))
    return scores


def _retrained(part: Part) -> list[Score]:
    """Everything anew on base data and all feedback so far."""
    scores = [score(storage.folder("runs", "continual-base") / "bundle", part)]
    for number in range(1, len(part.rounds) + 1):
        name = f"continual-full{number}"
        more = [row for each in part.rounds[:number] for row in each]
        held = len(more) // 10
        rows = {
            "train": [*part.base["train"], *more[held:]],
            "validation": [*part.base["validation"], *more[:held]],
            "test": part.base["test"],
        }
        _prepared(name, rows)
        _trained(name, name)
        scores.append(score(storage.folder("runs", name) / "bundle", part))
        print(f"full retraining, round {number}: old {scores[-1].old:.3f}, new {scores[-1].new:.3f}", flush=True)
    return scores


# -- common ------------------------------------------------------------------------------------------------------------


def _prepared(name: str, splits: Mapping[str, Sequence[Asked]]) -> None:
    if (storage.folder("data", name) / "dataset.json").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = [
            {"text": row.words, "label": row.answer, "image": str(row.picture), "split": split}
            for split, found in splits.items()
            for row in found
        ]
        random.Random(1).shuffle(rows)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if prepare.main(["--source", f"jsonl:{file}", "--name", name, "--max-bad-share", "0.05"]):
            raise SystemExit(2)


def _trained(name: str, data: str, *settings: str) -> None:
    given = ["--config", str(RECIPE), "--name", name, "--no-evaluate", f"data.name={data}", *SETTINGS, *settings]
    if not (storage.folder("runs", name) / "bundle" / "manifest.json").exists() and train.main(given):
        raise SystemExit(2)


def score(bundle: Path, part: Part) -> Score:
    predictor = Predictor.load(bundle, device="cpu", threads=2)

    def right(rows: Sequence[Asked]) -> float:
        given = ({"text": row.words, "image": str(row.picture)} for row in rows)
        answers = predictor.predict(given, batch_size=64)
        return sum(answer.label == row.answer for answer, row in zip(answers, rows, strict=True)) / len(rows)

    return Score(right(part.base["test"]), right(part.new_test))


def steps_s(name: str) -> float:
    """Seconds of a run's optimizer steps, validations left out."""
    rows = [json.loads(line) for line in (storage.folder("runs", name) / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["kind"] == "train"]
    return float(sum(row["samples"] / row["samples_per_s"] for row in found))


def _figures(part: Part, scores: Mapping[str, list[Score]], lost: int, accepted: Sequence[bool]) -> list[Row]:
    base, clean, poisoned = scores["full"][0], scores["continual-clean"], scores["continual-poisoned"]
    full, naive = scores["full"], scores["naive"]
    gained, wanted = clean[-1].new - base.new, full[-1].new - base.new
    n_old, n_new = len(part.base["test"]), len(part.new_test)

    def both(each: Score) -> float:
        return (each.old * n_old + each.new * n_new) / (n_old + n_new)

    ours_s = sum(steps_s(f"continual-clean-r{n:03d}") for n in range(1, ROUNDS + 1)) + crossfit_s("continual-clean")
    full_s = sum(steps_s(f"continual-full{n}") for n in range(1, ROUNDS + 1))
    course: Callable[[list[Score], str], str] = lambda found, key: ", ".join(  # noqa: E731
        f"{100 * getattr(each, key):.1f}" for each in found
    )
    return [
        Row("continual.gain_share", gained / wanted, "fraction",
            f"gained on {n_new} questions about the new part: {course(clean, 'new')} %; full retraining "
            f"{course(full, 'new')} %", ">= 0.95"),
        Row("continual.old_loss_points", 100 * (base.old - clean[-1].old), "points",
            f"of {n_old} questions about the old part: {course(clean, 'old')} %; full retraining "
            f"{course(full, 'old')} %", "<= 0.5"),
        Row("continual.naive_old_loss_points", 100 * (base.old - naive[-1].old), "points",
            f"plain fine-tuning on the new rows: old {course(naive, 'old')} %, new {course(naive, 'new')} %"),
        Row("continual.time_share", ours_s / full_s, "fraction",
            f"seconds of steps in {ROUNDS} rounds: {ours_s:.0f} to full retraining's {full_s:.0f}", "<= 0.2"),
        Row("continual.poisoned_loss_points", 100 * (both(clean[-1]) - both(poisoned[-1])), "points",
            f"with {LIARS} of {KEYS} keys wrong on purpose: old {course(poisoned, 'old')} %, new "
            f"{course(poisoned, 'new')} %", "<= 1"),
        Row("continual.feedback_lost", float(lost), "count", "acknowledged corrections that are not stored", "<= 0"),
        Row("continual.clean_accepted", sum(accepted) / max(1, len(accepted)), "fraction",
            f"candidates of {len(accepted)} clean rounds that the gate accepted", ">= 1"),
    ]  # fmt: skip


def crossfit_s(channel: str) -> float:
    """Seconds of the trainings that look for suspicious keys."""
    files = storage.folder("refine", channel).glob("r*/round.json")
    return float(sum(json.loads(file.read_text()).get("crossfit_s", 0.0) for file in files))


if __name__ == "__main__":
    began = time.monotonic()
    status = main()
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(status)
