"""What holds a training near the bundle it began with: penalties by their formulas, a teacher for replayed rows alone,
and the same whatever way a batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import anchor, supervised
from jobs.anchor import Anchor
from jobs.supervised import Batches
from mmagent import bundle, inheritance
from mmagent.assembly import load_language, load_reading
from mmagent.batch import Inputs, Sample
from mmagent.config import Config, ConfigError, resolve
from mmagent.frozen import FrozenStates
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all
from mmagent.tasks.task import IGNORED

CPU = torch.device("cpu")


class Begun:
    """A model that begins with a bundle, its batches and its anchor."""

    def __init__(self, source: Path, strategy: str = "connector", **start: Any) -> None:
        data = {"name": "tiny", "max_text_tokens": 24, "max_answer_tokens": 12}
        raw = {"data": data, "model": {"backbone": "x"}, "train": {"micro_batch": 8}}
        raw["start"] = {"bundle": str(source), **start}
        self.config: Config = inheritance.settle(resolve(raw, {"freeze.strategy": strategy}))
        self.tasks = make_all(bundle.load(source).tasks)
        encoder = load_language(self.config.model, self.tasks)
        inputs = Inputs(self.config.model, self.config.data, load_reading(self.config.model), self.tasks, encoder)
        self.model = self.fresh()
        self.batches = Batches(inputs, FrozenStates(encoder, device=CPU), self.config, {}, CPU)
        self.anchor = Anchor(self.config, self.model, CPU)

    def fresh(self) -> Any:
        return supervised.build(self.config, self.tasks, load_language(self.config.model, self.tasks))

    def samples(self, records: list[Record]) -> list[Sample]:
        return [self.batches.inputs.sample(record) for record in records]

    def extra(self, samples: list[Sample]) -> torch.Tensor:
        batch = self.batches.make(samples)
        return self.anchor.loss(self.model(batch), batch)

    def weigh(self, samples: list[Sample]) -> None:
        def loss(out: Any, batch: Any) -> torch.Tensor:
            return supervised.loss_of(out, batch, self.tasks, self.config)

        self.anchor.weigh(self.fresh(), samples, self.batches.make, loss, CPU)

    def move(self, seed: int = 1, size: float = 0.01) -> dict[str, torch.Tensor]:
        """Moves every weight that learns by random numbers; by which."""
        generator, out = torch.Generator().manual_seed(seed), {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                out[name] = size * torch.randn(parameter.shape, generator=generator)
                parameter.data += out[name]
        return out


def replays(records: list[Record]) -> list[Record]:
    return [replace(record, meta={**record.meta, "source": "replay"}) for record in records]


def test_l2_sp_is_half_its_strength_times_the_squared_way(
    tiny_bundle: Path, make_records: Callable[..., list[Record]]
) -> None:
    made = Begun(tiny_bundle, hold="l2_sp", strength=0.3)
    samples = made.samples(make_records(8))
    assert made.extra(samples).item() == 0.0
    moved = made.move()
    wanted = 0.15 * sum(float(each.square().sum()) for each in moved.values())
    assert made.extra(samples).item() == pytest.approx(wanted, rel=1e-4)


def test_a_batch_cut_in_two_sums_to_the_same(tiny_bundle: Path, make_records: Callable[..., list[Record]]) -> None:
    made = Begun(tiny_bundle, hold="l2_sp", distil=0.7)
    made.move()
    made.model.eval()
    samples = made.samples(replays(make_records(8)))
    whole, parts = made.extra(samples), made.extra(samples[:3]) + made.extra(samples[3:])
    assert parts.item() == pytest.approx(whole.item(), rel=1e-4)


def test_ewc_weighs_by_squared_gradients_of_single_samples(
    tiny_bundle: Path, make_records: Callable[..., list[Record]]
) -> None:
    made = Begun(tiny_bundle, hold="ewc", strength=2.0)
    samples = made.samples(make_records(8, "validation"))
    made.weigh(samples)
    model = made.fresh().eval()
    squares: dict[str, torch.Tensor] = {}
    for sample in samples:
        model.zero_grad()
        batch = made.batches.make([sample])
        supervised.loss_of(model(batch), batch, made.tasks, made.config).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] = squares.get(name, torch.zeros(())) + parameter.grad.square()
    moved = made.move()
    count = sum(each.numel() for each in moved.values())
    total = sum(float(each.sum()) for each in squares.values())
    wanted = sum(float((squares[name] * moved[name].square()).sum()) for name in moved if name in squares)
    assert made.extra(samples).item() == pytest.approx(wanted * count / total, rel=1e-3)


def test_distillation_asks_for_replayed_rows_alone(
    tiny_bundle: Path, make_records: Callable[..., list[Record]]
) -> None:
    made = Begun(tiny_bundle, distil=1.0)
    made.model.eval()
    new, old = make_records(4), replays(make_records(4))
    assert made.extra(made.samples(old)).item() == pytest.approx(0.0, abs=1e-6)  # nothing has moved yet
    made.move(size=0.3)
    assert made.extra(made.samples(new)).item() == 0.0
    alone = made.extra(made.samples(old)).item()
    assert alone > 1e-4
    assert made.extra(made.samples([*new, *old])).item() == pytest.approx(alone, rel=1e-4)


def softened(scores: Any, temperature: float) -> torch.Tensor:
    return torch.softmax(torch.as_tensor(scores, dtype=torch.float32) / temperature, -1)


def apart(said: Any, wanted: Any, temperature: float = 2.0) -> float:
    """Kullback-Leibler divergence of what is said from what is wanted, times the temperature's square."""
    p, q = softened(wanted, temperature), softened(said, temperature)
    return float((p * (p.log() - q.log())).sum() * temperature**2)


