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
from mmagent.tasks import make_all

CPU = torch.device("cpu")


class Begun:
    """A model that begins with a bundle, its batches and its anchor."""

    def __init__(self, source: Path, **start: Any) -> None:
        raw = {"data": {"name": "tiny"}, "model": {"backbone": "x"}, "train": {"micro_batch": 8}}
        raw["start"] = {"bundle": str(source), **start}
        self.config: Config = inheritance.settle(resolve(raw, {"freeze.strategy": "connector"}))
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
        anchor.check(config, bundle.load(tiny_bundle).tasks)
