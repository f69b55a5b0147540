"""Pictures and sounds among the words: every task, on every kind of language model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import supervised
from mmagent import bundle, text
from mmagent.assembly import load_language
from mmagent.augment import Words, augment
from mmagent.batch import Inputs, PartError
from mmagent.config import Config, resolve
from mmagent.predictor import Predictor
from mmagent.reading import PLACES
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.soft import SoftModel
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all
from tests.test_tasks import ROWS, info, records


def configured(recipe: dict[str, Any], backbone: Path, **overrides: Any) -> Config:
    given = {
        "model.backbone": str(backbone), "model.join": "input", "model.dropout": 0.0, "model.head_dropout": 0.0,
        "model.backbone_dropout": None, "data.max_text_tokens": 24, "freeze.strategy": "connector", **overrides,
    }  # fmt: skip
    return resolve(recipe, given)


class Made:
    """A model that joins at the input, and what feeds it."""

    def __init__(self, config: Config, infos: dict[str, TaskInfo]) -> None:
        self.config, self.infos, self.tasks = config, infos, make_all(infos)
        self.encoder = load_language(config.model, self.tasks, dropout=config.model.backbone_dropout)
        self.tokenizer = text.load_tokenizer(config.model.backbone)
        module = supervised.build(config, self.tasks, self.encoder)
        assert isinstance(module, SoftModel)
        self.module = module
        self.inputs = Inputs(config.model, config.data, self.tokenizer, self.tasks, self.encoder)

    def batch(self, rows: list[Record]) -> dict[str, torch.Tensor]:
        return self.inputs.batch([self.inputs.sample(record) for record in rows])

    def fit(self, rows: list[Record], steps: int = 30) -> list[float]:
        batch, losses = self.batch(rows), []
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        for _ in range(steps):
            loss = supervised.loss_of(self.module(batch), batch, self.tasks, self.config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def predictor(self) -> Predictor:
        return Predictor(
            name="b", config=self.config, tasks=self.tasks, task=next(iter(self.infos)), model=self.module,
            encoder=self.encoder, tokenizer=self.tokenizer, device="cpu",
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder-decoder"])
@pytest.mark.parametrize("task", sorted(ROWS))
def test_every_task_learns_with_a_picture_and_a_sound_among_its_words(
    tiny_backbones: dict[str, Path], tiny_recipe: dict[str, Any], make_png: Callable[..., bytes],
    make_wav: Callable[..., bytes], task: str, kind: str,
) -> None:  # fmt: skip
    made = Made(configured(tiny_recipe, tiny_backbones[kind], **{"freeze.strategy": "top:1"}), {task: info(task)})
    frozen = {name: p.detach().clone() for name, p in made.module.named_parameters() if not p.requires_grad}
    assert frozen
    losses = made.fit(records(task, image=make_png(), audio=make_wav()), steps=60)
    assert min(losses) < losses[0] / 2
    after = dict(made.module.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("task", sorted(ROWS))
def test_a_bundle_answers_as_the_model_did(
    tiny_backbones: dict[str, Path], tiny_recipe: dict[str, Any], make_png: Callable[..., bytes], tmp_path: Path,
    task: str, kind: str,
) -> None:  # fmt: skip
    config = configured(tiny_recipe, tiny_backbones[kind], **{"freeze.strategy": "all", "model.audio": None})
    made = Made(config, {task: info(task)})
    rows = records(task, image=make_png())
    made.fit(rows)
    before = made.predictor().predict(rows)
    state = {key: value for key, value in made.module.state_dict().items() if not key.startswith("backbone.")}
    bundle.save(
        tmp_path / "b", name="b", config=config, tasks=made.infos, task=task, state=state,
        backbone=made.module.backbone, tokenizer=made.tokenizer, calibration={}, origin={},
    )  # fmt: skip
    after = Predictor.load(tmp_path / "b", device="cpu").predict(rows)
    assert [each.to_dict(timings=False) for each in after] == [each.to_dict(timings=False) for each in before]


@pytest.mark.parametrize("kind", ["encoder", "decoder", "transposed", "encoder-decoder"])
def test_a_row_does_not_depend_on_its_neighbours(
    tiny_backbones: dict[str, Path], tiny_recipe: dict[str, Any], make_png: Callable[..., bytes],
    make_wav: Callable[..., bytes], kind: str,
) -> None:  # fmt: skip
    made = Made(configured(tiny_recipe, tiny_backbones[kind]), {"classify": info("classify")})
    given: list[dict[str, Any]] = [
        {"text": "a red"},
        {"text": "what color is the shape in there", "image": make_png("red")},
        {"audio": make_wav()},
        {"text": "two", "images": [make_png("blue"), make_png("green")], "audio": make_wav(880.0)},
    ]
    rows = [parse({"task": "classify", **row}, default_id=str(index)) for index, row in enumerate(given)]
    made.module.eval()
    with torch.no_grad():
        together = made.module(made.batch(rows))["classify"]
        alone = torch.cat([made.module(made.batch([row]))["classify"] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_every_tower_takes_part_in_a_batch_of_words(
    tiny_backbones: dict[str, Path], tiny_recipe: dict[str, Any]
) -> None:
    made = Made(configured(tiny_recipe, tiny_backbones["decoder"]), {"classify": info("classify")})
    batch = made.batch(records("classify"))
    supervised.loss_of(made.module(batch), batch, made.tasks, made.config).backward()
    for name, parameter in made.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name


def test_pictures_stand_where_their_placeholders_do(
    tiny_backbones: dict[str, Path], tiny_recipe: dict[str, Any], make_png: Callable[..., bytes]
) -> None:
    made = Made(configured(tiny_recipe, tiny_backbones["encoder"]), {"classify": info("classify")})
    words = [{"role": "user", "content": "red <image> blue <image> green"}]
    row = {"task": "classify", "messages": words, "images": [make_png("red"), make_png("blue")]}
    [view] = made.inputs.sample(parse(row, default_id="1")).views
    image = made.config.model.image
    assert image is not None
    runs = [len(list(group)) for place, group in itertools.groupby(view.ids.tolist()) if place == PLACES["image"]]
    assert runs == [image.tokens, image.tokens]


def test_a_lost_modality_loses_its_places(
    tiny_backbones: dict[str, Path], tiny_recipe: dict[str, Any], make_png: Callable[..., bytes],
    make_wav: Callable[..., bytes],
) -> None:  # fmt: skip
    made = Made(configured(tiny_recipe, tiny_backbones["decoder"]), {"classify": info("classify")})
    row = parse({"task": "classify", "text": "a red", "image": make_png(), "audio": make_wav()}, default_id="1")
    sample, words = made.inputs.sample(row), Words.of(made.tokenizer)
    for kind, setting in (("image", "image_drop"), ("audio", "audio_drop")):
        config = resolve(tiny_recipe, {f"augment.{setting}": 0.999}).augment
        lost = augment(sample, config, words, np.random.default_rng(0))
        assert PLACES[kind] not in lost.views[0].ids
        assert made.module(made.inputs.batch([lost]))["classify"].isfinite().all()
    wordless = resolve(tiny_recipe, {"augment.text_drop": 0.999}).augment
    silent = augment(sample, wordless, words, np.random.default_rng(0))
    assert set(PLACES.values()) <= set(silent.views[0].ids.tolist())
    assert not set(made.tokenizer("a red", add_special_tokens=False)["input_ids"]) & set(silent.views[0].ids.tolist())


def test_more_pictures_than_the_language_model_reads_are_refused(
    tiny_backbones: dict[str, Path], tiny_recipe: dict[str, Any], make_png: Callable[..., bytes]
) -> None:
    made = Made(configured(tiny_recipe, tiny_backbones["encoder"]), {"classify": info("classify")})
    row = {"task": "classify", "text": "red", "images": [make_png()] * 16}
    with pytest.raises(PartError, match="take 64 tokens, which leaves too little of the 64"):
        made.inputs.sample(parse(row, default_id="1"))
