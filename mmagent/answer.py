"""What a model says to a record: the same for every task, to Python and over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmagent.tasks.task import Placed


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says, how sure it is, and which bundle said it. A task fills the fields that are its own."""

    task: str
    confidence: float
    abstained: bool  # less sure than the bundle's calibration asks for
    bundle: str
    words: str  # the answer as one would say it
    label: str | None = None
    labels: tuple[str, ...] | None = None
    value: float | None = None
    text: str | None = None
    spans: tuple[Mapping[str, Any], ...] | None = None
    cut: int = 0  # tokens of the text that the model had no room for
    likelihood: tuple[float, int] | None = None  # of the right answer, where the record brought it: see `Decision`
    placed: Placed | None = None  # see `Decision`
    probabilities: Mapping[str, float] = field(default_factory=dict)  # every label, likeliest first
    tokens: tuple[tuple[str, float], ...] = ()  # of a text that was written: each and the logarithm of its probability
    stopped: bool = True  # a text came to an end by itself, not for its length
    novelty: float | None = None  # see `Decision`
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    states: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)  # where they are wanted

    def to_dict(self, *, timings: bool = True) -> dict[str, Any]:
        """As JSON has it, without the fields of other tasks."""
        said = {"label": self.label, "value": self.value, "text": self.text}
        many = {"labels": self.labels, "spans": self.spans}
        return {
            "task": self.task,
            **{key: value for key, value in said.items() if value is not None},
            **{key: [*value] for key, value in many.items() if value is not None},
            "probabilities": dict(self.probabilities),
            "confidence": self.confidence,
            "abstained": self.abstained,
            **({} if self.novelty is None else {"novelty": self.novelty}),
            "bundle": self.bundle,
            **({"cut_tokens": self.cut} if self.cut else {}),
            **({"timings_ms": dict(self.timings_ms)} if timings else {}),
        }
