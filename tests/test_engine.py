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
from jobs import zero
from jobs.engine import Engine, TorchEngine
from mmagent import freeze, text
from mmagent.batch import Inputs
from mmagent.config import Config, ConfigError, resolve
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


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.8682, 0.55, 0.2318, 0.1]),  # 0.1 + 0.9 (1 + cos(pi t)) / 2
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_each_schedule_by_hand(tiny_recipe: dict[str, Any], schedule: str, rates: list[float]) -> None:
    settings = {"optim.schedule": schedule, "optim.warmup_share": 1 / 3, "optim.final_share": 0.1}
    config = resolve(tiny_recipe, settings)
    assert [engines.schedule(step, 6, config) for step in range(7)] == pytest.approx(rates, abs=1e-4)


def test_deepspeeds_settings_follow_from_the_config(tiny_recipe: dict[str, Any]) -> None:
    config = resolve(
        tiny_recipe,
        {"train.micro_batch": 7, "train.accumulation": 3, "optim.clip_norm": 0.5, "zero.stage": 2,
         "train.precision": "bf16", "cluster.workers": 2},
    )  # fmt: skip
    settings = zero.zero_config(config, 2, torch.nn.Linear(3, 4))
    assert settings["train_micro_batch_size_per_gpu"] == 7
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["reduce_bucket_size"] == 16
    assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 4
    assert "optimizer" not in settings  # the one of plain torch is handed over
    assert "train_batch_size" not in settings  # follows from the number of workers
    json.dumps(settings)


def test_passes_follow_from_the_workers_that_there_are(tiny_recipe: dict[str, Any]) -> None:
    config = resolve(tiny_recipe, {"train.micro_batch": 4, "train.accumulation": 3, "cluster.workers": 2})
    found = {
        world: zero.zero_config(config, world, torch.nn.Linear(3, 4))["gradient_accumulation_steps"]
        for world in (1, 2, 3, 5)
    }
    assert found == {1: 6, 2: 3, 3: 2, 5: 2}  # 24 rows: 24, 12, 8 and 5 of a worker


@pytest.mark.parametrize(
    ("stage", "offload", "wanted"),
    [(1, "optimizer", {"offload_optimizer"}), (3, "parameters", {"offload_optimizer", "offload_param"})],
)
def test_what_is_offloaded(tiny_recipe: dict[str, Any], stage: int, offload: str, wanted: set[str]) -> None:
    config = resolve(tiny_recipe, {"zero.stage": stage, "zero.offload": offload})
    settings = zero.zero_config(config, 1, torch.nn.Linear(3, 4))["zero_optimization"]
    assert {key for key in settings if key.startswith("offload")} == wanted
    assert all(settings[key]["device"] == "cpu" for key in wanted)


@pytest.mark.parametrize(("stage", "offload"), [(0, "optimizer"), (2, "parameters")])
def test_offload_that_a_stage_cannot_is_refused(tiny_recipe: dict[str, Any], stage: int, offload: str) -> None:
    with pytest.raises(ConfigError, match=f"zero.offload={offload} needs"):
        resolve(tiny_recipe, {"zero.stage": stage, "zero.offload": offload})


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", False), ("bf16", True)])
def test_the_precision_asked_for(tiny_recipe: dict[str, Any], precision: str, wanted: bool) -> None:
    assert engines.use_bf16(resolve(tiny_recipe, {"train.precision": precision})) == wanted


