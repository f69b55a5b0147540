"""A bundle that answers in this replica: what it knows of itself, and the engine that computes for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmagent import familiar, storage
from mmagent.batch import Sample
from mmagent.bundle import MANIFEST
from mmagent.predictor import Predictor
from serve.drift import Drift
from serve.engine import FAILURES, Engine, Passed


class Loaded:
    """Belongs to one event loop.

    Args:
        predictor: decodes and knows the tasks; where the engine is elsewhere, its weights are never read here.
        seal: what tells this bundle from another in the same folder.
    """

    def __init__(self, predictor: Predictor, engine: Engine, *, seal: str = "") -> None:
        self.predictor, self.seal = predictor, seal
        self._engine = engine
        self.created_s = int(predictor.manifest.get("created_ms", 0)) // 1000
        known = familiar.load(predictor.path) if predictor.path is not None else {}
        infos = {name: task.info for name, task in predictor.tasks.items()}
        self.drift = Drift(infos, predictor.calibration, known)
        self.is_warm = False
        self.count = functools.lru_cache(4096)(predictor.inputs.count)  # tokens of an answer's words

    @property
    def name(self) -> str:
        return self.predictor.name

    @property
    def failed_in_a_row(self) -> int:
        return self._engine.failed_in_a_row

    @property
    def is_ill(self) -> bool:
        """Whether only a new process may help."""
        return self._engine.failed_in_a_row >= FAILURES

    async def answer(self, sample: Sample) -> Passed:
        """The answer, and how many seconds it waited for its forward pass."""
        return await self._engine.answer(sample)

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(predictor, *arguments)`` where the weights are; it and its arguments can be pickled. It is no
        forward pass of many: one at a time, in a thread of its own."""
        return await self._engine.aside(function, *arguments)

    async def warm_up(self) -> None:
        """Raises what the bundle raises."""
        await self._engine.warm_up()
        self.is_warm = True

    async def close(self) -> None:
        await self._engine.close()


def seal_of(folder: Path) -> str:
    """What tells a bundle from another in the same folder: its manifest names every file's hash."""
    return storage.digest(folder / MANIFEST)[:16]
