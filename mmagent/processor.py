"""The processor of a native multimodal model: what it takes, and how it is loaded."""

from __future__ import annotations

from typing import Any

from mmagent import pretrained, text
from mmagent.pretrained import BackboneError

_KEY = "model.backbone"
_VIDEO = "video_processor"


def load(name: str) -> Any:
    """A checkpoint's processor.

    Raises:
        BackboneError: there is none of text with pictures or sound, or its tokenizer cannot be used.
    """
    place = pretrained.locate(name)
    with pretrained.refusing(name, place, _KEY):
        processor = _loaded(name, place)
    if not hasattr(processor, "tokenizer") or not kinds(processor):
        raise BackboneError(
            f"model.join=native, but {name!r} has no processor of text with pictures or sound: copy "
            "processor_config.json or preprocessor_config.json there from where the model came from"
        )
    processor.tokenizer = text.settled(processor.tokenizer, name)
    return processor


def kinds(processor: Any) -> tuple[str, ...]:
    """What a processor takes besides text: ``image``, ``audio``."""
    parts = (("image", "image_processor"), ("audio", "feature_extractor"))
    return tuple(kind for kind, name in parts if getattr(processor, name, None) is not None)


def _loaded(name: str, place: str) -> Any:
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return AutoProcessor.from_pretrained(place)
    except (ImportError, ValueError):
        # Transformers makes no part for videos without torchvision, whose wheels fit few builds of torch; and none of
        # settings that were saved where it was not there.
        config = pretrained.config_of(name, _KEY)
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        if kind is None or _VIDEO not in kind.get_attributes():
            raise
        return _without_videos(kind, place)


def _without_videos(kind: Any, place: str) -> Any:
    """A processor of its parts; the one for videos, which no record brings, keeps its settings and does nothing."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
    from transformers.video_processing_utils import BaseVideoProcessor

    makers: dict[str, Any] = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}
    settings, options = kind.get_processor_dict(place)
    parts = []
    for part in kind.get_attributes():
        if part == _VIDEO:
            known = settings.get(_VIDEO) or BaseVideoProcessor.get_video_processor_dict(place)[0]
            named = str(known.get("video_processor_type") or BaseVideoProcessor.__name__)
            parts.append(type(named, (BaseVideoProcessor,), {})(**known))
        else:
            parts.append(makers.get(part, AutoFeatureExtractor).from_pretrained(place))

    def accepted(self: Any, name: str, part: Any) -> Any:
        return type(part) if name == _VIDEO else kind.check_argument_for_proper_class(self, name, part)

    # Of the same name, by which it is found again where it is saved.
    blind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": accepted})
    return blind.from_args_and_dict(parts, settings, **options)  # type: ignore[attr-defined]