def test_by_itself_a_cpu_computes_in_fp32(tiny_recipe: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        assert not engines.use_bf16(resolve(tiny_recipe, {"train.precision": "auto"}))


# ---------------------------------------------------------------------------------------------- computing

Make = Callable[..., tuple[Engine, Config]]


def build(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[MultimodalModel, Config]:
    settings = {"model.dropout": 0.0, "optim.clip_norm": 1e6, "freeze.strategy": "top:1", **overrides}
    config = resolve(raw, settings)
    encoder = text.load_encoder(config.model.backbone, dropout=config.model.backbone_dropout)
    torch.manual_seed(0)
    model = MultimodalModel(config.model, classify(LABELS), encoder.width, encoder)
    freeze.apply(model, config.freeze)
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


def train(engine: Engine, config: Config, batches: list[Batch], rate: float = 1.0, stage: int = 0) -> list[float]:
    losses = []
    for batch in batches:
        engine.set_lr(rate, stage)
        batch = {key: value.to(engine.device) for key, value in batch.items()}
        loss = cross_entropy(
            engine.forward(batch)["classify"], batch["classify/label"], batch["weight"], config.train.micro_batch
        )
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """Of plain torch, which makes no files."""
    return engine.state(Path())


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-4, msg=f"{name}: {{}}".format)


def without_key_biases(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A bias that all keys of an attention share moves no answer: its gradient is rounding and nothing else, and Adam,
    which divides by the gradient's size, makes whole steps of it."""
    out = {name: value for name, value in state.items() if not name.endswith("key.bias")}
    for name, value in out.items():
        if name.endswith("qkv.bias"):
            query, _, values = value.chunk(3)
            out[name] = torch.cat([query, values])
    return out


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 2), (4, 4)])
def test_small_batches_accumulated_are_one_big_batch(
    make: Make, batches: Callable[[int], list[Batch]], micro: int, accumulation: int
) -> None:
    whole, one = make({"train.micro_batch": 16})
    parts, many = make({"train.micro_batch": micro, "train.accumulation": accumulation})
    before = state(parts)
    first = {name: value.clone() for name, value in before.items()}
    small = batches(micro)
    train(parts, many, small[:-1])
    assert_same(state(parts), first)  # nothing moves before the accumulation is full
    train(parts, many, small[-1:])
    train(whole, one, batches(16))
    # Adam divides by the gradient's size: where that is next to nothing, rounding decides. Hence the tolerance.
    assert_same(without_key_biases(state(parts)), without_key_biases(state(whole)), atol=2e-4)
    assert any(not torch.equal(value, first[name]) for name, value in state(whole).items())


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
    assert_same(state(other), state(engine))


def test_each_group_keeps_its_share_of_the_rate(make: Make, batches: Callable[[int], list[Batch]]) -> None:
    engine, config = make({"train.micro_batch": 16, "optim.lr": 0.1, "optim.lr_towers": 0.3})
    assert engine.set_lr(0.5) == pytest.approx(0.15)
    still, _ = make({"train.micro_batch": 16})
    before = {name: value.clone() for name, value in state(still).items()}
    train(still, config, batches(16), rate=0.0)
    assert_same(state(still), before)


def test_bf16_trains_mixed_batches(make: Make, batches: Callable[[int], list[Batch]]) -> None:
    exact, config = make({"train.micro_batch": 8, "train.precision": "fp32"})
    half, _ = make({"train.micro_batch": 8, "train.precision": "bf16"})
    wanted = train(exact, config, batches(8) * 3)
    assert train(half, config, batches(8) * 3) == pytest.approx(wanted, abs=0.1)
    assert {value.dtype for value in state(half).values()} == {torch.float32}


def test_the_clipped_gradient_has_the_norm_asked_for(make: Make, batches: Callable[[int], list[Batch]]) -> None:
    settings = {"train.micro_batch": 16, "optim.name": "sgd", "optim.momentum": 0.0, "optim.weight_decay": 0.0}
    moved = []
    for norm in (1e6, 1e-3):
        engine, config = make({**settings, "optim.clip_norm": norm, "optim.lr": 1.0, "optim.lr_backbone": 1.0})
        before = {name: value.clone() for name, value in state(engine).items()}
        train(engine, config, batches(16))
        change = [(value - before[name]).double().flatten() for name, value in state(engine).items()]
        moved.append(torch.cat(change))
    free, clipped = moved
    assert float(clipped.norm()) == pytest.approx(1e-3, rel=1e-2)
    assert float(free.norm()) > 1e-2
    assert float(torch.nn.functional.cosine_similarity(free, clipped, dim=0)) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------------------------------------- ZeRO

CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"zero.stage": 0},
    "stage 0, LoRA, clipped": {
        "zero.stage": 0,
        "freeze.strategy": "lora:2",
        "optim.lr_backbone": 0.01,
        "optim.clip_norm": 0.05,
    },
    "stage 1": {"zero.stage": 1},
    "stage 1, bf16": {"zero.stage": 1, "train.precision": "bf16"},
    "stage 3": {"zero.stage": 3},
    "SGD": {"zero.stage": 2, "optim.name": "sgd", "optim.lr": 0.1, "optim.weight_decay": 0.1, "optim.layer_decay": 0.5},
    "clipped": {"zero.stage": 1, "optim.name": "sgd", "optim.lr": 0.1, "optim.clip_norm": 0.05},
    "LoRA": {"zero.stage": 1, "freeze.strategy": "lora:2", "optim.lr_backbone": 0.01},
    "LoRA, stage 3": {"zero.stage": 3, "freeze.strategy": "lora:2", "optim.lr_backbone": 0.01},
    "gradual": {"zero.stage": 1, "freeze.strategy": "gradual", "optim.name": "sgd", "optim.lr": 0.1},
    "gradual, stage 3": {"zero.stage": 3, "freeze.strategy": "gradual", "optim.name": "sgd", "optim.lr": 0.1},
    "gradual, AdamW": {"zero.stage": 2, "freeze.strategy": "gradual", "optim.lr_backbone": 1e-3},
    # Steps of three micro-batches, then of one, where the config counts on two.
    **{f"stage {stage}, as many as fit": {"zero.stage": stage, "train.micro_tokens": 500} for stage in range(4)},
    "again": {"zero.stage": 2, "freeze.strategy": "all", "train.gradient_checkpointing": True},
}
ZERO = """
import sys, tempfile, torch
from pathlib import Path
torch.set_num_threads(1)
from jobs import engine as engines
from tests.test_engine import CASES, run
raw, batches, out = torch.load(sys.argv[1], weights_only=True)
found = {}
for name in CASES:
    with tempfile.TemporaryDirectory() as folder:
        found[name] = run(raw, batches, CASES[name], engines.make, Path(folder))
torch.save(found, out)
"""


def copy_of(engine: Engine, folder: Path) -> dict[str, torch.Tensor]:
    """Its state as it is now: what an engine gives may be the weights themselves, which train and are loaded into."""
    return {name: value.clone() for name, value in engine.state(folder).items()}


def run(
    raw: Mapping[str, Any],
    batches: list[Batch],
    settings: Mapping[str, Any],
    kind: Callable[..., Engine],
    folder: Path,
) -> dict[str, Any]:
    """Losses and states of a short run: half of it, saved; the other half; and what the saved half is when loaded
    into the engine at the end, as the export does with the best checkpoint. A gradual run opens stages on the way."""
    model, config = build(raw, {"train.micro_batch": 8, "train.accumulation": 2, **settings})
    if config.train.gradient_checkpointing:
        freeze.compute_again(model)
    # A parameter without dimensions, as temperatures and gates of some checkpoints are.
    model.join.scale = torch.nn.Parameter(torch.tensor(1.1))
    model.join.norm.register_forward_hook(lambda module, arguments, out: out * model.join.scale)
    engine = kind(model, freeze.groups(model, config), config)
    out: dict[str, Any] = {"losses": [], "merged": None}
    for index in range(0, len(batches), 2):
        stage = freeze.stage(model, config.freeze, index, len(batches))
        freeze.thaw(model, config.freeze, stage)
        model.eval()
        if config.train.gradient_checkpointing:
            model.backbone.train()  # type: ignore[union-attr]  # its dropout is set to nothing
        step = batches[index : index + 2]
        if config.train.micro_tokens:
            step = [*step, batches[0]] if index % 4 else step[:1]
            engine.begin(len(step))
        for batch in step:
            out["losses"] += train(engine, config, [batch], stage=stage)
        if index + 2 == len(batches) // 2:
            engine.save(folder)
            out["half"] = copy_of(engine, folder)
    out["state"] = copy_of(engine, folder)
    engine.load(folder)
    out["loaded"] = copy_of(engine, folder)
    return out


@pytest.fixture
def port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.long
def test_zero_computes_what_torch_computes(
    batches: Callable[[int], list[Batch]], tiny_recipe: dict[str, Any], tmp_path: Path, port: int
) -> None:
    given, out = tmp_path / "given.pt", tmp_path / "out.pt"
    raw = {**tiny_recipe, "model": {**tiny_recipe["model"], "backbone_dropout": 0.0}}
    torch.save((raw, batches(8) * 4, str(out)), given)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", ZERO, str(given)], cwd=Path(__file__).parents[1], env={**os.environ, **group},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = torch.load(out, weights_only=True)
    for name, settings in CASES.items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        wanted, zero = run(raw, batches(8) * 4, settings, TorchEngine, folder), found[name]
        exact = settings.get("train.precision") != "bf16"
        assert zero["losses"] == pytest.approx(wanted["losses"], abs=2e-4 if exact else 0.02), name
        adam = settings.get("optim.name") != "sgd"
        ours, theirs = (without_key_biases(each) if adam else each for each in (zero["state"], wanted["state"]))
        assert_same(ours, theirs, atol=5e-4 if exact else 5e-3)
        assert_same(zero["loaded"], zero["half"], atol=0 if exact else 1e-6)
        assert_same(wanted["loaded"], wanted["half"], atol=0)
        assert any(not torch.equal(zero["state"][key], value) for key, value in zero["half"].items()), name
