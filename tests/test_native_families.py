"""Native multimodal models of more families: their processors as published, also without torchvision; places of three
axes, tiles, a picture's tokens that see each other, an encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmagent import bundle, freeze
from mmagent.conversations import MEDIA
from mmagent.native import Native
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from tests import multimodal
from tests.multimodal import Made, configured

COLOURS = ("blue", "red")
INFOS = {
    "generate": TaskInfo("generate"), "classify": TaskInfo("classify", COLOURS), "tag": TaskInfo("tag", COLOURS),
}  # fmt: skip
SEEING = ("qwen2_vl", "qwen3_vl", "gemma3", "idefics3", "florence2")

Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = multimodal.write(family, tmp_path_factory.mktemp("families") / family)
        return made[family]

    return make


def rows(family: str, make_png: Any) -> list[Record]:
    """Of every task with a picture, of other sizes and with none, and with two where a model takes so many."""
    tall = [make_png(colour, (16 + 16 * index, 40)) for index, colour in enumerate(COLOURS)]
    found: list[dict[str, Any]] = []
    for colour, picture in zip(COLOURS, tall, strict=True):
        found += [
            {"task": "generate", "text": "which?", "image": picture, "answer": colour},
            {"task": "classify", "text": "so so so?", "image": picture, "label": colour},
            {"task": "tag", "text": "so it is", "image": picture, "spans": [{"start": 3, "end": 5, "label": colour}]},
        ]
    found.append({"task": "generate", "text": "no picture here, is there?", "answer": "none"})
    if family != "florence2":
        both = {"role": "user", "content": "<image> and <image>?"}
        found.append({"task": "generate", "messages": [both], "images": tall, "answer": "both"})
    return [parse(row, default_id=str(index)) for index, row in enumerate(found)]


@pytest.mark.parametrize("family", SEEING)
def test_it_learns_and_answers_alike_alone_together_and_from_its_bundle(
    checkpoint: Checkpoint, make_png: Any, tmp_path: Path, family: str
) -> None:
    config = configured(checkpoint(family), **{"freeze.strategy": "all", "train.micro_batch": 8})
    made, records = Made(config, INFOS), rows(family, make_png)
    losses = made.fit(records)
    assert min(losses) < losses[0] / 2
    predictor = made.predictor()
    together = predictor.predict(records)
    alone = [predictor.predict([record])[0] for record in records]
    again = made.bundled(tmp_path / "b").predict(records)
    for a, b, c in zip(together, alone, again, strict=True):
        assert a.words == b.words == c.words
        assert a.confidence == pytest.approx(b.confidence, abs=1e-4)
        assert a.confidence == pytest.approx(c.confidence, abs=1e-4)
    assert bundle.load(tmp_path / "b").manifest["modalities"] == ["text", "image"]


@pytest.mark.parametrize("family", SEEING)
def test_its_parts_are_found_and_a_stand_in_runs_them(checkpoint: Checkpoint, make_png: Any, family: str) -> None:
    made = Made(configured(checkpoint(family), **{"freeze.strategy": "all"}), INFOS)
    assert isinstance(made.encoder, Native)
    assert [name for name, _ in made.encoder.towers()] == ["image_tower"]
    parts = {part.name for part in freeze.table(made.module)}
    assert {"backbone", "image_tower", "heads"} <= parts
    assert len(made.encoder.blocks()) == (3 if family == "florence2" else 2)
    batch = made.batch([parse({"task": "tag", "text": "so it is", "spans": []}, default_id="1")])
    assert batch["weight"].tolist() == [1.0, 0.0]
    assert f"{MEDIA}pixel_values" in batch
    for output in made.module(batch).values():
        assert torch.isfinite(output).all()
    others = Made(configured(checkpoint(family), **{"freeze.strategy": "top:1"}), INFOS).module
    trained = {part.name: part.trained for part in freeze.table(others)}
    assert trained["image_tower"] == 0
    assert trained["backbone"] > 0
