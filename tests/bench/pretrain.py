"""What learning without labels gains a task of few labels: the same training before and after `jobs.pretrain`.

    make bench-pretrain         (python -m tests.bench.pretrain [--only text|minilm|pairs] [key.path=value ...])

- `text`: an encoder of fresh weights (4 layers, 256 wide) reads what eleven libraries say of their functions
  (`tests.bench.docstrings`), and then learns from few labels whose function it is. Functions of the test are of modules
  that neither read.
- `minilm`: the same with MiniLM, which has read a large part of the web before.
- `pairs`: an image tower of fresh weights learns from pictures of easy-VQA and what they show ("a red circle"), then
  from few labelled questions about other pictures.

`jobs/recipes/small.yaml` trains each task with 20 labels of each class; the mean of three draws of labels, on the test.
`compare` does the same for data, settings and checkpoints of one's own.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import cluster, prepare, pretrain, train
from mmagent import storage
from mmagent.arguments import Parser, positive
from mmagent.measurement import Row, publish, table
from tests.bench import docstrings, rays, texts

RECIPES = cluster.CHECKOUT / "jobs/recipes"
PARTS = ("text", "minilm", "pairs")
WORKERS = ("cluster.workers=1", "cluster.threads=2", "cluster.max_failures=0")
# Of a training with few labels: as many steps before as after.
FEW = ("train.min_steps=120", "train.patience=0", "train.eval_every_steps=60", "train.eval_every_epochs=null")
TEXT = ("data.max_text_tokens=48", "model.image=null", "model.audio=null", "freeze.strategy=all")
SEEN = ("model.audio=null", "model.join=output", "augment={}")
FRESH = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
TEST_ROWS, TEXTS, CAPTIONS = 1500, 12_000, 1800


class Side(NamedTuple):
    """A task of few labels, and what is learned before it without labels."""

    what: str
    data: str
    settings: tuple[str, ...]  # of the task's training
    before: tuple[str, ...]  # what it starts from
    after: tuple[str, ...]  # and once more
    pretraining: tuple[str, ...]  # of `jobs.pretrain`, with its --config and source


def compare(
    recipe: Path, data: str, starts: Sequence[Sequence[str]], *, labels: int, seeds: int, name: str,
    settings: Sequence[str] = (),
) -> list[tuple[float, float]]:  # fmt: skip
    """Trains a task on `labels` rows of each class from each start (settings, ``model.backbone=PLACE``):
    for each its main metric on the test split, mean and deviation over seeds."""
    out = []
    for index, start in enumerate(starts):
        given = [f"data.name={data}", f"data.labels_per_class=[{labels}]", f"train.seeds={seeds}", *settings, *start]
        if train.main(["--config", str(recipe), "--name", f"{name}-{index}", *given]):
            raise SystemExit(2)
        found = json.loads((storage.folder("runs", f"{name}-{index}") / "curve.json").read_text())
        [point] = next(iter(found["tasks"].values()))["points"]
        out.append((point["mean"], point["deviation"] or 0.0))
    return out


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.pretrain", __doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone")
    parser.add_argument("--labels", type=positive, default=20, help="rows of each class that have a label")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the pretraining")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    with rays.borrowed():
        for part in args.only or PARTS:
            with tempfile.TemporaryDirectory(prefix=f"pretrain-{part}-") as place:
                try:
                    rows += _measured(part, Path(place), args.labels, args.seeds, args.overrides)
                finally:
                    for kind in ("data", "runs"):
                        for folder in (storage.root() / kind).glob(f"{Path(place).name}*"):
                            shutil.rmtree(folder, ignore_errors=True)
            publish("pretrain", rows, checkout, keep=True)
    print(table(rows))
    return 0


def _measured(part: str, place: Path, labels: int, seeds: int, overrides: Sequence[str]) -> list[Row]:
    side = _pairs(place) if part == "pairs" else _text(place, fresh=part == "text")
    name = place.name
    if pretrain.main(["--name", f"{name}-first", *side.pretraining, *WORKERS, *overrides]):
        raise SystemExit(2)
    starts = (side.before, side.after)
    settings = (*FEW, *WORKERS, *side.settings)
    measured = compare(
        RECIPES / "small.yaml", side.data, starts, labels=labels, seeds=seeds, name=name, settings=settings
    )
    (before, spread), (after, then) = measured
    told = f"accuracy, {side.what}, {labels} labels of each class, mean of {seeds} draws"
    goal = None if part == "minilm" else "> 0"
    return [
        Row(f"pretrain.{part}.before", 100 * before, "%", f"{told} (± {100 * spread:.1f})"),
        Row(f"pretrain.{part}.after", 100 * after, "%", f"the same after learning without labels (± {100 * then:.1f})"),
        Row(f"pretrain.{part}.gain", 100 * (after - before), "points", "after - before", goal),
    ]


def _text(place: Path, *, fresh: bool) -> Side:
    said = docstrings.collect()
    rng = random.Random(0)
    read = [each for each in said if not each.test]
    read = rng.sample(read, min(TEXTS, len(read)))
    (place / "text.txt").write_text("\n\n".join(each.words for each in read) + "\n")
    rows = []
    for library in docstrings.LIBRARIES:
        of = {test: [each for each in said if each.of == library and each.test == test] for test in (False, True)}
        for test, split, count in ((False, "train", 100), (True, "test", TEST_ROWS // len(docstrings.LIBRARIES))):
            for each in rng.sample(of[test], min(count, len(of[test]))):
                rows.append({"text": each.words, "label": library, "split": split})
    backbone = str(texts.encoder(place / "encoder", **FRESH)) if fresh else texts.BACKBONE
    what = f"{'an encoder of fresh weights' if fresh else 'MiniLM'} tells whose function a text is about"
    more = ("optim.lr_backbone=0.001", "train.epochs=4") if fresh else ("train.epochs=1",)
    source = ("--config", str(RECIPES / "pretrain.yaml"), "--source", f"text:{place / 'text.txt'}")
    return Side(
        what, _prepared(place, rows), TEXT,
        (f"model.backbone={backbone}",), (f"model.backbone=runs/{place.name}-first/backbone",),
        (*source, f"model.backbone={backbone}", "data.max_text_tokens=48", *more),
    )  # fmt: skip


def _pairs(place: Path) -> Side:
    import easy_vqa

    asked, shown = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    told, pictures = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    captions = _captions(*asked)
    order = random.Random(0).sample(sorted(captions), len(captions))
    first, others = order[:CAPTIONS], set(order[CAPTIONS:])
    pairs = [{"text": captions[number], "image": str(shown[number])} for number in first]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows: list[dict[str, Any]] = [
        {"text": question, "label": answer, "image": str(shown[number]), "split": "train"}
        for question, answer, number in zip(*asked, strict=True) if number in others
    ]  # fmt: skip
    questions = random.Random(0).sample(list(zip(*told, strict=True)), TEST_ROWS)
    rows += [
        {"text": question, "label": answer, "image": str(pictures[number]), "split": "test"}
        for question, answer, number in questions
    ]
    source = ("--config", str(RECIPES / "small.yaml"), "--source", f"jsonl:{place / 'pairs.jsonl'}")
    return Side(
        "an image tower of fresh weights answers questions about pictures",
        _prepared(place, rows), SEEN, (), (f"model.image.start=runs/{place.name}-first/towers/image",),
        (*source, "pretrain.objective=align", "model.audio=null", "train.micro_batch=64", "train.epochs=6"),
    )  # fmt: skip


def _captions(questions: Sequence[str], answers: Sequence[str], numbers: Sequence[int]) -> dict[int, str]:
    """What each picture shows, of the questions that ask for its shape or colour."""
    found: dict[int, dict[str, str]] = {}
    for _, answer, number in zip(questions, answers, numbers, strict=True):
        if answer not in ("yes", "no"):
            kind = "shape" if answer in ("circle", "rectangle", "triangle") else "colour"
            found.setdefault(number, {})[kind] = answer
    return {number: f"a {of['colour']} {of['shape']}" for number, of in found.items() if len(of) == 2}


def _prepared(place: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The name of a data set of these rows; validation is cut out of training."""
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if prepare.main(["--source", f"jsonl:{file}", "--name", f"{place.name}-rows"]):
        raise SystemExit(2)
    return f"{place.name}-rows"


if __name__ == "__main__":
    sys.exit(main())
