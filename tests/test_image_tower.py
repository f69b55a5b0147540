"""Pretrained image towers: every family sees pictures as its own processor and model do, each alone; a bundle holds it.

The checkpoints are tiny, of random weights, made as Transformers saves them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from mmagent import bundle, pictures, text
from mmagent.calibration import Calibration
from mmagent.config import ImageTowerConfig, resolve
from mmagent.media import Limits
from mmagent.model import MultimodalModel
from mmagent.predictor import Predictor
from mmagent.pretrained import BackboneError
from mmagent.record import Record
from mmagent.towers import PretrainedImageTower, image_tower
from tests.conftest import classify

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {**SMALL, "image_size": 32, "patch_size": 8}
WORDS = {**SMALL, "vocab_size": 50, "max_position_embeddings": 16}
SQUARE = {"size": {"height": 32, "width": 32}}
# model's and processor's class, their settings; states of a picture: before the grid's, and the grid's side
FAMILIES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int, int]] = {
    "vit": ("ViT", PATCHES, "ViTImageProcessor", SQUARE, 1, 4),
    "clip": (
        "CLIP", {"text_config": WORDS, "vision_config": PATCHES}, "CLIPImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, 1, 4,
    ),
    "siglip": ("Siglip", {"text_config": WORDS, "vision_config": PATCHES}, "SiglipImageProcessor", SQUARE, 0, 4),
    "dinov2": (
        "Dinov2", PATCHES, "BitImageProcessor",
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, 1, 4,
    ),
    "dinov2 with registers": (
        "Dinov2WithRegisters", {**PATCHES, "num_register_tokens": 4}, "BitImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, 5, 4,
    ),
    "convnext": (
        "ConvNext", {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4}, "ConvNextImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_pct": 0.875}, 0, 2,
    ),
    "resnet": (
        "ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4}, "ConvNextImageProcessor",
        {"size": {"shortest_edge": 64}}, 0, 2,
    ),
    "swin": (
        "Swin", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2],
                 "window_size": 4, "drop_path_rate": 0.0}, "ViTImageProcessor", SQUARE, 0, 4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint("vit")``: a folder with config, weights and processor config."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            name, settings, processor, fitting, *_ = FAMILIES[family]
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
            for parameter in model.parameters():  # some begin as zeros, and so would hide what they do
                torch.nn.init.normal_(parameter, std=0.2)
            made[family] = tmp_path_factory.mktemp("towers") / family
            model.save_pretrained(made[family])
            document = {"image_processor_type": processor, **fitting}
            (made[family] / "preprocessor_config.json").write_text(json.dumps(document))
        return made[family]

    return make


def photograph(seed: int, size: tuple[int, int] = (70, 50)) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(noise, "RGB").resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def seen(config: ImageTowerConfig, *seeds: int) -> torch.Tensor:
    made = pictures.of(config)
    return made.stack([made.pixels(photograph(seed), Limits()) for seed in seeds])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_is_seen_as_by_the_checkpoints_own_processor_and_model(
    checkpoint: Callable[[str], Path], family: str
) -> None:
    *_, extra, side = FAMILIES[family]
    config = ImageTowerConfig(checkpoint=str(checkpoint(family)), width=32, tokens=4)
    tower = image_tower(config).eval()
    assert isinstance(tower, PretrainedImageTower)
    assert (tower.extra, tower.grid) == (extra, (side, side))

    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint(family), backend="pil")
    whole = transformers.AutoModel.from_pretrained(checkpoint(family)).eval()
    values = processor(Image.open(io.BytesIO(photograph(1))), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen(config, 1), values, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        states = getattr(whole, "vision_model", whole)(pixel_values=values).last_hidden_state
        grid = states if states.ndim == 4 else states[:, extra:].mT.reshape(1, -1, side, side)
        pooled = F.adaptive_avg_pool2d(grid, 2).flatten(2).mT
        wanted = tower.project(pooled, states[:, 0] if extra else None)
        torch.testing.assert_close(tower(seen(config, 1)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_picture_is_seen_alone_in_training_too(checkpoint: Callable[[str], Path], family: str) -> None:
    """A batch norm that learned of its batch would let neighbours in."""
    dropout = None if family in ("convnext", "resnet") else 0.0  # those have none to set
    config = ImageTowerConfig(checkpoint=str(checkpoint(family)), width=32, tokens=4, dropout=dropout)
    tower, stack = image_tower(config).train(), seen(config, 1, 2, 3)
    with torch.no_grad():
        together = tower(stack)
        assert together.shape == (3, 4, 32)
        for index in range(3):
            torch.testing.assert_close(
                tower(stack[index : index + 1]), together[index : index + 1], atol=1e-4, rtol=1e-3
            )
        assert not torch.allclose(together[0], together[1], atol=1e-3)  # ten times what alone and together may differ


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_trains_gets_a_gradient(checkpoint: Callable[[str], Path], family: str) -> None:
    """A pooler, a mask token or a text part, which nothing reads, is none of the parameters."""
    config = ImageTowerConfig(checkpoint=str(checkpoint(family)), width=32, tokens=4)
    tower = image_tower(config).train()
    out = tower(seen(config, 1, 2))
    (out * torch.randn_like(out)).sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []
    assert len([p for p in tower.model.parameters() if p.grad.any()]) > 10  # type: ignore[union-attr]


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (9, 9), (16, 16), (49, 16)])
def test_more_tokens_than_there_are_gives_all_there_are(
    checkpoint: Callable[[str], Path], tokens: int, count: int
) -> None:
    config = ImageTowerConfig(checkpoint=str(checkpoint("vit")), width=64, tokens=tokens)
    assert image_tower(config)(seen(config, 1)).shape == (1, count, 64)


def test_where_there_is_no_picture_one_stands_in(checkpoint: Callable[[str], Path]) -> None:
    config = ImageTowerConfig(checkpoint=str(checkpoint("clip")), width=32, tokens=4)
    stack = pictures.of(config).stack([])
    assert stack.shape == (1, 3, 32, 32)
    assert image_tower(config)(stack).isfinite().all()


@pytest.mark.parametrize("dropout", [None, 0.0, 0.5])
def test_dropout_is_set_from_the_config(checkpoint: Callable[[str], Path], dropout: float | None) -> None:
    config = ImageTowerConfig(checkpoint=str(checkpoint("vit")), width=32, tokens=4, dropout=dropout)
    tower, stack = image_tower(config).train(), seen(config, 1)
    assert torch.equal(tower(stack), tower(stack)) == (dropout != 0.5)


def test_the_weights_are_the_checkpoints_unless_they_come_from_elsewhere(checkpoint: Callable[[str], Path]) -> None:
    config = ImageTowerConfig(checkpoint=str(checkpoint("siglip")), width=32, tokens=4)
    saved = transformers.AutoModel.from_pretrained(checkpoint("siglip")).vision_model.state_dict()
    loaded, fresh = image_tower(config), image_tower(config, weights=False)
    assert isinstance(loaded, PretrainedImageTower)
    assert isinstance(fresh, PretrainedImageTower)
    assert loaded.model.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.model.state_dict().items())
    name = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(dict(fresh.model.named_parameters())[name], saved[name])
    assert fresh.state_dict().keys() == loaded.state_dict().keys()


# ------------------------------------------------------------------------------------------------------- bundle


@pytest.mark.parametrize("family", ["clip", "convnext"])
def test_a_bundle_answers_as_before_without_the_checkpoint(
    checkpoint: Callable[[str], Path],
    family: str,
    tmp_path: Path,
    tiny_recipe: dict[str, Any],
    make_records: Callable[..., list[Record]],
) -> None:
    own = tmp_path / "tower"
    shutil.copytree(checkpoint(family), own)
    config = resolve(tiny_recipe, {"model.image.checkpoint": str(own), "model.audio": None})
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    torch.manual_seed(0)
    tasks = classify(("a", "b", "c", "d"))
    model = MultimodalModel(config.model, tasks, encoder.width, None)
    with torch.no_grad():
        for parameter in model.parameters():  # as if it had been trained
            parameter.add_(torch.randn_like(parameter) * 0.01)
    parts: dict[str, Any] = {"name": "b", "config": config, "task": "classify", "tokenizer": tokenizer}
    bundle.save(
        tmp_path / "b", tasks={name: task.info for name, task in tasks.items()}, state=model.state_dict(),
        backbone=encoder, calibration={"classify": Calibration()}, origin={}, **parts,
    )  # fmt: skip
    records = [record for record in make_records(12) if not record.audios]
    before = Predictor(**parts, tasks=tasks, model=model, encoder=encoder, device="cpu")
    wanted = before.raws([before.prepare(record) for record in records])
    shutil.rmtree(own)
    after = Predictor.load((tmp_path / "b").rename(tmp_path / "elsewhere"), device="cpu")
    np.testing.assert_array_equal(after.raws([after.prepare(record) for record in records]), wanted)
    assert {"config.json", "preprocessor_config.json"} <= {
        file.name for file in (tmp_path / "elsewhere" / "towers" / "image").iterdir()
    }


# ------------------------------------------------------------------------------------------------------- errors


def damage(folder: Path, **settings: Any) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (lambda own: (own / "preprocessor_config.json").unlink(), "has no image processor: preprocessor_config.json"),
        (lambda own: (own / "model.safetensors").unlink(), "has no weights: *.safetensors"),
        (lambda own: (own / "config.json").unlink(), "has no config.json"),
        (lambda own: (own / "config.json").write_text("{"), "cannot be loaded (model.image.checkpoint)"),
        (lambda own: damage(own, size={"height": 48, "width": 48}), "cannot be loaded (model.image.checkpoint)"),
        (lambda own: damage(own, size={"shortest_edge": 32}), "makes pictures of different sizes ("),
        (lambda own: damage(own, image_processor_type="NoSuchProcessor"), "cannot be loaded (model.image.checkpoint)"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_told(
    checkpoint: Callable[[str], Path], tmp_path: Path, break_: Callable[[Path], Any], words: str
) -> None:
    own = Path(shutil.copytree(checkpoint("vit"), tmp_path / "own"))
    break_(own)
    with pytest.raises(BackboneError) as error:
        image_tower(ImageTowerConfig(checkpoint=str(own), tokens=4))
    assert words in str(error.value)
    assert str(own) in str(error.value)


def test_a_language_model_is_no_image_tower(
    tiny_backbone: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    own = Path(shutil.copytree(tiny_backbone, tmp_path / "own"))
    shutil.copy(checkpoint("vit") / "preprocessor_config.json", own)
    with pytest.raises(BackboneError, match="is no vision model: BertModel takes") as error:
        image_tower(ImageTowerConfig(checkpoint=str(own), tokens=4))
    assert "but pixel_values is wanted" in str(error.value)


def test_a_hub_id_out_of_reach_is_told_with_its_key(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="cannot be fetched") as error:
        image_tower(ImageTowerConfig(checkpoint="nobody/no-such-tower", tokens=4))
    assert "model.image.checkpoint=/path/to/folder" in str(error.value)
