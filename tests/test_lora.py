"""LoRA: products stand beside the linear layers of the blocks, and a merged model answers as the adapted one did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs import supervised
from jobs.engine import TorchEngine
from mmagent import Predictor, bundle, freeze, lora, text
from mmagent.batch import Inputs
from mmagent.calibration import Calibration
from mmagent.config import Config, resolve
from mmagent.model import MultimodalModel
from mmagent.record import Record
from tests.conftest import classify

LABELS = ("black", "blue", "green", "red")
KINDS = ("encoder", "decoder", "transposed", "encoder-decoder")
Trained = Callable[[str], tuple[TorchEngine, Config, list[Record]]]


@pytest.fixture
def trained(
    tiny_recipe: dict[str, Any], tiny_backbones: dict[str, Path], make_records: Callable[..., list[Record]]
) -> Trained:
    """An adapted model of a kind after a few steps, large enough to see, and records to ask."""

    def make(kind: str) -> tuple[TorchEngine, Config, list[Record]]:
        config = resolve(
            tiny_recipe,
            {"model.backbone": str(tiny_backbones[kind]), "freeze.strategy": "lora:3", "freeze.lora_dropout": 0.1,
             "optim.lr_backbone": 0.05, "train.micro_batch": 8},
        )  # fmt: skip
        model = supervised.build(config, classify(LABELS), text.load_encoder(config.model.backbone))
        engine = TorchEngine(model, freeze.groups(model, config), config)
        inputs = Inputs(config.model, config.data, text.load_tokenizer(config.model.backbone), classify(LABELS))
        records = make_records(8)
        batch = inputs.batch([inputs.sample(record) for record in records])
        for _ in range(4):
            engine.backward(supervised.loss_of(engine.forward(batch), batch, inputs.tasks, config))
            engine.step()
        return engine, config, records

    return make


def logits_of(model: MultimodalModel, config: Config, records: list[Record]) -> Tensor:
    inputs = Inputs(config.model, config.data, text.load_tokenizer(config.model.backbone), classify(LABELS))
    with torch.no_grad():
        return model.eval()(inputs.batch([inputs.sample(record) for record in records]))["classify"]


@pytest.mark.parametrize("kind", KINDS)
def test_products_stand_beside_the_linear_layers_of_the_blocks(trained: Trained, kind: str) -> None:
    engine, _, _ = trained(kind)
    backbone = engine.model.backbone
    assert backbone is not None
    wanted = {
        "encoder": {"query", "key", "value", "dense"}, "decoder": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
        "up_proj", "down_proj"}, "transposed": {"c_attn", "c_proj", "c_fc"}, "encoder-decoder": {"q", "k", "v", "o",
        "wi", "wo"},
    }  # fmt: skip
    adapted = [name for name, module in backbone.named_modules() if hasattr(module, "lora_A")]
    assert {name.rpartition(".")[2] for name in adapted} == wanted[kind]
    assert all(hasattr(backbone.get_submodule(name), "base_layer") for name in adapted)
    ranks = {p.shape[0] for name, p in backbone.named_parameters() if ".lora_A." in name}
    assert ranks == {3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_answers_as_the_adapted_model_did(trained: Trained, tmp_path: Path, kind: str) -> None:
    """The adapted model, its merged bundle, and peft's own merging agree; the model before training does not."""
    engine, config, records = trained(kind)
    wanted = logits_of(engine.model, config, records)

    weights = lora.merged(engine.model, engine.state(tmp_path))
    encoder = text.load_encoder(config.model.backbone, weights=False)
    before = text.load_encoder(config.model.backbone).state_dict()
    encoder.load({k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")})
    assert any(not torch.allclose(value, before[name], atol=1e-3) for name, value in encoder.state_dict().items())
    bundle.save(
        tmp_path / "merged", name="merged", config=config, backbone=encoder, task="classify",
        tasks={"classify": classify(LABELS)["classify"].info},
        state={key: value for key, value in weights.items() if not key.startswith("backbone.")},
        tokenizer=text.load_tokenizer(config.model.backbone), calibration={"classify": Calibration()}, origin={},
    )  # fmt: skip
    predictor = Predictor.load(tmp_path / "merged", device="cpu")
    given = torch.from_numpy(np.stack(predictor.raws([predictor.prepare(record) for record in records])))
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)

    for module in engine.model.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    torch.testing.assert_close(logits_of(engine.model, config, records), wanted, atol=1e-5, rtol=1e-4)
    for name, value in engine.model.state_dict().items():
        if name.endswith(".base_layer.weight"):
            torch.testing.assert_close(value, weights[name.replace(".base_layer", "")], atol=1e-6, rtol=1e-5)


def test_it_begins_where_the_pretrained_model_stands(tiny_recipe: dict[str, Any], trained: Trained) -> None:
    _, config, records = trained("encoder")
    plain = resolve(config.model_dump(mode="json"), {"freeze.strategy": "all"})
    models = [
        supervised.build(each, classify(LABELS), text.load_encoder(each.model.backbone)) for each in (config, plain)
    ]  # one seed, so the join and the head are the same
    torch.testing.assert_close(
        *(logits_of(model, config, records) for model in models if isinstance(model, MultimodalModel))
    )


def test_what_has_no_products_is_merged_as_it_is(tiny_recipe: dict[str, Any]) -> None:
    config = resolve(tiny_recipe, {"freeze.strategy": "all"})
    model = supervised.build(config, classify(LABELS), text.load_encoder(config.model.backbone))
    assert lora.merged(model, model.state_dict()).keys() == model.state_dict().keys()
