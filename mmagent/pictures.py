"""What a picture becomes before a tower sees it: pixels of one size, then numbers of one range.

The two steps are apart so that pictures are cached and augmented as bytes. A tower from scratch gets the shape
that `model.image` says; a pretrained one gets what its own processor config says (size, crop, mean, deviation).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmagent import pretrained
from mmagent.config import ImageTowerConfig
from mmagent.media import Limits, decode_image
from mmagent.pretrained import BackboneError

KEY = "model.image.checkpoint"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_PROBES = ((97, 61), (64, 96))  # width, height: of neither shape that a processor would leave as it is


class Pictures:
    """Pictures for a tower from scratch: scaled into one shape, in [-1, 1].

    Attributes:
        shape: height and width in pixels.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def pixels(self, data: bytes, limits: Limits) -> np.ndarray:
        """An encoded picture as (height, width, 3) uint8.

        Raises:
            MediaTooLarge, MediaError: see `mmagent.media.decode_image`.
        """
        return self._fit(decode_image(data, limits))

    def stack(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """(pictures, 3, height, width) float32; one blank stand-in where there is no picture."""
        stack = np.stack(pictures) if pictures else np.zeros((1, *self.shape, 3), np.uint8)
        return self._scale(torch.from_numpy(stack).permute(0, 3, 1, 2).float())

    def _fit(self, image: Image.Image) -> np.ndarray:
        height, width = self.shape
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        return np.asarray(image, dtype=np.uint8)

    def _scale(self, values: Tensor) -> Tensor:
        return values.div_(127.5).sub_(1.0)


class ProcessedPictures(Pictures):
    """Pictures as a checkpoint's own processor makes them.

    Args:
        name: folder or hub id of the checkpoint.

    Raises:
        BackboneError: no processor config, or one that leaves pictures of different sizes.
    """

    def __init__(self, name: str) -> None:
        self._processor = load_processor(name)
        noise = np.random.default_rng(0)
        probes = [Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8), "RGB") for w, h in _PROBES]
        # A caller may build its model on the meta device; the processor computes here.
        with pretrained.refusing(name, pretrained.locate(name), KEY), torch.device("cpu"):
            fitted = [self._fit(probe) for probe in probes]
            wanted = torch.from_numpy(np.asarray(self._processor(probes[0], return_tensors="np")["pixel_values"]))
            self.shape = fitted[0].shape[:2]
            same = torch.allclose(self.stack(fitted[:1]), wanted.float(), atol=1e-3)
        if fitted[0].shape != fitted[1].shape:
            raise BackboneError(
                f"the processor of {name!r} makes pictures of different sizes ({fitted[0].shape[:2]} and "
                f"{fitted[1].shape[:2]}), but a batch is of one: set do_center_crop and crop_size, or a size of height "
                "and width, in preprocessor_config.json"
            )
        if not same:
            raise BackboneError(
                f"the processor of {name!r} ({type(self._processor).__name__}) does more to a picture than to resize, "
                "crop and normalise it: choose a checkpoint with a plain processor"
            )

    def _fit(self, image: Image.Image) -> np.ndarray:
        out = self._processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        pixels = np.asarray(out[0])
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(
                f"its processor makes arrays of shape {pixels.shape} of a picture; (3, height, width) wanted"
            )
        return np.ascontiguousarray(pixels.transpose(1, 2, 0)).round().clip(0, 255).astype(np.uint8)

    def _scale(self, values: Tensor) -> Tensor:
        processor = self._processor
        if processor.do_rescale:
            values = values * processor.rescale_factor
        if processor.do_normalize:
            mean, deviation = (torch.tensor(v).view(-1, 1, 1) for v in (processor.image_mean, processor.image_std))
            values = (values - mean) / deviation
        return values


def load_processor(name: str) -> Any:
    """A checkpoint's image processor. The one that computes with Pillow, whatever else is installed, so that a picture
    gives the same numbers where a model is trained and where it answers.

    Raises:
        BackboneError: there is none.
    """
    from transformers import AutoImageProcessor

    place = pretrained.locate(name)
    if Path(place).is_dir() and not any((Path(place) / file).exists() for file in PROCESSOR_FILES):
        raise BackboneError(
            f"the model folder {place} has no image processor: {' or '.join(PROCESSOR_FILES)} is wanted; "
            "copy it there from where the model came from (image_processor.save_pretrained writes it)"
        )
    with pretrained.refusing(name, place, KEY):
        return AutoImageProcessor.from_pretrained(place, backend="pil")


def of(config: ImageTowerConfig) -> Pictures:
    """
    Raises:
        BackboneError: see `ProcessedPictures`.
    """
    return ProcessedPictures(config.checkpoint) if config.checkpoint else Pictures(config.shape)