def test_starts_and_ends_are_taught_of_extract() -> None:
    task = make_all({"extract": TaskInfo("extract")})["extract"]
    said, taught = (torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    batch = {"extract/inside": torch.tensor([[True] * 4, [False] * 4])}  # the second row is another task's
    found = task.distance(said, taught, batch, 2.0)
    wanted = (apart(said[0, :, 0], taught[0, :, 0]) + apart(said[0, :, 1], taught[0, :, 1])) / 2
    assert found is not None
    assert found.tolist() == pytest.approx([wanted, 0.0], rel=1e-4)


def test_each_token_is_taught_of_generate() -> None:
    task = make_all({"generate": TaskInfo("generate")})["generate"]
    said, taught = (torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    batch = {"generate/reply": torch.tensor([[IGNORED, 4, 6], [1, 2, 3]])}
    found = task.distance(said, taught, batch, 2.0)
    wanted = [
        sum(apart(said[row, at], taught[row, at]) for at in places) / len(places)
        for row, places in ((0, (1, 2)), (1, (0, 1, 2)))
    ]
    assert found is not None
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)


def test_candidates_scores_are_taught_of_match() -> None:
    task = make_all({"match": TaskInfo("match")})["match"]
    said, taught = torch.tensor([[1.0], [-2.0], [0.5], [9.0]]), torch.tensor([[0.0], [1.0], [-1.0], [3.0]])
    batch = {"match/known": torch.tensor([1.0, 1.0, 1.0, 0.0]), "sample_row": torch.tensor([0, 0, 1, 2])}
    found = task.distance(said, taught, batch, 2.0)
    single = [apart([one, 0.0], [other, 0.0]) for one, other in ((1.0, 0.0), (-2.0, 1.0), (0.5, -1.0))]
    listed = apart([1.0, -2.0], [0.0, 1.0])
    wanted = [(single[0] + listed) / 2, (single[1] + listed) / 2, single[2] / 2, 0.0]
    assert found is not None
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)


