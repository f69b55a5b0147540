"""Pairs teach by the other rows of a batch, and are ranked among all rows; what is the same is no wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from jobs import supervised
from mmagent import freeze, predictions, text
from mmagent.batch import Inputs
from mmagent.config import resolve
from mmagent.frozen import FrozenStates
from mmagent.predictor import Predictor
from mmagent.record import Record, Target
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from mmagent.tasks import Decision, Outcome, make
from mmagent.tasks.dual import Apart, DualMatch
from mmagent.tasks.task import Placed

INFO = TaskInfo("match", dual=True)
COLOURS = ("red", "blue", "green", "yellow")


def pair(asked: str, *offered: Any, right: str = "0", **media: Any) -> Record:
    candidates = [each if isinstance(each, dict) else {"content": each} for each in offered]
    row = {"task": "match", "text": asked, "candidates": candidates, "target": {"labels": [right]}, **media}
    return parse(row, default_id=asked)


@pytest.fixture
def task() -> DualMatch:
    made = make(INFO)
    assert isinstance(made, DualMatch)
    return made


@pytest.fixture
def inputs(tiny_recipe: dict[str, Any], tiny_backbone: Path, task: DualMatch) -> Inputs:
    config = resolve(tiny_recipe, {"model.backbone": str(tiny_backbone)})
    return Inputs(config.model, config.data, text.load_tokenizer(str(tiny_backbone)), {"match": task})


def vectors(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    return F.normalize(torch.randn(len(batch["ids"]), 8), dim=1) * 3


def test_the_loss_is_the_cross_entropy_over_the_batchs_candidates(inputs: Inputs, task: DualMatch) -> None:
    rows = [pair(f"is it {colour}", colour) for colour in COLOURS]
    batch = inputs.batch([inputs.sample(row) for row in rows])
    output = vectors(batch)
    expected = F.cross_entropy(output[0::2] @ output[1::2].T, torch.arange(4), reduction="sum") / 4
    torch.testing.assert_close(task.loss(output, batch, 4, 0.0), expected)
    right, known = task.hits(output, batch)
    assert int(right) == int(((output[0::2] @ output[1::2].T).argmax(1) == torch.arange(4)).sum())
    assert int(known) == 4


def test_what_is_the_same_is_no_wrong_answer(inputs: Inputs, task: DualMatch) -> None:
    """The second row offers what the first does; the third asks what the first does."""
    rows = [pair("is it red", "yes"), pair("is it blue", "yes"), pair("is it red", "it is red"), pair("hm", "no")]
    batch = inputs.batch([inputs.sample(row) for row in rows])
    _, _, own, there = task._compared(vectors(batch), batch)
    assert own.tolist() == torch.eye(4, dtype=torch.bool).tolist()
    assert there.tolist() == [
        [True, False, False, True],
        [False, True, True, True],
        [False, False, True, True],
        [True, True, True, True],
    ]


def test_rows_without_a_right_candidate_serve_as_wrong_ones_alone(inputs: Inputs, task: DualMatch) -> None:
    none = pair("hm", "no", "not")
    rows = [pair("is it red", "red", "blue", right="1"), replace(none, target=Target(labels=()))]
    batch = inputs.batch([inputs.sample(row) for row in rows])
    output = vectors(batch)
    scores = output[0] @ output[[1, 2, 4, 5]].T
    torch.testing.assert_close(task.loss(output, batch, 1, 0.0), F.cross_entropy(scores[None], torch.tensor([1])))


def test_a_batch_of_other_tasks_costs_nothing(inputs: Inputs, task: DualMatch) -> None:
    batch = inputs.batch([inputs.sample(pair("is it red", "red"))])
    batch["weight"] = torch.zeros_like(batch["weight"])
    output = vectors(batch).requires_grad_()
    loss = task.loss(output, batch, 1, 0.0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert task.hits(output, batch)[1] == 0


def test_pictures_find_their_captions(
    tiny_recipe: dict[str, Any], tiny_backbone: Path, make_png: Callable[..., bytes]
) -> None:
    """A picture asked with, captions offered; and the other way round."""
    config = resolve(tiny_recipe, {"model.backbone": str(tiny_backbone), "model.dropout": 0.0, "model.audio": None})
    for rows in (
        [pair("", f"it is {colour}", images=[make_png(colour)]) for colour in COLOURS],
        [pair(f"it is {colour}", {"image": make_png(colour)}) for colour in COLOURS],
    ):
        predictor = Predictor.untrained(config, {"match": INFO}, "match", device="cpu")
        encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
        module, frozen = supervised.build(config, predictor.tasks, encoder), FrozenStates(encoder)
        inputs = Inputs(config.model, config.data, tokenizer, predictor.tasks)
        batch = inputs.batch([inputs.sample(row) for row in rows])
        batch["text_states"] = frozen(batch["ids"], batch["mask"])
        optimizer = torch.optim.AdamW(freeze.groups(module, config), lr=3e-3)
        losses = []
        for _ in range(60):
            loss = supervised.loss_of(module(batch), batch, predictor.tasks, config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] / 2
        trained = Predictor(
            name="b", config=config, tasks=predictor.tasks, task="match", model=module, encoder=encoder,
            tokenizer=tokenizer, device="cpu",
        )  # fmt: skip
        task = trained.tasks["match"]
        answers = trained.predict(rows)
        said = [predictions.judged(task, ["0"], answer) | {"truth": '["0"]', "group": ""} for answer in answers]
        table = pa.Table.from_pylist(said)  # as an evaluation keeps them
        found = task.measure(predictions.outcomes(table, task))
        assert found["mrr"]["value"] == 1.0
        offered = tuple(row.candidates[0] for row in rows)
        several = [replace(row, candidates=offered) for row in rows]
        assert [answer.label for answer in trained.predict(several)] == ["0", "1", "2", "3"]


def placed(angle: float, other: float, keys: tuple[int, int]) -> Outcome:
    at = Placed((np.cos(angle), np.sin(angle)), (np.cos(other), np.sin(other)), keys)
    return Outcome(["0"], Decision(label="0", probabilities={"0": 0.9}, placed=at))


def test_lone_candidates_are_ranked_among_those_of_all_rows(task: DualMatch) -> None:
    rows = [placed(0.0, 0.1, (1, 11)), placed(0.0, 0.3, (2, 12)), placed(1.0, 0.2, (3, 13))]
    assert task.ranks(rows) == [1, 3, 2]
    found = task.measure(rows)
    assert found["mrr"]["value"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert found["recall_at_1"]["value"] == pytest.approx(1 / 3)
    same = [placed(0.0, 0.1, (1, 11)), placed(0.0, 0.3, (1, 12)), placed(1.0, 0.2, (3, 13))]
    assert task.ranks(same) == [1, 2, 2]  # the first's candidate is right for the second too
    several = Outcome(["1"], Decision(label="0", probabilities={"0": 0.6, "1": 0.4}))
    assert task.ranks([several, *rows]) == [2, 1, 3, 2]


def test_a_lone_candidate_fits_from_where_validation_says(task: DualMatch) -> None:
    rng = np.random.default_rng(0)
    raws, rows = [], []
    for index in range(60):
        asked = rng.normal(size=8)
        asked /= np.linalg.norm(asked)
        raws.append(Apart(asked * 3, asked[None] * 3, (index, 100 + index)))
        rows.append(pair(f"row {index}", "red"))
    fitted = task.calibrate(raws, rows, ["text"] * 60)
    assert 1.0 < fitted.least < 9.0
    wrong = Apart(raws[0].asked, raws[1].offered, (0, 101))
    fits = [task.decide(raw, rows[0], fitted, "text").probabilities["0"] for raw in (raws[0], wrong)]
    assert fits[0] > 0.9
    assert fits[1] < 0.5
