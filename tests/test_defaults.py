"""What a recipe leaves to the data set."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import prepare
from mmagent import defaults
from mmagent.config import load, resolve
from mmagent.shards import Dataset

CHECKOUT = Path(__file__).parent.parent
Prepared = Callable[..., Dataset]


@pytest.fixture
def prepared(storage: Path) -> Prepared:
    """``prepared(rows)``: what `jobs.prepare` makes of them, each six times in every split."""

    def made(rows: Sequence[Mapping[str, Any]]) -> Dataset:
        splits = ("train", "validation", "test")
        lines = [json.dumps({**row, "split": split}) for split in splits for row in [*rows] * 6]
        (storage / "rows.jsonl").write_text("\n".join(lines) + "\n")
        assert prepare.main(["--source", f"jsonl:{storage / 'rows.jsonl'}", "--name", "rows"]) == 0
        return Dataset.open(storage / "data" / "rows")

    return made


def encoded(make_png: Callable[..., bytes], **picture: Any) -> str:
    return "data:image/png;base64," + base64.b64encode(make_png(**picture)).decode()


WORDS = [{"text": "a red", "label": "red"}, {"text": "a blue", "label": "blue"}]
SPANS = [{"text": "a red one", "spans": [{"start": 2, "end": 5, "label": "COLOUR"}]}]


def test_towers_come_for_what_the_data_holds(prepared: Prepared, tiny_recipe: dict[str, Any]) -> None:
    config, notes = defaults.settle(resolve(tiny_recipe, {}), prepared(WORDS))
    assert config.model.image is None
    assert config.model.audio is None
    assert len(notes) == 2
    assert "no pictures in rows" in notes[0]


@pytest.mark.parametrize("join", ["auto", "output"])
def test_towers_stay_where_some_row_needs_them(
    prepared: Prepared, tiny_recipe: dict[str, Any], make_png: Callable[..., bytes], join: str
) -> None:
    rows = [*WORDS, {"image": encoded(make_png), "label": "red"}]
    recipe = resolve(tiny_recipe, {"freeze.strategy": "auto", "model.join": join})
    config, notes = defaults.settle(recipe, prepared(rows))
    assert config.model.image is not None
    assert config.model.audio is None
    assert config.freeze.strategy == "connector"
    assert config.model.join == "output"
    assert len(notes) == (3 if join == "auto" else 2)


@pytest.mark.parametrize("rows", [WORDS, SPANS], ids=["classify", "tag"])
def test_text_alone_trains_a_small_language_model_whole(
    prepared: Prepared, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    recipe = resolve(tiny_recipe, {"freeze.strategy": "auto"})
    dataset = prepared(rows)
    assert defaults.settle(recipe, dataset)[0].freeze.strategy == "all"
    monkeypatch.setattr(defaults, "SMALL", 1000)
    assert defaults.settle(recipe, dataset)[0].freeze.strategy == "lora:16"


def test_spans_train_the_language_model_also_beside_pictures(
    prepared: Prepared, tiny_recipe: dict[str, Any], make_png: Callable[..., bytes]
) -> None:
    rows = [{**row, "image": encoded(make_png)} for row in SPANS]
    config, _ = defaults.settle(resolve(tiny_recipe, {"freeze.strategy": "auto"}), prepared(rows))
    assert config.freeze.strategy == "all"


@pytest.mark.parametrize(
    ("strategy", "join"), [("all", "input"), ("lora:4", "input"), ("connector", "output"), ("auto", "input")]
)
def test_words_alone_are_read_by_the_head_where_the_language_model_learns(
    prepared: Prepared, tiny_recipe: dict[str, Any], strategy: str, join: str
) -> None:
    recipe = resolve(tiny_recipe, {"freeze.strategy": strategy, "model.join": "auto"})
    assert defaults.settle(recipe, prepared(WORDS))[0].model.join == join


@pytest.mark.parametrize(("offered", "match"), [([["red"]], "dual"), ([["red"], ["red", "blue"]], "cross")])
def test_pairs_are_read_apart(
    prepared: Prepared, tiny_recipe: dict[str, Any], offered: list[list[str]], match: str
) -> None:
    dataset = prepared([{"text": "which colour?", "candidates": each, "label": "0"} for each in offered])
    config, notes = defaults.settle(resolve(tiny_recipe, {}), dataset)
    assert config.model.match == match
    assert any(note.startswith("model.match=dual") for note in notes) == (match == "dual")
    assert defaults.described(config, dataset)["match"].dual == (match == "dual")
    stays = resolve(tiny_recipe, {"model.match": "cross"})
    assert not defaults.described(defaults.settle(stays, dataset)[0], dataset)["match"].dual


def test_a_native_model_has_towers_of_its_own(
    prepared: Prepared, tiny_recipe: dict[str, Any], make_png: Callable[..., bytes]
) -> None:
    dataset = prepared([{"text": "hm?", "image": encoded(make_png), "label": label} for label in ("red", "blue")])
    recipe = resolve(tiny_recipe, {"model.join": "native", "freeze.strategy": "auto"})
    config, notes = defaults.settle(recipe, dataset)
    assert (config.model.image, config.model.audio) == (None, None)
    assert config.freeze.strategy == "all"
    assert any("the model's own towers" in note for note in notes)


def test_what_writes_joins_at_the_input(prepared: Prepared, tiny_recipe: dict[str, Any]) -> None:
    rows = [{"task": "generate", "text": "a red", "answer": "un rouge"}]
    recipe = resolve(tiny_recipe, {"freeze.strategy": "connector", "model.join": "auto"})
    assert defaults.settle(recipe, prepared(rows))[0].model.join == "input"


@pytest.mark.parametrize(
    ("rows", "scratch", "epochs"),
    [(50, True, 40), (10_000, True, 20), (10**6, True, 4), (50, False, 6), (16_000, False, 4), (10**6, False, 3)],
)
def test_fewer_rows_want_more_passes(rows: int, scratch: bool, epochs: float) -> None:
    assert defaults._epochs(rows, scratch=scratch)[0] == epochs


def test_passes_are_those_of_the_rows_that_train(
    prepared: Prepared, tiny_recipe: dict[str, Any], make_png: Callable[..., bytes]
) -> None:
    rows = [*WORDS, {"image": encoded(make_png), "label": "red"}]
    dataset = prepared(rows)
    recipe = resolve(tiny_recipe, {"train.epochs": "auto"})
    assert defaults.settle(recipe, dataset)[0].train.epochs == 40
    assert defaults.settle(resolve(tiny_recipe, {"train.epochs": 2.5}), dataset)[0].train.epochs == 2.5


@pytest.mark.parametrize(("aligned", "strategy"), [(True, "connector"), (False, "all")])
def test_without_labels_what_is_auto_is_settled_too(tiny_recipe: dict[str, Any], aligned: bool, strategy: str) -> None:
    given = {"freeze.strategy": "auto", "model.join": "auto", "train.epochs": "auto", "model.image.aspect": "auto"}
    config = defaults.settle_unlabelled(resolve(tiny_recipe, given), aligned=aligned)
    assert (config.freeze.strategy, config.model.join, config.train.epochs) == (strategy, "output", 3)
    assert defaults.settle_unlabelled(config, aligned=aligned) == config


@pytest.mark.parametrize(
    ("sizes", "aspect"),
    [([(40, 10), (20, 10), (30, 10)], 3.0), ([(5, 40)], 0.25), ([(14, 10), (90, 10), (8, 10)], 1.0)],
)
def test_long_pictures_are_not_squeezed_into_a_square(
    prepared: Prepared, tiny_recipe: dict[str, Any], make_png: Callable[..., bytes], sizes: Any, aspect: float
) -> None:
    rows = [{"image": encoded(make_png, size=size), "label": label} for size in sizes for label in ("red", "blue")]
    config, notes = defaults.settle(resolve(tiny_recipe, {"model.image.aspect": "auto"}), prepared(rows))
    assert config.model.image is not None
    assert config.model.image.aspect == aspect
    assert ("aspect" in " ".join(notes)) == (aspect != 1)


def test_what_is_said_stays(prepared: Prepared, tiny_recipe: dict[str, Any]) -> None:
    said = resolve(tiny_recipe, {"freeze.strategy": "head", "model.image": None, "model.audio": None})
    assert defaults.settle(said, prepared(WORDS)) == (said, [])


def test_validations_are_spread_over_epochs(prepared: Prepared, tiny_recipe: dict[str, Any]) -> None:
    given = {"train.eval_every_epochs": 2, "train.eval_every_steps": 3, "train.micro_batch": 1}
    dataset = prepared(WORDS)  # 12 rows of training
    assert defaults.settle(resolve(tiny_recipe, given), dataset)[0].train.eval_every_steps == 24
    rare = resolve(tiny_recipe, {**given, "train.eval_every_steps": 50})
    settled = defaults.settle(rare, dataset)[0]
    assert settled.train.eval_every_steps == 50
    assert defaults.settle(settled, dataset) == (settled, [])


def test_the_recipe_for_own_data_leaves_it_to_the_data() -> None:
    config = load(CHECKOUT / "jobs" / "recipes" / "small.yaml", [])
    assert config.freeze.strategy == "auto"
    assert config.model.image is not None
    assert config.model.audio is not None
