"""A bundle that answers here: its predictor, and the forward passes that its requests share."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmagent import familiar, storage
from mmagent.bundle import MANIFEST
from mmagent.predictor import Answer, Predictor, Sample
from mmagent.record import Message, Record, Target
from mmagent.targets import HEAD, TAIL, kind
from serve.batcher import Batcher
from serve.config import ServeConfig
from serve.drift import Drift

_FAILURES = 3  # forward passes that fail in a row before a replica calls itself ill


class Loaded:
    """Belongs to one event loop.

    Args:
        seal: what tells this bundle from another in the same folder.
        on_the_way: how many requests may come soon.
    """

    def __init__(
        self,
        predictor: Predictor,
        config: ServeConfig,
        *,
        seal: str = "",
        on_the_way: Callable[[], int],
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.predictor, self.config, self.seal = predictor, config, seal
        self.created_s = int(predictor.manifest.get("created_ms", 0)) // 1000
        known = familiar.load(predictor.path) if predictor.path is not None else {}
        predictor.tells_states = bool(known)
        infos = {name: task.info for name, task in predictor.tasks.items()}
        self.drift = Drift(infos, predictor.calibration, known)
        self.is_warm = False
        self.work = ThreadPoolExecutor(1, thread_name_prefix="explain")  # what is asked for one answer alone

        self.count = functools.lru_cache(4096)(predictor.inputs.count)  # tokens of an answer's words

        def forward(samples: Sequence[Sample]) -> list[Answer]:
            on_batch(len(samples))
            return predictor.answer(samples)

        self._batcher: Batcher[Sample, Answer] = Batcher(
            forward, size=config.batch_size, wait_s=config.batch_wait_ms / 1000, on_the_way=on_the_way
        )

    @property
    def name(self) -> str:
        return self.predictor.name

    @property
    def failed_in_a_row(self) -> int:
        return self._batcher.failed_in_a_row

    @property
    def is_ill(self) -> bool:
        """Whether only a new process may help."""
        return self._batcher.failed_in_a_row >= _FAILURES

    async def answer(self, sample: Sample) -> tuple[Answer, float]:
        """The answer, and how many seconds it waited for its forward pass."""
        return await self._batcher.submit(sample)

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Something of this bundle's that is no forward pass of many: one at a time, in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self.work, function, *arguments)

    async def warm_up(self) -> None:
        """The first passes of a process are slow: they are nobody's request. Raises what the bundle raises."""
        samples = [self.predictor.prepare(first_question(task)) for task in self.predictor.tasks]
        for sample in samples:
            await self._batcher.submit(sample)
        full = [samples[index % len(samples)] for index in range(self.config.batch_size)]
        await asyncio.gather(*map(self._batcher.submit, full))
        self.is_warm = True

    async def close(self) -> None:
        await self._batcher.close()
        self.work.shutdown(wait=False)


def seal_of(folder: Path) -> str:
    """What tells a bundle from another in the same folder: its manifest names every file's hash."""
    return storage.digest(folder / MANIFEST)[:16]


def first_question(task: str) -> Record:
    """A small one that every model can answer."""
    ends = ({"start": 0, "end": 2, "label": HEAD}, {"start": 3, "end": 5, "label": TAIL})
    more: dict[str, dict[str, Any]] = {
        "match": {"candidates": ({"content": "yes"}, {"content": "no"})},
        "relate": {"target": Target(spans=ends)},
    }
    return Record("warm-up", (Message("user", "is it there?"),), task=task, **more.get(kind(task), {}))
