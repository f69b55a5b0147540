"""The contrast of pairs by hand: which is whose, what is no negative, what a batch without a pair does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmagent import alignment, text, towers
from mmagent.alignment import Alignment
from mmagent.config import resolve
from mmagent.pretrained import BackboneError


def batch_of(rows: int, real: list[bool], ids: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
    return {
        "ids": torch.tensor(ids or [[row + 1, 0] for row in range(rows)]),
        "mask": torch.ones(rows, 2, dtype=torch.long),
        "weight": torch.ones(rows), "has_words": torch.ones(rows, dtype=torch.bool),
        "image_row": torch.arange(len(real)), "image_real": torch.tensor(real),
    }  # fmt: skip


def out_of(media: torch.Tensor, words: torch.Tensor, scale: float = 10.0) -> dict[str, torch.Tensor]:
    return {"image": media.requires_grad_(), "words": words, "scale": torch.tensor(scale, requires_grad=True)}


def test_the_loss_is_cross_entropy_both_ways() -> None:
    torch.manual_seed(0)
    media, words = torch.randn(4, 8), torch.randn(4, 8)
    found = alignment.loss(out_of(media, words), batch_of(4, [True] * 4), 4)
    alike = F.normalize(media, dim=1) @ F.normalize(words - words.mean(0), dim=1).T * 10.0
    right = torch.arange(4)
    wanted = (F.cross_entropy(alike, right) + F.cross_entropy(alike.T, right)) / 2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    # The nominal size divides, not the number of pairs: half a batch counts half.
    assert alignment.loss(out_of(media, words), batch_of(4, [True] * 4), 8).item() == pytest.approx(wanted.item() / 2)


def test_equal_words_are_no_negatives() -> None:
    media = torch.eye(3)
    words = torch.stack([torch.eye(3)[0], torch.eye(3)[0], torch.eye(3)[2]])
    same = batch_of(3, [True] * 3, [[7, 0], [7, 0], [9, 0]])
    other = batch_of(3, [True] * 3)
    assert alignment.loss(out_of(media, words), same, 3) < alignment.loss(out_of(media, words), other, 3)
    right, count = alignment.hits(out_of(torch.stack([words[0], words[1], words[2]]), words), same)
    assert (int(right), int(count)) == (3, 3)


def test_a_row_of_no_weight_and_a_batch_without_pairs() -> None:
    torch.manual_seed(0)
    media, words = torch.randn(3, 8), torch.randn(3, 8)
    blank = batch_of(3, [True, True, False])
    two = alignment.loss(out_of(media, words), blank, 3)
    less = batch_of(3, [True] * 3) | {"weight": torch.tensor([1.0, 1.0, 0.0])}
    assert alignment.loss(out_of(media, words), less, 3).item() == pytest.approx(two.item())
    out = out_of(media, words)
    nothing = alignment.loss(out, batch_of(3, [False] * 3), 3)
    nothing.backward()
    assert nothing.item() == 0.0
    assert out["image"].grad is not None  # the tower takes its part in the backward pass
    assert not out["image"].grad.any()
    assert [int(value) for value in alignment.hits(out, batch_of(3, [False] * 3))] == [0, 0]


@pytest.fixture
def model(tiny_recipe: dict[str, Any], tiny_backbone: Path) -> Alignment:
    torch.manual_seed(0)
    return Alignment(resolve(tiny_recipe, {}).model, text.load_encoder(str(tiny_backbone)).width, None, 0.07)


def test_towers_come_to_the_width_of_the_words(model: Alignment) -> None:
    batch = {
        "text_states": torch.randn(2, 5, 32), "mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
        "images": torch.randn(3, 3, 16, 16), "audios": torch.randn(1, 32, 40), "audio_frames": torch.tensor([32]),
    }  # fmt: skip
    out = model(batch)
    assert (out["image"].shape, out["audio"].shape, out["words"].shape) == ((3, 32), (1, 32), (2, 32))
    torch.testing.assert_close(out["words"][0], batch["text_states"][0, :3].mean(0))
    assert out["scale"].item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.scale.fill_(math.log(1e6))
    assert model(batch)["scale"].item() == pytest.approx(100.0)  # CLIP's bound


def test_a_tower_begins_where_another_ended(
    model: Alignment, tiny_recipe: dict[str, Any], tmp_path: Path, storage: Path
) -> None:
    assert model.image_tower is not None
    assert model.image is not None
    config = resolve(tiny_recipe, {}).model.image
    assert config is not None
    parts = {towers.TOWER: model.image_tower.state_dict(), towers.PROJECTION: model.image.state_dict()}
    towers.keep(config, storage / "runs" / "seen" / "towers" / "image", parts)
    begun = resolve(tiny_recipe, {"model.image.start": "runs/seen/towers/image"}).model
    assert begun.image is not None
    towers.check(begun)
    torch.manual_seed(5)
    tower = towers.image_tower(begun.image)
    for name, value in model.image_tower.state_dict().items():
        assert torch.equal(tower.state_dict()[name], value)
    # A bundle's weights come afterwards: the folder is not asked for.
    (storage / "runs" / "seen" / "towers" / "image" / "tower.safetensors").rename(tmp_path / "away")
    towers.image_tower(begun.image, weights=False)
    with pytest.raises(BackboneError, match=r"there is no tower\.safetensors in .*seen/towers/image"):
        towers.check(begun)
    (tmp_path / "away").rename(storage / "runs" / "seen" / "towers" / "image" / "tower.safetensors")
    wide = resolve(tiny_recipe, {"model.image.start": "runs/seen/towers/image", "model.image.width": 64}).model.image
    assert wide is not None
    with pytest.raises(BackboneError, match=r"of another shape than the config says; it was made with .*'width': 32"):
        towers.image_tower(wide)
