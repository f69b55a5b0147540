"""The towers: shapes, and that a picture or a sound is seen the same whatever lies beside it in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mmagent import pictures, pretrained
from mmagent.config import AudioTowerConfig, ImageTowerConfig
from mmagent.towers import AudioTower, Block, ImageTower


def image_tower(**settings: int) -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(ImageTowerConfig(**{"width": 32, "layers": 1, "tokens": 4, "size": 16, **settings})).eval()


@pytest.fixture
def audio_tower() -> AudioTower:
    torch.manual_seed(0)
    return AudioTower(AudioTowerConfig(width=32, layers=2, tokens=5, mels=24)).eval()


def sounds(*frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sounds of these lengths, padded with zeros as `Inputs.batch` does."""
    out = torch.zeros(len(frames), max(frames) + -max(frames) % 16, 24)
    for index, length in enumerate(frames):
        torch.manual_seed(length)
        out[index, :length] = torch.randn(length, 24)
    return out, torch.tensor(frames)


@pytest.mark.parametrize(("size", "tokens"), [(64, 16), (16, 4), (30, 9), (8, 1), (8, 64), (224, 49), (20, 100)])
def test_a_picture_becomes_so_many_tokens(size: int, tokens: int) -> None:
    tower = image_tower(size=size, tokens=tokens)
    assert tower(torch.rand(2, 3, size, size)).shape == (2, tokens, 32)


@pytest.mark.parametrize(
    ("aspect", "shape", "grid"), [(1.0, (16, 16), (4, 4)), (4.0, (16, 64), (2, 8)), (0.25, (64, 16), (8, 2))]
)
def test_long_pictures_keep_their_shape(aspect: float, shape: tuple[int, int], grid: tuple[int, int]) -> None:
    config = ImageTowerConfig(width=32, layers=1, tokens=16, size=16, aspect=aspect)
    tower = ImageTower(config).eval()
    assert (pictures.of(config).shape, tower.grid) == (shape, grid)
    assert tower(torch.rand(2, 3, *shape)).shape == (2, 16, 32)


@pytest.mark.parametrize("tokens", [2, 12, 50])
def test_tokens_that_make_no_square_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"model.image.tokens={tokens} is no square number"):
        image_tower(tokens=tokens)


def test_each_picture_is_seen_alone() -> None:
    tower, pictures = image_tower(), torch.rand(3, 3, 16, 16)
    together = tower(pictures)
    for index in range(3):
        torch.testing.assert_close(tower(pictures[index : index + 1]), together[index : index + 1])


def test_where_something_lies_is_seen() -> None:
    tower, picture = image_tower(), torch.rand(1, 3, 16, 16)
    torch.manual_seed(1)
    torch.nn.init.normal_(tower.places)
    assert not torch.allclose(tower(picture).mean(1), tower(picture.flip(-1)).mean(1), atol=1e-3)


@pytest.mark.parametrize("frames", [1, 2, 8, 9, 100, 1000])
def test_a_sound_becomes_so_many_tokens(audio_tower: AudioTower, frames: int) -> None:
    tokens = audio_tower(*sounds(frames))
    assert tokens.shape == (1, 5, 32)
    assert tokens.isfinite().all()


def test_a_stand_in_without_a_frame_gives_numbers(audio_tower: AudioTower) -> None:
    assert audio_tower(torch.zeros(1, 16, 24), torch.tensor([0])).isfinite().all()


@pytest.mark.parametrize("frames", [3, 50, 64, 100])
def test_each_sound_is_heard_alone(audio_tower: AudioTower, frames: int) -> None:
    """The padding up to the longest sound of a batch is not heard: an answer does not depend on its neighbours."""
    alone = audio_tower(*sounds(frames))
    beside = audio_tower(*sounds(frames, 400))
    torch.testing.assert_close(beside[:1], alone, atol=1e-4, rtol=1e-4)


def test_when_something_sounds_is_heard(audio_tower: AudioTower) -> None:
    frames, lengths = sounds(96)
    assert not torch.allclose(audio_tower(frames, lengths), audio_tower(frames.flip(1), lengths), atol=1e-3)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_every_parameter_learns(kind: str, audio_tower: AudioTower) -> None:
    tower: torch.nn.Module = image_tower() if kind == "image" else audio_tower
    out = tower(torch.rand(2, 3, 16, 16)) if kind == "image" else tower(*sounds(40, 90))
    (out * torch.randn_like(out)).sum().backward()
    silent = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of all keys alike shifts a softmax by a constant; nothing can come of it.
    assert [name for name in silent if not name.endswith("key.bias")] == []


def test_a_masked_token_is_not_attended_to() -> None:
    torch.manual_seed(0)
    block, x = Block(32, 4, 0.5).eval(), torch.randn(2, 6, 32)
    keep = torch.tensor([[True] * 4 + [False] * 2] * 2)
    changed = torch.where(keep[..., None], x, torch.full_like(x, 9.0))
    torch.testing.assert_close(block(x, keep)[:, :4], block(changed, keep)[:, :4])
    torch.testing.assert_close(block(x, keep)[:, :4], block(x[:, :4], keep[:, :4]))


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_of_a_pair_of_checkpoints_the_encoder_is_the_tower(tmp_path: Path, kind: pretrained.Kind) -> None:
    """As models that read writing, or transcribe, are published: a vision or speech encoder with a decoder behind."""
    small: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    }  # fmt: skip
    whole: Any
    decoder = transformers.BertConfig(**small, vocab_size=99)
    if kind == "image":
        sees = transformers.ViTConfig(**small, image_size=32, patch_size=8)
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(sees, decoder)
        whole = transformers.VisionEncoderDecoderModel(config)
    else:
        filters: dict[str, Any] = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
        hears = transformers.Wav2Vec2Config(**small, **filters)
        config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(hears, decoder)
        whole = transformers.SpeechEncoderDecoderModel(config)
    whole.save_pretrained(tmp_path)
    part = pretrained.load(str(tmp_path), kind, key=f"model.{kind}.checkpoint")
    assert part.prefix == "encoder"
    assert not part.missing
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(part.model.state_dict()[name], value), name