def test_the_nearest_of_the_batch_is_taught_where_match_reads_apart() -> None:
    task = make_all({"match": TaskInfo("match", dual=True)})["match"]
    said, taught = (torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    batch = {
        "match/offered": torch.tensor([False, True, False, True]), "match/mine": torch.tensor([True] * 4),
        "match/right": torch.tensor([False, True, False, True]), "match/key": torch.arange(4),
        "weight": torch.tensor([0.5] * 4), "sample_row": torch.tensor([0, 0, 1, 1]),
    }  # fmt: skip
    found = task.distance(said, taught, batch, 2.0)
    wanted = [apart(said[row] @ said[[1, 3]].T, taught[row] @ taught[[1, 3]].T) for row in (0, 2)]
    assert found is not None
    # A row's weight is a half of its record's: what the record is taught counts whole.
    assert found.tolist() == pytest.approx([2 * wanted[0], 0.0, 2 * wanted[1], 0.0], rel=1e-4, abs=1e-6)


def test_a_bundle_that_extracts_and_matches_teaches(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """The real model and its teacher: nothing to say before a step, and something after one, of replayed rows alone."""
    infos = {"extract": TaskInfo("extract"), "match": TaskInfo("match")}
    made = Begun(make_bundle(tmp_path / "many", infos, "extract"), distil=1.0)
    made.model.eval()
    rows = [
        parse({"id": "a", "task": "extract", "text": "what color?", "context": "a red circle", "target": {
            "texts": ["red"], "spans": [{"start": 2, "end": 5, "label": ""}]}}),
        parse({"id": "b", "task": "match", "text": "what color?", "candidates": [{"content": "red"}, {"content":
            "blue"}], "target": {"labels": ["1"]}}),
    ]  # fmt: skip
    old = made.samples(replays(rows))
    assert made.extra(old).item() == pytest.approx(0.0, abs=1e-5)
    made.move(size=0.5)
    both = made.extra(old).item()
    assert both > 1e-3
    assert made.extra(made.samples(rows)).item() == 0.0
    assert made.extra(old[:1]).item() + made.extra(old[1:]).item() == pytest.approx(both, rel=1e-3)


def test_a_bundle_that_writes_teaches(writers: dict[str, Path], tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    config = resolve(tiny_recipe, {"model.backbone": str(writers["decoder"]), "model.join": "input"})
    infos = {"generate": TaskInfo("generate")}
    tasks = make_all(infos)
    encoder = load_language(config.model, tasks)
    model = supervised.build(config, tasks, encoder)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    bundle.save(
        tmp_path / "writer", name="writer", config=config, tasks=infos, task="generate", state=state, backbone=encoder,
        tokenizer=load_reading(config.model), calibration={}, origin={},
    )  # fmt: skip
    made = Begun(tmp_path / "writer", "all", distil=1.0)
    made.model.eval()
    rows = [parse({"id": "a", "task": "generate", "text": "what is there", "answer": "red circle"})]
    old = made.samples(replays(rows))
    assert made.extra(old).item() == pytest.approx(0.0, abs=1e-5)
    made.move(size=0.1)
    assert made.extra(old).item() > 1e-4
    assert made.extra(made.samples(rows)).item() == 0.0


def test_what_distillation_says_draws_answers_back(
    tiny_bundle: Path, make_records: Callable[..., list[Record]]
) -> None:
    made = Begun(tiny_bundle, distil=1.0)
    made.model.eval()
    made.move(size=0.2)
    samples = made.samples(replays(make_records(8)))
    optimizer = torch.optim.Adam([p for p in made.model.parameters() if p.requires_grad], lr=3e-3)
    before = made.extra(samples).item()
    for _ in range(20):
        optimizer.zero_grad()
        made.extra(samples).backward()
        optimizer.step()
    assert made.extra(samples).item() < 0.3 * before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"start.hold": "ewc"}, r"give start\.bundle"),
        ({"start.distil": 1.0}, r"give start\.bundle"),
        ({"start.bundle": "b", "start.hold": "l2_sp", "zero.stage": 3}, r"give zero\.stage=0, 1 or 2"),
    ],
)
def test_what_cannot_be_had_is_told(
    tiny_bundle: Path, overrides: dict[str, Any], words: str
) -> None:  # fmt: skip
    config = resolve({"data": {"name": "tiny"}, "model": {"backbone": "x"}}, overrides)
    with pytest.raises(ConfigError, match=words):
        anchor.check(config)


def test_a_teacher_is_believed_as_far_as_it_knows_a_rows_own_label() -> None:
    task = make_all({"classify": TaskInfo("classify", ("a", "b", "c"))})["classify"]
    taught = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]).log()  # it did not know of c
    batch = {"classify/label": torch.tensor([0, 1, 2, IGNORED]), "weight": torch.ones(4)}
    assert task.trust(taught, batch).tolist() == pytest.approx([0.9, 0.1, 0.0, 1.0], abs=1e-6)
    tags = make_all({"tag": TaskInfo("tag", ("a",))})["tag"]
    assert tags.trust(torch.zeros(4, 5, 3), batch).tolist() == [1.0] * 4
