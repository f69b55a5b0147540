"""Vectors of texts, pictures and sounds, by the present bundle (see `mmagent.predictor.Predictor.embed`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmagent.batch import PartError, Sample
from mmagent.predictor import Predictor
from mmagent.rows import parse
from serve.errors import ApiError
from serve.keys import Key
from serve.loaded import Loaded
from serve.parts import Draft
from serve.questions import EmbeddingsRequest, PredictRequest
from serve.service import Service

_MOST = 2048  # inputs of one request: OpenAI's


async def embed(service: Service, request: EmbeddingsRequest, key: Key) -> tuple[np.ndarray, int]:
    """(inputs, channels), each of length 1, and the tokens that were read.

    Raises:
        ApiError: an input that cannot be read, by its number.
    """
    inputs = request.input if isinstance(request.input, list) else [request.input]
    if not inputs or len(inputs) > _MOST:
        raise ApiError(422, f"input: 1 to {_MOST:,} texts are wanted", code="invalid_value", param="input")
    loaded = service.bundles.current
    task = service.task_of(loaded, None, key)

    def decode() -> list[Sample]:
        samples = [_sample(service, loaded, item, f"input[{number}]", task) for number, item in enumerate(inputs)]
        if len({bool(sample.images or sample.audios) for sample in samples}) > 1:
            message = "input: vectors of words alone are shorter than those with pictures or sounds: send them apart"
            raise ApiError(422, message, code="invalid_value", param="input")
        return samples

    with service.bundles.used(loaded):
        samples = await service.decoded(decode)
        vectors: np.ndarray = await loaded.aside(_vectors, samples, service.config.batch_size)
        return vectors, sum(sample.tokens for sample in samples)


def _vectors(predictor: Predictor, samples: Sequence[Sample], size: int) -> np.ndarray:
    return np.concatenate([predictor.embed(samples[at : at + size]) for at in range(0, len(samples), size)])


def _sample(service: Service, loaded: Loaded, item: Any, place: str, task: str) -> Sample:
    row = {"text": item} if isinstance(item, str) else item
    if not isinstance(row, Mapping) or not set(row) <= {"text", "image", "audio"} or not any(row.values()):
        message = f"{place}: a text is wanted, or an object with text, image (base64) and audio (base64)"
        raise ApiError(422, message, code="invalid_value", param=place)
    tasks = loaded.predictor.tasks
    # A task that reads the whole, where there is one: strides and candidates are no vector.
    reading = next((name for name in (task, *tasks) if tasks[name].reads_whole), task)
    try:
        question = PredictRequest.model_validate(dict(row))
        record = Draft(service.config, loaded.predictor.limits).build(question, "classify", place)
        return loaded.predictor.prepare(parse({**record.to_row(), "task": reading, "meta": {}}))
    except ApiError as error:
        raise ApiError(error.status_code, f"{place}: {error.detail}", code=error.code, param=place) from error
    except (PartError, ValueError) as error:
        raise ApiError(422, f"{place}: {error}", code="invalid_value", param=place) from error
