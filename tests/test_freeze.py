"""Freezing: exactly what a strategy names moves, at its rate; the rest stays bit for bit, in evaluation mode, without
gradients and without state of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs import supervised
from jobs.engine import TorchEngine
from mmagent import freeze, text
from mmagent.batch import Inputs
from mmagent.config import Config, ConfigError, resolve
from mmagent.model import Batch, MultimodalModel
from mmagent.record import Record
from mmagent.text import TextEncoder
from mmagent.towers import ImageTower
from tests.conftest import classify

LABELS = ("black", "blue", "green", "red")
BLOCKS = {
    "encoder": "backbone.model.encoder.layer.",
    "decoder": "backbone.model.layers.",
    "encoder-decoder": "backbone.model.block.",
}
STRATEGIES = (
    "head", "connector", "top:1", "towers", "image_tower", "audio_tower", "bias", "lora:2", "all", "gradual",
)  # fmt: skip
Make = Callable[..., tuple[MultimodalModel, Config]]


@pytest.fixture
def make(tiny_recipe: dict[str, Any], tiny_backbones: dict[str, Path]) -> Make:
    """``make(strategy, overrides, kind)``: a model with its language model inside, whatever the strategy."""

    def build(
        strategy: str, overrides: Mapping[str, Any] | None = None, kind: str = "encoder"
    ) -> tuple[MultimodalModel, Config]:
        config = resolve(
            tiny_recipe,
            {"model.backbone": str(tiny_backbones[kind]), "freeze.strategy": strategy, "train.cache": "none",
             "train.micro_batch": 8, "optim.lr": 0.01, **(overrides or {})},
        )  # fmt: skip
        encoder = text.load_encoder(config.model.backbone, dropout=config.model.backbone_dropout)
        model = supervised.build(config, classify(LABELS), encoder)
        assert isinstance(model, MultimodalModel)
        return model, config

    return build


@pytest.fixture
def batch(tiny_recipe: dict[str, Any], make_records: Callable[..., list[Record]]) -> Batch:
    """8 records: words, pictures and sounds."""
    config = resolve(tiny_recipe, {})
    inputs = Inputs(config.model, config.data, text.load_tokenizer(config.model.backbone), classify(LABELS))
    return inputs.batch([inputs.sample(record) for record in make_records(8)])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def step(engine: TorchEngine, config: Config, batch: Batch, number: int = 0, total: int = 10) -> None:
    """One step of the loop."""
    stage = freeze.stage(engine.model, config.freeze, number, total)
    freeze.thaw(engine.model, config.freeze, stage)
    engine.set_lr(1.0, stage)
    batch = {key: value.to(engine.device) for key, value in batch.items()}
    engine.backward(supervised.loss_of(engine.forward(batch), batch, classify(LABELS), config))
    engine.step()


def named(strategy: str, kind: str, names: list[str], step: int = 0) -> set[str]:
    """What the strategy's description names, by the checkpoints' own names. `step` of 10, for a gradual run."""
    backbone = {name for name in names if name.startswith("backbone.")}
    rest = set(names) - backbone
    block = BLOCKS[kind]
    if strategy == "head":
        return {name for name in rest if name.split(".")[0] in freeze.HEADS}
    if strategy == "towers":
        return backbone | {name for name in rest if name.split(".")[0] not in freeze.TOWERS}
    chosen: dict[str, set[str]] = {
        "top:1": {name for name in backbone if name.startswith(f"{block}1.")},
        "bias": {name for name in backbone if name.endswith(".bias")},
        "lora:2": {name for name in backbone if ".lora_" in name},
        "all": backbone,
        # Half of the run for three steps: the last layer, the first, the rest.
        "gradual": set().union(
            *({name for name in backbone if name.startswith(f"{block}{layer}.")} for layer in (1, 0)[: step // 2]),
        )
        if step < 5
        else backbone,
    }
    return rest | chosen.get(strategy, set())


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exactly_the_named_weights_move(make: Make, batch: Batch, kind: str, strategy: str) -> None:
    if (strategy, kind) == ("bias", "encoder-decoder"):  # T5 has none
        with pytest.raises(ValueError, match="has no biases"):
            make(strategy, None, kind)
        return
    model, config = make(strategy, None, kind)
    engine = TorchEngine(model, freeze.groups(model, config), config)
    before = state_of(model)
    wanted = named(strategy, kind, [name for name, _ in model.named_parameters()])
    # In the first step the outer matrix of a product is zero, and the inner one has no gradient but its decay.
    for _ in range(2 if strategy == "lora:2" else 1):
        step(engine, config, batch)
    after = state_of(model)
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == wanted
    learnt = {name for name, parameter in model.named_parameters() if parameter in engine._optimizer.state}
    assert learnt == wanted  # nothing else has moments


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_gradual_run_opens_from_the_top(make: Make, batch: Batch, kind: str) -> None:
    model, config = make("gradual", {"freeze.gradual_share": 0.6}, kind)
    engine = TorchEngine(model, freeze.groups(model, config), config)
    names = [name for name, _ in model.named_parameters()]
    stages = []
    for number in range(10):
        before = state_of(model)
        step(engine, config, batch, number)
        moved = {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}
        stage = freeze.stage(model, config.freeze, number, 10)
        assert moved == named("gradual", kind, names, (0, 2, 4, 10)[stage])
        stages.append(stage)
    assert stages == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]


def test_what_is_frozen_sends_no_gradient(make: Make, batch: Batch) -> None:
    for strategy in STRATEGIES:
        model, config = make(strategy)
        freeze.thaw(model, config.freeze, 0)
        supervised.loss_of(model(batch), batch, classify(LABELS), config).backward()
        wanted = named(strategy, "encoder", [name for name, _ in model.named_parameters()])
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == wanted, strategy


def test_what_is_frozen_computes_as_in_evaluation(make: Make, batch: Batch) -> None:
    """The tiny BERT's config asks for dropout: with it, two passes differ."""

    def differ(model: MultimodalModel) -> bool:
        assert model.backbone is not None
        return not torch.equal(*(model.backbone(batch["ids"], batch["mask"]) for _ in range(2)))

    still, _ = make("connector")
    assert not differ(still)
    moving, config = make("top:1")
    assert differ(moving)
    moving.eval()
    assert not differ(moving)
    freeze.set_modes(moving)  # as the loop does after a validation
    for module in moving.modules():
        if learns := [parameter.requires_grad for parameter in module.parameters()]:
            assert module.training == any(learns)
    assert moving.backbone is not None
    embeddings = moving.backbone.model.embeddings
    assert [module.training for module in embeddings.modules()] == [False] * len(list(embeddings.modules()))  # type: ignore[union-attr]
    assert all(module.training for module in moving.backbone.blocks()[1].modules())
    assert config.freeze.strategy == "top:1"


