"""Engines: the learning rate, DeepSpeed's settings, and that ZeRO computes what plain PyTorch computes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import engine as engines
from jobs.engine import Engine, TorchEngine
from mmagent import freeze, text
from mmagent.batch import Inputs
from mmagent.config import Config, resolve
from mmagent.model import Batch, MultimodalModel
from mmagent.record import Record
from mmagent.tasks.classify import cross_entropy
from tests.conftest import classify

LABELS = ("black", "blue", "green", "red")


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("total", [1, 2, 10, 1000])
@pytest.mark.parametrize("warmup_share", [0.0, 0.1, 0.5])
def test_the_rate_rises_then_falls_to_its_end(tiny_recipe: dict[str, Any], total: int, warmup_share: float) -> None:
    config = resolve(tiny_recipe, {"optim.warmup_share": warmup_share, "optim.final_share": 0.02})
    rates = [engines.schedule(step, total, config) for step in range(total + 1)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1)
    assert rates[0] > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= max(1, round(warmup_share * total))
    assert rates[-1] == pytest.approx(0.02 if total > 1 else 1)


def test_deepspeeds_settings_follow_from_the_config(tiny_recipe: dict[str, Any]) -> None:
    config = resolve(
        tiny_recipe,
        {"train.micro_batch": 7, "train.accumulation": 3, "optim.clip_norm": 0.5, "optim.betas": [0.8, 0.9],
         "zero.stage": 2, "train.precision": "bf16", "cluster.workers": 2},
    )  # fmt: skip
    settings = engines.zero_config(config)
    assert settings["train_micro_batch_size_per_gpu"] == 7
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["optimizer"]["params"]["betas"] == [0.8, 0.9]
    assert "train_batch_size" not in settings  # follows from the number of workers
    json.dumps(settings)


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", False), ("bf16", True)])
def test_the_precision_asked_for(tiny_recipe: dict[str, Any], precision: str, wanted: bool) -> None:
    assert engines.use_bf16(resolve(tiny_recipe, {"train.precision": precision})) == wanted


def test_by_itself_a_cpu_computes_in_fp32(tiny_recipe: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        assert not engines.use_bf16(resolve(tiny_recipe, {"train.precision": "auto"}))


# ---------------------------------------------------------------------------------------------- computing

Make = Callable[..., tuple[Engine, Config]]


def build(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[MultimodalModel, Config]:
    config = resolve(raw, {"model.dropout": 0.0, "optim.clip_norm": 1e6, **overrides})
    encoder = text.load_encoder(config.model.backbone)
    torch.manual_seed(0)
    model = MultimodalModel(config.model, classify(LABELS), encoder.width, encoder)
    freeze.apply(model, "top:1")
    return model.eval(), config  # without dropout: two passes must be comparable


@pytest.fixture
def make(tiny_recipe: dict[str, Any]) -> Make:
    def engine(overrides: Mapping[str, Any] | None = None) -> tuple[Engine, Config]:
        model, config = build(tiny_recipe, overrides or {})
        return TorchEngine(model, freeze.groups(model, config), config), config

    return engine


@pytest.fixture
def batches(tiny_recipe: dict[str, Any], make_records: Callable[..., list[Record]]) -> Callable[[int], list[Batch]]:
    """16 records in batches of a size."""
    config = resolve(tiny_recipe, {})
    inputs = Inputs(config.model, config.data, text.load_tokenizer(config.model.backbone), classify(LABELS))
    samples = [inputs.sample(record) for record in make_records(16)]
    return lambda size: [inputs.batch(samples[at : at + size]) for at in range(0, 16, size)]


def train(engine: Engine, config: Config, batches: list[Batch], rate: float = 1.0) -> list[float]:
    losses = []
    for batch in batches:
        engine.set_lr(rate)
        batch = {key: value.to(engine.device) for key, value in batch.items()}
        loss = cross_entropy(
            engine.forward(batch)["classify"], batch["classify/label"], batch["weight"], config.train.micro_batch
        )
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-4, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 2), (4, 4)])
def test_small_batches_accumulated_are_one_big_batch(
    make: Make, batches: Callable[[int], list[Batch]], micro: int, accumulation: int
) -> None:
    whole, one = make({"train.micro_batch": 16})
    parts, many = make({"train.micro_batch": micro, "train.accumulation": accumulation})
    before = parts.state()
    first = {name: value.clone() for name, value in before.items()}
    small = batches(micro)
    train(parts, many, small[:-1])
    assert_same(parts.state(), first)  # nothing moves before the accumulation is full
    train(parts, many, small[-1:])
    train(whole, one, batches(16))
    # Adam divides by the gradient's size: where that is next to nothing, rounding decides. Hence the tolerance; and a
    # bias that all keys of an attention share moves no answer: its gradient is rounding and nothing else.
    found, wanted = ({k: v for k, v in part.state().items() if not k.endswith("qkv.bias")} for part in (parts, whole))
    assert_same(found, wanted, atol=2e-4)
    assert any(not torch.equal(value, first[name]) for name, value in whole.state().items())


def test_it_goes_on_where_it_was_saved(make: Make, batches: Callable[[int], list[Batch]], tmp_path: Path) -> None:
    settings = {"train.micro_batch": 4, "train.accumulation": 2}
    engine, config = make(settings)
    train(engine, config, batches(4)[:3])  # in the middle of an accumulation's pair, the moments of Adam are filled
    train(engine, config, batches(4)[:1])
    engine.save(tmp_path)
    wanted = train(engine, config, batches(4))
    other, _ = make(settings)
    other.load(tmp_path)
    assert train(other, config, batches(4)) == pytest.approx(wanted, abs=1e-6)
    assert_same(other.state(), engine.state())


def test_each_group_keeps_its_share_of_the_rate(make: Make, batches: Callable[[int], list[Batch]]) -> None:
    engine, config = make({"train.micro_batch": 16, "optim.lr": 0.1, "optim.lr_towers": 0.3})
    assert engine.set_lr(0.5) == pytest.approx(0.15)
    still, _ = make({"train.micro_batch": 16})
    before = {name: value.clone() for name, value in still.state().items()}
    train(still, config, batches(16), rate=0.0)
    assert_same(still.state(), before)


def test_bf16_trains_mixed_batches(make: Make, batches: Callable[[int], list[Batch]]) -> None:
    exact, config = make({"train.micro_batch": 8, "train.precision": "fp32"})
    half, _ = make({"train.micro_batch": 8, "train.precision": "bf16"})
    wanted = train(exact, config, batches(8) * 3)
    assert train(half, config, batches(8) * 3) == pytest.approx(wanted, abs=0.1)
    assert {value.dtype for value in half.state().values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- ZeRO

ZERO = """
import json, sys, torch
torch.set_num_threads(1)
from jobs import engine as engines
from mmagent import freeze
from mmagent.tasks.classify import cross_entropy
from tests.conftest import classify
from tests.test_engine import build, train
raw, batches, out = torch.load(sys.argv[1], weights_only=True)
found = {}
for precision, stage in (("fp32", 1), ("bf16", 1), ("fp32", 3)):
    settings = {"train.micro_batch": 8, "train.accumulation": 2, "train.precision": precision, "zero.stage": stage}
    model, config = build(raw, settings)
    engine = engines.make(model, freeze.groups(model, config), config)
    model.eval()
    found[f"{precision}-{stage}"] = (train(engine, config, batches), engine.state())
torch.save(found, out)
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_zero_computes_what_torch_computes(
    make: Make, batches: Callable[[int], list[Batch]], tiny_recipe: dict[str, Any], tmp_path: Path, port: int
) -> None:
    given, out = tmp_path / "given.pt", tmp_path / "out.pt"
    torch.save((tiny_recipe, batches(8) * 2, str(out)), given)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ZERO, str(given)], cwd=Path(__file__).parents[1], env={**os.environ, **group},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = torch.load(out, weights_only=True)
    for key in ("fp32-1", "bf16-1", "fp32-3"):
        precision, _ = key.split("-")
        engine, config = make({"train.micro_batch": 8, "train.accumulation": 2, "train.precision": precision})
        wanted = train(engine, config, batches(8) * 2)
        losses, state = found[key]
        assert losses == pytest.approx(wanted, abs=1e-4 if precision == "fp32" else 0.02), key
        assert_same(state, engine.state(), atol=5e-4 if precision == "fp32" else 5e-3)
