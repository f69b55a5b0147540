"""The mathematics that training rests on, against closed forms and the papers' formulas: the gradient of binary
cross-entropy, the decoupled update of SGD and AdamW, and the empirical risk as a mean over samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jobs import engine as engines
from jobs import supervised
from jobs.engine import TorchEngine
from mmagent import freeze, text
from mmagent.batch import Inputs, Sample
from mmagent.buckets import Buckets, cuts
from mmagent.config import Config, resolve
from mmagent.model import Batch
from mmagent.reading import View
from mmagent.record import Record, Target
from mmagent.tasks.classify import cross_entropy
from tests.conftest import classify

LABELS = ("black", "blue", "green", "red")


# ---------------------------------------------------------------------------------------------- the loss


def test_the_gradient_of_binary_cross_entropy_is_its_closed_form() -> None:
    """-(y / p - (1 - y) / (1 - p)) dp/dtheta, where p is the second class's share of a softmax of two logits."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 2, dtype=torch.float64)
    x, labels = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    weights = torch.rand(7, dtype=torch.float64) + 0.5

    # `cross_entropy` computes in fp32, whatever it is given.
    loss = cross_entropy(layer(x), labels, weights, 7)
    given = torch.autograd.grad(loss, [layer.weight, layer.bias])

    chance = layer(x).softmax(1)[:, 1]  # (7,)
    outer = -(labels / chance - (1 - labels) / (1 - chance)) * weights / 7  # dL/dp of each sample
    wanted = torch.autograd.grad(chance, [layer.weight, layer.bias], grad_outputs=outer.detach())
    for mine, closed in zip(given, wanted, strict=True):
        torch.testing.assert_close(mine, closed, atol=1e-6, rtol=1e-5)

    # And by hand: dp/dlogit1 = p (1 - p) = -dp/dlogit0, so that the gradient of the logits is p - y.
    error = (chance - labels).detach() * weights / 7
    torch.testing.assert_close(given[1], torch.stack([-error.sum(), error.sum()]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(given[0], torch.stack([-(error @ x), error @ x]), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- the step

STEPS = 5


def steps_of(config: Config, decay: float) -> tuple[list[Tensor], list[Tensor]]:
    """A matrix driven by gradients of its own: it before and after each step, and the gradients."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    group = {"params": [parameter], "peak_lr": 0.1, "lr": 0.1, "stage": 0, "weight_decay": decay}
    optimizer = engines.optimizer_of([group], config)
    places, gradients = [parameter.detach().clone()], []
    for _ in range(STEPS):
        gradient = torch.randn(4, 3, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        places.append(parameter.detach().clone())
        gradients.append(gradient)
    return places, gradients


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_sgd_is_the_decoupled_update(tiny_recipe: dict[str, Any], decay: float) -> None:
    """A step goes from theta to theta - eta grad - eta lambda theta."""
    config = resolve(tiny_recipe, {"optim.name": "sgd", "optim.momentum": 0.0})
    places, gradients = steps_of(config, decay)
    for before, gradient, after in zip(places, gradients, places[1:], strict=False):
        torch.testing.assert_close(after, before - 0.1 * gradient - 0.1 * decay * before, atol=1e-12, rtol=0)


def test_sgds_momentum_holds_no_decay(tiny_recipe: dict[str, Any]) -> None:
    """SGDW, arXiv:1711.05101, algorithm 1: the decay passes by the momentum."""
    places, gradients = steps_of(resolve(tiny_recipe, {"optim.name": "sgd", "optim.momentum": 0.9}), 0.3)
    speed = torch.zeros_like(places[0])
    for before, gradient, after in zip(places, gradients, places[1:], strict=False):
        speed = 0.9 * speed + gradient
        torch.testing.assert_close(after, before - 0.1 * speed - 0.1 * 0.3 * before, atol=1e-12, rtol=0)
    coupled = torch.optim.SGD([nn.Parameter(places[0].clone())], lr=0.1, momentum=0.9, weight_decay=0.3)
    for gradient in gradients:
        coupled.param_groups[0]["params"][0].grad = gradient
        coupled.step()
    assert not torch.allclose(coupled.param_groups[0]["params"][0], places[-1], atol=1e-3)


def test_adamw_steps_by_its_papers_formula(tiny_recipe: dict[str, Any]) -> None:
    """arXiv:1711.05101, algorithm 2: the decay is added to the step, not to the gradient."""
    places, gradients = steps_of(resolve(tiny_recipe, {"optim.betas": [0.8, 0.95]}), 0.3)
    first, second = torch.zeros_like(places[0]), torch.zeros_like(places[0])
    for count, (before, gradient, after) in enumerate(zip(places, gradients, places[1:], strict=False), start=1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        step = (first / (1 - 0.8**count)) / ((second / (1 - 0.95**count)).sqrt() + 1e-8)
        torch.testing.assert_close(after, before - 0.1 * step - 0.1 * 0.3 * before, atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------- the risk


@pytest.fixture
def samples(tiny_recipe: dict[str, Any], make_records: Callable[..., list[Record]]) -> tuple[Inputs, list[Sample]]:
    """12 samples of different lengths and weights, one of them without a label."""
    config = resolve(tiny_recipe, {})
    inputs = Inputs(config.model, config.data, text.load_tokenizer(config.model.backbone), classify(LABELS))
    made = []
    for index, record in enumerate(make_records(12)):
        sample = inputs.sample(record)
        [view] = sample.views
        longer = View(np.concatenate([view.ids[:-1], view.ids[1:2].repeat(index), view.ids[-1:]]))
        target = Target() if index == 7 else record.target
        made.append(
            replace(sample, record=replace(record, target=target), views=(longer,), weight=0.25 * (1 + index % 4))
        )
    return inputs, made


def gradients_of(
    raw: Mapping[str, Any], inputs: Inputs, samples: list[Sample], micro: int, accumulation: int,
    parts: list[slice] | None = None, *, packed: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradient of one optimizer step, in double precision and without dropout, before it is clipped.

    Args:
        parts: the micro-batches, where they are others than `micro` samples each.
        packed: whether texts may share a row.
    """
    config = resolve(
        raw, {"freeze.strategy": "all", "model.dropout": 0.0, "model.audio.dropout": 0.0, "model.backbone_dropout": 0.0,
              "train.micro_batch": micro, "train.accumulation": accumulation},
    )  # fmt: skip
    encoder = text.load_encoder(config.model.backbone, dropout=0.0)
    assert encoder.packs is not None
    encoder.packs = encoder.packs if packed else None
    model = supervised.build(config, classify(LABELS), encoder).double()
    engine = TorchEngine(model, freeze.groups(model, config), config)
    for part in parts or [slice(at, at + micro) for at in range(0, len(samples), micro)]:
        batch: Batch = {
            key: (value.double() if value.is_floating_point() else value).to(engine.device)
            for key, value in inputs.batch(samples[part]).items()
        }
        engine.backward(supervised.loss_of(engine.forward(batch), batch, inputs.tasks, config))
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def test_the_risk_is_the_mean_over_samples_however_they_are_batched(
    tiny_recipe: dict[str, Any], samples: tuple[Inputs, list[Sample]]
) -> None:
    """R = 1/n sum of w_i L_i: one batch of twelve, four of three, or twelve of one, each padded to its own longest,
    give one gradient: the sum of the samples' own by weight, divided by their number."""
    inputs, made = samples
    whole = gradients_of(tiny_recipe, inputs, made, 12, 1)
    for micro, accumulation in ((3, 4), (1, 12)):
        parts = gradients_of(tiny_recipe, inputs, made, micro, accumulation)
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, atol=2e-6, rtol=1e-3, msg=f"{micro}: {name}: {{}}".format)

    # By the definition, sample by sample, with the weight taken out of the batch and put in by hand.
    total: dict[str, Tensor] = {}
    for sample in made:
        if sample.record.target.label is not None:
            alone = gradients_of(tiny_recipe, inputs, [replace(sample, weight=1.0)], 1, 1)
            for name, gradient in alone.items():
                total[name] = total.get(name, torch.zeros_like(gradient)) + sample.weight * gradient / len(made)
    for name, gradient in whole.items():
        torch.testing.assert_close(total[name], gradient, atol=2e-6, rtol=1e-3, msg=f"{name}: {{}}".format)


def test_the_risk_is_the_same_dealt_by_length_cut_by_tokens_and_packed(
    tiny_recipe: dict[str, Any], samples: tuple[Inputs, list[Sample]]
) -> None:
    inputs, made = samples
    lengths = np.array([sample.tokens for sample in made])
    padded = gradients_of(tiny_recipe, inputs, made, 12, 1, packed=False)
    packed = gradients_of(tiny_recipe, inputs, made, 12, 1)
    [places], [micros] = Buckets(1, 12, 12, tokens=2 * int(lengths.max())).deal(lengths, np.ones(12, bool))
    dealt = [made[place] for place in places]
    parts = cuts(micros)
    assert len(parts) > 3
    cut = gradients_of(tiny_recipe, inputs, dealt, 12, 1, parts)
    for name, gradient in padded.items():
        for other in (packed, cut):
            torch.testing.assert_close(other[name], gradient, atol=2e-6, rtol=1e-3, msg=f"{name}: {{}}".format)


def test_rows_that_fill_up_a_batch_count_nothing(
    tiny_recipe: dict[str, Any], samples: tuple[Inputs, list[Sample]]
) -> None:
    inputs, made = samples
    filler = [replace(sample, weight=0.0) for sample in made[:4]]
    short = gradients_of(tiny_recipe, inputs, [*made[:8], *filler], 12, 1)
    none = gradients_of(tiny_recipe, inputs, [*made[:8], *made[8:]], 12, 1)
    alone = gradients_of(tiny_recipe, inputs, made[:8], 8, 1)
    for name, gradient in short.items():  # the sum over eight samples, by the nominal size of twelve
        torch.testing.assert_close(gradient, alone[name] * 8 / 12, atol=2e-6, rtol=1e-3, msg=f"{name}: {{}}".format)
    assert any(not torch.allclose(none[name], short[name], atol=1e-5) for name in short)