def test_the_statistics_of_a_frozen_tower_stand_still(make: Make, batch: Batch) -> None:
    for strategy, still in (("towers", True), ("connector", False)):
        model, config = make(strategy)
        assert model.image_tower is not None
        model.image_tower.stem_norm = nn.BatchNorm2d(model.image_tower.stem.channels)  # type: ignore[union-attr, arg-type]
        freeze.apply(model, config.freeze)
        before = state_of(model.image_tower)
        model(batch)
        after = state_of(model.image_tower)
        assert torch.equal(before["stem_norm.running_mean"], after["stem_norm.running_mean"]) == still


class Seeing(nn.Module):
    """A pretrained tower: a ViT, and the projector behind it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        self.model = ViTModel(
            ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
                patch_size=8, hidden_dropout_prob=0.1,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        self.project = nn.Linear(32, 32)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.project(self.model(pixel_values=pixels).last_hidden_state)
        return out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pretrained_tower_trains_where_it_is_named(make: Make, batch: Batch, strategy: str) -> None:
    model, config = make("head")
    model.image_tower = Seeing()
    config = resolve(config.model_dump(mode="json"), {"freeze.strategy": strategy})
    freeze.apply(model, config.freeze)
    engine = TorchEngine(model, freeze.groups(model, config), config)
    before = state_of(model.image_tower)
    step(engine, config, batch)
    after = state_of(model.image_tower)
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    whole = {"image_tower", "all"}
    nothing = {"head", "towers"}
    assert moved == ({"model", "project"} if strategy in whole else set() if strategy in nothing else {"project"})
    assert model.image_tower.model.training == (strategy in whole)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("strategy", "overrides", "says"),
    [
        ("top:3", {}, "the language model has 2 layers"),
        ("image_tower", {"model.image": None}, "give the section model.image"),
        ("audio_tower", {"model.audio": None}, "give the section model.audio"),
        ("lora:2", {"freeze.lora_parts": ["image_tower"]}, "no pretrained model in it"),
    ],
)
def test_what_a_model_has_not_is_named(make: Make, strategy: str, overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(strategy, overrides)


@pytest.mark.parametrize("strategy", ["", "top:0", "top:", "heads", "top:-1", "lora", "lora:0", "towers:1", "bias:2"])
def test_an_unknown_strategy_is_refused_with_the_config(tiny_recipe: dict[str, Any], strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"freeze\.strategy"):
        resolve(tiny_recipe, {"freeze.strategy": strategy})


def test_only_a_language_model_that_trains_must_be_inside() -> None:
    outside = {strategy for strategy in STRATEGIES if not freeze.needs_backbone(strategy)}
    assert outside == {"head", "connector", "image_tower", "audio_tower"}


# ---------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_groups_hold_each_trained_parameter_once(make: Make, strategy: str) -> None:
    model, config = make(strategy, {"optim.layer_decay": 0.5})
    grouped = [id(parameter) for group in freeze.groups(model, config) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({}, {"backbone": 0.1 / 5, "towers": 0.1, "rest": 0.1}),
        (
            {"optim.lr_backbone": 0.002, "optim.lr_towers": 0.3},
            {"backbone": 0.002, "towers": 0.3, "rest": 0.1},
        ),
    ],
)
def test_rates_and_decay_of_the_parts(make: Make, given: dict[str, float], rates: dict[str, float]) -> None:
    model, config = make("all", {"optim.lr": 0.1, "optim.weight_decay": 0.5, **given})
    groups = freeze.groups(model, config)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(rates)
    assert {group["name"]: group["peak_lr"] for group in groups} == pytest.approx(rates)
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}
    assert model.image_tower is not None
    towers = {id(p) for group in groups if group["name"] == "towers" for p in group["params"]}
    assert {id(p) for p in model.image_tower.parameters()} <= towers


def test_what_a_tower_learned_before_learns_on_slowly(make: Make) -> None:
    model, config = make("all", {"optim.lr": 0.1})
    tower = Seeing()
    model.image_tower = tower
    rates = {id(p): group["lr"] for group in freeze.groups(model, config) for p in group["params"]}
    assert {rates[id(p)] for p in tower.model.parameters()} == {0.1 * 0.1}
    assert {rates[id(p)] for p in tower.project.parameters()} == {0.1}
    told = resolve(config.model_dump(mode="json"), {"optim.lr_towers": 0.3})
    assert {g["lr"] for g in freeze.groups(model, told) if g["name"] == "towers"} == {0.3}


def test_a_tower_that_starts_from_a_pretraining_learns_on_slowly(make: Make, tmp_path: Path) -> None:
    model, config = make("connector", {"optim.lr": 0.1})
    started = resolve(config.model_dump(mode="json"), {"model.image.start": str(tmp_path)})
    groups = freeze.groups(model, started)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert model.image_tower is not None
    assert model.audio_tower is not None
    assert {rates[id(p)] for p in model.image_tower.parameters()} == {0.1 * 0.1}
    assert {rates[id(p)] for p in model.audio_tower.parameters()} == {0.1}


@pytest.mark.parametrize(
    ("kind", "below", "above"),
    [
        ("encoder", ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight"], []),
        ("decoder", ["embed_tokens.weight"], ["norm.weight"]),
        ("encoder-decoder", ["embed_tokens.weight"], ["final_layer_norm.weight"]),
    ],
)
def test_the_rate_falls_from_layer_to_layer(make: Make, kind: str, below: list[str], above: list[str]) -> None:
    model, config = make("all", {"optim.lr_backbone": 0.1, "optim.layer_decay": 0.5}, kind)
    rates = {id(p): group["peak_lr"] for group in freeze.groups(model, config) for p in group["params"]}
    assert isinstance(model.backbone, TextEncoder)
    for block, rate in zip(model.backbone.blocks(), (0.05, 0.1), strict=True):
        assert [rates[id(p)] for p in block.parameters()] == pytest.approx([rate] * len(list(block.parameters())))
    outside = dict(model.backbone.model.named_parameters())
    assert [rates[id(outside[name])] for name in below] == pytest.approx([0.025] * len(below))
    assert [rates[id(outside[name])] for name in above] == pytest.approx([0.1] * len(above))


# ---------------------------------------------------------------------------------------------- the table


def test_the_table_counts_each_part(make: Make) -> None:
    model, config = make("top:1")
    rows = {part.name: part for part in freeze.table(model)}
    assert list(rows) == [name for name, part in model.named_children() if list(part.parameters())]
    assert model.backbone is not None
    assert rows["backbone"].trained == sum(p.numel() for p in model.backbone.blocks()[1].parameters())
    assert sum(row.total for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert sum(row.trained for row in rows.values()) == sum(
        p.numel() for group in freeze.groups(model, config) for p in group["params"]
    )
    shown = freeze.show(tuple(rows.values())).splitlines()
    assert [line.split()[0] for line in shown] == ["part", *rows, "total"]
    assert shown[-1].endswith("%")


def test_the_table_has_a_row_for_a_language_model_outside(make: Make, tiny_recipe: dict[str, Any]) -> None:
    config = resolve(tiny_recipe, {})
    encoder = text.load_encoder(config.model.backbone)
    first = freeze.table(supervised.build(config, classify(LABELS), encoder), encoder)[0]
    assert first == freeze.Part("backbone", 0, sum(p.numel() for p in encoder.parameters()))
    inside, _ = make("connector")
    assert freeze.table(inside)[0] == first


# ---------------------------------------------------------------------------------------------- memory, dropout


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("strategy", ["all", "top:1", "lora:2"])
def test_computing_again_changes_no_gradient(make: Make, batch: Batch, kind: str, strategy: str) -> None:
    found = []
    for again in (False, True):
        overrides = {"train.gradient_checkpointing": again, "model.dropout": 0.0, "model.audio.dropout": 0.0}
        model, config = make(strategy, {**overrides, "model.backbone_dropout": 0.0}, kind)
        calls: list[int] = []
        assert model.backbone is not None
        # The inner layers run a second time where states are computed again.
        last = model.backbone.blocks()[1]
        inner = next(module for module in last.modules() if isinstance(module, nn.Linear))
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        supervised.loss_of(model(batch), batch, classify(LABELS), config).backward()
        found.append(({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(calls)))
    (kept, once), (computed, twice) = found
    assert (once, twice) == (1, 2)
    assert kept.keys() == computed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(computed[name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", [*BLOCKS, "transposed"])
def test_dropout_is_set_by_part(make: Make, kind: str) -> None:
    overrides = {"model.backbone_dropout": 0.35, "model.head_dropout": 0.25, "model.image.dropout": 0.15}
    model, _ = make("all", overrides, kind)
    assert model.backbone is not None
    config = model.backbone.model.config
    fields = {
        "encoder": ["hidden_dropout_prob", "attention_probs_dropout_prob"], "decoder": ["attention_dropout"],
        "encoder-decoder": ["dropout_rate"], "transposed": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
    }  # fmt: skip
    assert [getattr(config, field) for field in fields[kind]] == [0.35] * len(fields[kind])
    inside = [module.p for module in model.backbone.modules() if isinstance(module, nn.Dropout)]
    assert set(inside) <= {0.35}
    assert inside or kind == "decoder"  # Qwen's drops in the attention alone
    assert model.dropout.p == 0.25
    assert isinstance(model.image_tower, ImageTower)
    assert [block.dropout for block in model.image_tower.blocks] == [0.15]


def test_a_backbone_without_dropout_says_so(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaModel

    MambaModel(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4)).save_pretrained(tmp_path)
    with pytest.raises(text.BackboneError, match=r"model\.backbone_dropout=0\.1, but the config of .* has no dropout"):
        text.load_encoder(str(tmp_path), dropout=0.1)
