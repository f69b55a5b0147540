"""Towers: encoders of pictures and sound, from scratch or pretrained.

A tower takes a packed stack of all pictures (or sounds) of a batch and knows nothing of samples; placing its tokens
is the join's work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmagent import pictures, pretrained, sounds, storage
from mmagent.config import AudioTowerConfig, ImageTowerConfig, ModelConfig, TowerConfig
from mmagent.pretrained import BackboneError
from mmagent.towers.audio import PretrainedAudioTower
from mmagent.towers.image import PretrainedImageTower
from mmagent.towers.scratch import AudioTower, Block, ImageTower

__all__ = [
    "AudioTower", "Block", "ImageTower", "PretrainedAudioTower", "PretrainedImageTower", "audio_tower", "begin",
    "check", "image_tower", "keep", "save", "start_file",
]  # fmt: skip

START_FILE = "tower.safetensors"
TOWER, PROJECTION = "tower", "projection"  # parts of what a tower begins with: itself, and its way to the text's states


def begin(module: nn.Module, config: TowerConfig, part: str, *, weights: bool = True) -> None:
    """Gives a tower, or its projection to the language model's states, the weights of `config.start`, where given.

    Raises:
        BackboneError: there are none, or they are of another shape.
    """
    if config.start is None or not weights or any(parameter.is_meta for parameter in module.parameters()):
        return
    file = start_file(config.start)
    own = {key.removeprefix(f"{part}."): value for key, value in load_file(file).items() if key.startswith(f"{part}.")}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        made = json.loads((file.parent / "tower.json").read_text())
        raise BackboneError(
            f"the {part} in {file} is of another shape than the config says; it was made with {made}: {error}"
        ) from error


def keep(config: TowerConfig, folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes what `begin` reads.

    Args:
        parts: the weights of the tower and of its projection.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{part}.{key}": value.detach().cpu().contiguous()
        for part, state in parts.items()
        for key, value in state.items()
    }
    save_file(flat, folder / START_FILE)
    storage.publish_json(folder / "tower.json", config.model_dump(mode="json"))


def image_tower(config: ImageTowerConfig, *, weights: bool = True) -> nn.Module:
    """(pictures, 3, height, width), as `mmagent.pictures` makes them -> (pictures, tokens, `config.width`).

    Args:
        weights: false where a pretrained tower's weights come from elsewhere, as a bundle's do.

    Raises:
        BackboneError: a checkpoint that cannot be used.
    """
    tower = PretrainedImageTower(config, weights=weights) if config.checkpoint else ImageTower(config)
    begin(tower, config, TOWER, weights=weights)
    return tower


def audio_tower(config: AudioTowerConfig, *, weights: bool = True) -> nn.Module:
    """(sounds, frames, channels) and (sounds,), as `mmagent.sounds` makes them -> (sounds, tokens, `config.width`).

    Args, Raises: as of `image_tower`.
    """
    tower = PretrainedAudioTower(config, weights=weights) if config.checkpoint else AudioTower(config)
    begin(tower, config, TOWER, weights=weights)
    return tower


def check(config: ModelConfig) -> None:
    """Whether the checkpoints of a model's towers have weights; the rest is told when the towers are built.

    Raises:
        BackboneError: there are none.
    """
    for tower in (config.image, config.audio):
        if tower is not None and tower.checkpoint:
            pretrained.check_weights(tower.checkpoint)
        if tower is not None and tower.start:
            start_file(tower.start)


def save(config: ModelConfig, folder: Path) -> None:
    """Writes what pretrained towers are rebuilt from beside their weights: ``image/`` and ``audio/``, each with its
    config and its processor's."""
    if config.image is not None and config.image.checkpoint:
        pretrained.config_of(config.image.checkpoint, pictures.KEY).save_pretrained(folder / "image")
        pictures.load_processor(config.image.checkpoint).save_pretrained(folder / "image")
    if config.audio is not None and config.audio.checkpoint:
        pretrained.config_of(config.audio.checkpoint, sounds.KEY).save_pretrained(folder / "audio")
        sounds.load_extractor(config.audio.checkpoint).save_pretrained(folder / "audio")


def start_file(start: str) -> Path:
    """The weights that a tower begins with.

    Raises:
        BackboneError: there are none.
    """
    file = storage.fetched(storage.resolve(start)) / START_FILE
    if not file.is_file():
        raise BackboneError(
            f"there is no {START_FILE} in {file.parent}: jobs.pretrain with pretrain.objective=align makes it"
        )
    return file
