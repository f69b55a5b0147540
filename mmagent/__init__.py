"""The library of mmagent: records, media, batches, models, bundles and the predictor. It needs no Ray.

from mmagent import Predictor
answers = Predictor.load("bundle").predict([{"text": "what color is the shape?", "image": "shape.png"}])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmagent.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded at first use: a command that only reads a config should not wait for torch.
    if name == "Predictor":
        from mmagent.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'mmagent' has no attribute {name!r}")
