"""What a model takes over from an earlier bundle: the same answers before the first step, also where heads grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.supervised import build
from mmagent import bundle, inheritance
from mmagent.assembly import load_language, load_reading
from mmagent.bundle import BundleError
from mmagent.config import ConfigError, resolve
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all
from tests.conftest import COLOURS


def begun(source: Path, infos: dict[str, TaskInfo], **overrides: object) -> Predictor:
    """The model of a run on data of these tasks that begins with a bundle, as it answers before its first step."""
    raw = {"data": {"name": "tiny"}, "model": {"backbone": "unsaid"}, "start": {"bundle": str(source)}}
    config = inheritance.settle(resolve(raw, overrides))
    settled = inheritance.described(infos, bundle.load(source))
    tasks = make_all(settled)
    encoder = load_language(config.model, tasks)
    model = build(config, tasks, encoder)
    return Predictor(
        name="begun", config=config, tasks=tasks, task=next(iter(infos)), model=model, encoder=encoder,
        tokenizer=load_reading(config.model), device="cpu",
    )  # fmt: skip


def test_a_run_begins_with_what_the_bundle_says(tiny_bundle: Path, make_records: Callable[..., list[Record]]) -> None:
    records = make_records(8)
    was, now = (
        Predictor.load(tiny_bundle, device="cpu"),
        begun(tiny_bundle, {"classify": TaskInfo("classify", COLOURS)}),
    )
    for a, b in zip(was.predict(records), now.predict(records), strict=True):
        assert a.probabilities == b.probabilities


@pytest.mark.parametrize("strategy", ["connector", "all", "lora:4"])
def test_a_head_grows_and_says_of_what_it_knew_the_same(
    tiny_bundle: Path, make_records: Callable[..., list[Record]], strategy: str
) -> None:
    """The data has two labels that the bundle knows and two that it does not, one before them in the alphabet."""
    records = make_records(8)
    was = Predictor.load(tiny_bundle, device="cpu")
    infos = {"classify": TaskInfo("classify", ("amber", "blue", "red", "teal"), {"amber": 3})}
    now = begun(tiny_bundle, infos, **{"freeze.strategy": strategy})
    assert now.labels == (*COLOURS, "amber", "teal")
    before, after = (each.raws([each.prepare(record) for record in records]) for each in (was, now))
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(torch.tensor(a), torch.tensor(b[:4]), atol=1e-5)
        assert b.shape == (6,)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("multilabel", ("a", "b"), ("b", "c")),
        ("tag", ("city",), ("city", "name")),
        ("relate", ("in", "of"), ("in", "near")),
        ("regress", (), ()),
    ],
)
def test_heads_of_every_kind_grow(
    make_bundle: Callable[..., Path], tmp_path: Path, kind: str, old: tuple[str, ...], new: tuple[str, ...]
) -> None:
    source = make_bundle(tmp_path / "old", {kind: TaskInfo(kind, old, mean=2.0, deviation=3.0)}, kind)
    now = begun(source, {kind: TaskInfo(kind, new, mean=9.0, deviation=1.0)})
    assert now.tasks[kind].labels == (*old, *(label for label in new if label not in old))
    assert (now.tasks[kind].info.mean, now.tasks[kind].info.deviation) == (2.0, 3.0)
    was = Predictor.load(source, device="cpu").model.state_dict()
    for name, value in now.model.state_dict().items():
        if name in was:
            assert torch.equal(value[: len(was[name])] if value.ndim else value, was[name])


def test_a_task_of_another_name_joins_and_one_that_no_row_asks_for_stays(
    make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    infos = {"classify": TaskInfo("classify", COLOURS), "classify:mood": TaskInfo("classify:mood", ("calm", "loud"))}
    source = make_bundle(tmp_path / "old", infos, "classify")
    now = begun(source, {"classify": infos["classify"], "regress": TaskInfo("regress", mean=1.0, deviation=2.0)})
    assert set(now.tasks) == {"classify", "classify:mood", "regress"}


def test_other_tasks_than_the_bundles_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"which start\.bundle names, answers classify"):
        begun(tiny_bundle, {"regress": TaskInfo("regress", mean=0.0, deviation=1.0)})


def test_a_bundle_that_is_not_there_is_told(storage: Path) -> None:
    raw = {"data": {"name": "tiny"}, "model": {"backbone": "x"}, "start": {"bundle": "nowhere"}}
    with pytest.raises(BundleError, match="there is no bundle 'nowhere'"):
        inheritance.settle(resolve(raw, {}))


def test_weights_of_another_shape_are_told(tiny_bundle: Path) -> None:
    found = bundle.load(tiny_bundle)
    infos = {"classify": TaskInfo("classify", COLOURS)}
    other = replace(found, config=resolve(found.config.model_dump(mode="json"), {"model.layers": 2}))
    tasks = make_all(infos)
    encoder = load_language(other.config.model, tasks)
    config = resolve(other.config.model_dump(mode="json"), {})
    with pytest.raises(BundleError, match="do not fit the model"):
        inheritance.take(build(config, tasks, encoder), found)
