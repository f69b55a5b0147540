"""What keeping the states of frozen parts on disk gains, on easy-VQA: samples a second, kept and computed each time.

Part of `make bench-train`: `jobs.train` with the demo's recipe on its written questions, nothing kept in memory on
either side. The language model is frozen and the image tower learns: what is gained depends on the share of a step that
the language model takes, so that there is a larger one too, as large as BERT base; then a frozen image tower beside
MiniLM, a ViT of 6 layers, 384 wide, on 64 pixels. (Both are of random weights: no pretrained ones can be installed, and
speed does not ask.) The states are computed before the first round; how long that takes is told beside.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jobs import cluster, prepare
from mmagent import features, storage
from mmagent.measurement import Row
from mmagent.shards import Dataset
from tests.bench import texts

RECIPE = cluster.CHECKOUT / "jobs/recipes/easy_vqa.yaml"
SMALL = os.environ.get("SCALE") == "small"
ROWS, STEPS, WARM_STEPS = (192, 6, 2) if SMALL else (4096, 40, 8)
ROUNDS = 1 if SMALL else 2
DATA = "bench_vqa"
SETTINGS = (
    f"data.name={DATA}", "model.audio=null", "freeze.strategy=connector", "train.epochs=100", "train.eval_rows=64",
    "data.cache_mb=0", f"train.max_steps={STEPS}", f"train.eval_every_steps={STEPS}", "cluster.max_failures=0",
)  # fmt: skip
Ours = Callable[[Sequence[str], str, int], tuple[float, str]]


class Side(NamedTuple):
    """A figure, and the settings of both sides."""

    id: str
    what: str
    settings: tuple[str, ...]
    goal: str | None


def rows(ours: Ours) -> list[Row]:
    """Measures all sides in turn.

    Args:
        ours: samples a second of `jobs.train` with settings, and what it said; the run's name and its first steps
            that do not count come behind.
    """
    written()
    tower = tower_folder()
    with_tower = ("model.image.width=128", "model.image.layers=0", f"model.image.checkpoint={tower}")
    larger = (f"model.backbone={texts.encoder(storage.folder('bench', 'bert_base'))}",)
    sides = (
        Side("cache_speedup", "frozen MiniLM, the image tower learns", (), ">= 2.0"),
        Side(
            "cache_speedup.larger", "a frozen language model of BERT base's size, the image tower learns", larger, None
        ),
        Side("cache_speedup.towers", "MiniLM and a ViT of 6 layers, 384 wide, frozen", with_tower, None),
    )
    _forget()
    found: dict[str, dict[str, list[float]]] = {side.id: {"disk": [], "none": []} for side in sides}
    filled = {}
    for index in range(ROUNDS):
        for side in sides:
            for cache in ("disk", "none"):
                given = [*SETTINGS, *side.settings, f"train.cache={cache}"]
                rate, said = ours(given, f"{DATA}_{cache}", WARM_STEPS)
                found[side.id][cache].append(rate)
                if index == 0 and cache == "disk":
                    filled[side.id] = _seconds(said)
            kept, each = (found[side.id][cache][-1] for cache in ("disk", "none"))
            print(f"round {index + 1}, {side.what}: kept {kept:.0f}, each time {each:.0f} samples/s", flush=True)
    out = []
    for side in sides:
        kept, each = (statistics.median(found[side.id][cache]) for cache in ("disk", "none"))
        what = f"samples/s on easy-VQA with states kept on disk, to computing them each time: {side.what}"
        out += [
            Row(f"train.{side.id}", kept / each, "ratio", what, side.goal),
            Row(f"train.{side.id}.fill_s", filled[side.id], "s", f"to compute them once for {ROWS:,} rows"),
        ]
    return out


def _forget() -> None:
    """Removes what an earlier measurement kept of these rows, and nothing that is of other data."""
    dataset = Dataset.open(storage.folder("data", DATA))
    for split in dataset.splits:
        for digest in dataset.hashes(split).values():
            for file in (storage.root() / features.FOLDER).glob(f"*/{digest[:32]}.parquet"):
                file.unlink()


def _seconds(said: str) -> float:
    """Of the line that tells how long computing took."""
    found = re.findall(r"states of .* rows, .* in ([0-9.]+) s", said)
    return float(found[-1]) if found else 0.0


def written() -> None:
    """The data set, by `jobs.prepare`.

    Raises:
        RuntimeError: it could not be made.
    """
    import easy_vqa

    if (storage.folder("data", DATA) / "dataset.json").exists():
        return
    asked, images = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    order = random.Random(0).sample(range(len(asked[0])), ROWS + 128)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        made = []
        for place, index in enumerate(order):
            split = "train" if place < ROWS else "validation"
            row: dict[str, Any] = {"text": asked[0][index], "label": asked[1][index], "split": split}
            made.append({**row, "image": str(images[asked[2][index]])})
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        if prepare.main(["--source", f"jsonl:{file}", "--name", DATA]):
            raise RuntimeError(f"{DATA} could not be prepared")


def tower_folder() -> Path:
    """A vision checkpoint of random weights, as Transformers saves it."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = storage.folder("bench", "vit")
    if not (folder / "preprocessor_config.json").exists():
        torch.manual_seed(0)
        settings = ViTConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, image_size=64,
            patch_size=8,
        )  # fmt: skip
        ViTModel(settings, add_pooling_layer=False).save_pretrained(folder)
        ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
