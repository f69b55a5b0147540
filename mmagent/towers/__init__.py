"""Towers: encoders of pictures and sound, from scratch or pretrained.

A tower takes a packed stack of all pictures (or sounds) of a batch and knows nothing of samples; placing its tokens
is the join's work.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mmagent import pictures, pretrained, sounds
from mmagent.config import AudioTowerConfig, ImageTowerConfig, ModelConfig
from mmagent.towers.audio import PretrainedAudioTower
from mmagent.towers.image import PretrainedImageTower
from mmagent.towers.scratch import AudioTower, Block, ImageTower

__all__ = [
    "AudioTower", "Block", "ImageTower", "PretrainedAudioTower", "PretrainedImageTower", "audio_tower", "check",
    "image_tower", "save",
]  # fmt: skip


def image_tower(config: ImageTowerConfig, *, weights: bool = True) -> nn.Module:
    """(pictures, 3, height, width), as `mmagent.pictures` makes them -> (pictures, tokens, `config.width`).

    Args:
        weights: false where a pretrained tower's weights come from elsewhere, as a bundle's do.

    Raises:
        BackboneError: a checkpoint that cannot be used.
    """
    return PretrainedImageTower(config, weights=weights) if config.checkpoint else ImageTower(config)


def audio_tower(config: AudioTowerConfig, *, weights: bool = True) -> nn.Module:
    """(sounds, frames, channels) and (sounds,), as `mmagent.sounds` makes them -> (sounds, tokens, `config.width`).

    Args, Raises: as of `image_tower`.
    """
    return PretrainedAudioTower(config, weights=weights) if config.checkpoint else AudioTower(config)


def check(config: ModelConfig) -> None:
    """Whether the checkpoints of a model's towers have weights; the rest is told when the towers are built.

    Raises:
        BackboneError: there are none.
    """
    for tower in (config.image, config.audio):
        if tower is not None and tower.checkpoint:
            pretrained.check_weights(tower.checkpoint)


def save(config: ModelConfig, folder: Path) -> None:
    """Writes what pretrained towers are rebuilt from beside their weights: ``image/`` and ``audio/``, each with its
    config and its processor's."""
    if config.image is not None and config.image.checkpoint:
        pretrained.config_of(config.image.checkpoint, pictures.KEY).save_pretrained(folder / "image")
        pictures.load_processor(config.image.checkpoint).save_pretrained(folder / "image")
    if config.audio is not None and config.audio.checkpoint:
        pretrained.config_of(config.audio.checkpoint, sounds.KEY).save_pretrained(folder / "audio")
        sounds.load_extractor(config.audio.checkpoint).save_pretrained(folder / "audio")
