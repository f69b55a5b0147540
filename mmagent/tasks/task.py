"""What every task is: a head on the fused states, a loss, an answer, and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmagent.calibration import Calibration
from mmagent.metrics import Number
from mmagent.reading import Reader, View
from mmagent.record import Record
from mmagent.targets import TaskInfo, spanned

IGNORED = -100  # a class index that no loss counts


class Fused(NamedTuple):
    """What the join makes of a batch, for heads to read. A tuple: ZeRO-3 looks for tensors in what modules hand on."""

    answer: Tensor  # (rows, width): the answer token's state
    tokens: Tensor | None  # (rows, tokens, width): of the text's tokens, where a head of the model wants them


class Placed(NamedTuple):
    """Where what is asked and what is offered lie, so that rows may be compared with each other's."""

    asked: Sequence[float]  # (channels,)
    offered: Sequence[float]  # (channels,)
    keys: tuple[int, int]  # of both: see `View.key`


@dataclass(frozen=True, slots=True)
class Decision:
    """What a task answers; it fills the fields that are its own."""

    label: str | None = None
    labels: tuple[str, ...] | None = None
    value: float | None = None
    text: str | None = None
    spans: tuple[Mapping[str, Any], ...] | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)  # likeliest first
    confidence: float = 0.0
    likelihood: tuple[float, int] | None = None  # of the right answer: its logarithm, and of how many tokens
    placed: Placed | None = None  # match, a lone candidate that was read apart
    tokens: tuple[tuple[str, float], ...] = ()  # of a written text: each and the logarithm of its probability
    stopped: bool = True  # a written text came to an end by itself
    novelty: float | None = None  # share of validation answers that were less unusual; near 1: like nothing it knows

    @property
    def words(self) -> str:
        """The answer as one would say it."""
        if self.text is not None:
            return self.text
        if self.label is not None:
            return self.label
        if self.labels is not None:
            return ", ".join(self.labels)
        if self.value is not None:
            return f"{self.value:g}"
        return "; ".join(f"{span['text']} ({span['label']})" for span in self.spans or ())


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer beside the right one, as metrics want them."""

    gold: Any  # of `Task.gold`
    decision: Decision
    group: str = ""


class Answered(Protocol):
    """What of an answer says which one it is."""

    @property
    def label(self) -> str | None: ...

    @property
    def labels(self) -> tuple[str, ...] | None: ...


class Task(ABC):
    """
    Args:
        info: name, labels and statistics, from the data set or the bundle.
    """

    kind: ClassVar[str]
    needs_tokens: ClassVar[bool] = False  # the head reads the states of the text's tokens
    pooled: ClassVar[bool] = False  # the head reads the answer token's state alone: a picture's mean state serves too
    generates: ClassVar[bool] = False  # it writes with the language model's own output layer; `head` is not asked
    reads_whole: ClassVar[bool] = True  # there is one view: the text as it is
    score: ClassVar[str]  # the metric that chooses a checkpoint; higher is better
    measures: ClassVar[tuple[str, ...]]  # what a validation tells of it, where its rows allow
    main: ClassVar[str] = ""  # the metric to look at first, where it is another

    def __init__(self, info: TaskInfo) -> None:
        self.info = info
        self.name = info.task
        self.labels = tuple(info.labels)
        self.index = {label: index for index, label in enumerate(self.labels)}

    def key(self, field: str) -> str:
        """The name of this task's own tensor in a batch."""
        return f"{self.name}/{field}"

    def views(self, record: Record, reader: Reader) -> tuple[View, ...]:
        """What the model reads of a record: one view, or several whose outputs `raw` puts together."""
        return (reader.whole(record),)

    def replied(self, record: Record, reader: Reader) -> View:
        """A view without what is read, which others make: with what is to be written alone, where that is known."""
        return View(np.zeros(0, np.int64))

    @abstractmethod
    def head(self, width: int) -> nn.Module:
        """A module from (`Fused`, batch) to this task's output: a tensor whose first axis is rows."""

    @abstractmethod
    def target(self, record: Record, view: View) -> dict[str, np.ndarray] | None:
        """What the loss needs of the right answer; None where the record has none."""

    @abstractmethod
    def collate(self, targets: Sequence[Mapping[str, np.ndarray] | None], tokens: int) -> dict[str, Tensor]:
        """Tensors of `key` names for all rows of a batch; None for a row that has no target of this task."""

    @abstractmethod
    def loss(self, output: Tensor, batch: Mapping[str, Tensor], size: int, smoothing: float) -> Tensor:
        """Summed over rows by weight and divided by `size`, the nominal number of samples of a micro-batch, so that
        any split of a batch over workers sums to the same gradient."""

    def distance(
        self, output: Tensor, taught: Tensor, batch: Mapping[str, Tensor], temperature: float
    ) -> Tensor | None:
        """(rows,): how far an output is from an earlier model's of the same rows, whose labels are the first of this
        one's. None: that cannot be told of this task."""
        return None

    def trust(self, taught: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(rows,): how far an earlier model is to be believed about the rows that it teaches, from 0 to 1. Of tasks
        whose answer is one label: the probability that it gave to the row's own; of a row without one, and of other
        tasks, 1."""
        return batch["weight"].new_ones(len(taught))

    def outputs(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """What of an output `raw` reads."""
        return output

    @abstractmethod
    def hits(self, output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """How many answers of a batch are right, and of how many."""

    def evidence(self, output: Tensor, answer: Answered) -> Tensor:
        """(rows,): how much an output says the answer that was given, for what speaks for it to be found."""
        return output.float().flatten(1).amax(1)

    @abstractmethod
    def raw(self, outputs: np.ndarray, views: Sequence[View]) -> Any:
        """The output of one record's views, (views, ...), as far as `decide` needs it."""

    @abstractmethod
    def decide(self, raw: Any, record: Record, calibration: Calibration, modalities: str) -> Decision:
        """The answer to one record."""

    @abstractmethod
    def gold(self, record: Record) -> Any:
        """The right answer in the form that metrics compare; JSON can hold it. None where there is none."""

    @abstractmethod
    def measure(self, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = 0) -> dict[str, Number]:
        """The task's metrics, fractions of one where they are shares; with intervals where `resamples` is given."""

    @abstractmethod
    def right(self, outcome: Outcome) -> bool:
        """Whether an answer is right as a whole: what its confidence speaks of."""

    def per_class(self, outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and support of each label that occurs; empty where a task has none."""
        return {}

    def names(self, labels: Iterable[str]) -> tuple[str, ...]:
        """The task's labels, and after them those of `labels` that it does not know: they count as never found."""
        return (*self.labels, *sorted(set(labels) - set(self.labels)))

    def calibrate(self, raws: Sequence[Any], records: Sequence[Record], modalities: Sequence[str]) -> Calibration:
        """What makes the confidence mean what it says, from validation rows whose right answer is known."""
        return Calibration()


class AnswerHead(nn.Module):
    """A linear layer on the answer token's state."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, outputs)

    def forward(self, fused: Fused, batch: Mapping[str, Tensor]) -> Tensor:
        """-> (rows, outputs)."""
        return self.layer(fused.answer)


class TokenHead(nn.Module):
    """A linear layer on each text token's state."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, outputs)

    def forward(self, fused: Fused, batch: Mapping[str, Tensor]) -> Tensor:
        """-> (rows, tokens, outputs)."""
        assert fused.tokens is not None
        return self.layer(fused.tokens)


def indexes(targets: Sequence[Mapping[str, np.ndarray] | None], field: str) -> Tensor:
    """(rows,) int64 of a scalar target, `IGNORED` where there is none."""
    return torch.tensor([IGNORED if target is None else int(target[field]) for target in targets])


def padded(
    targets: Sequence[Mapping[str, np.ndarray] | None], field: str, tokens: int, fill: float, dtype: torch.dtype
) -> Tensor:
    """(rows, tokens) of a target that has an entry for each token."""
    out = torch.full((len(targets), tokens), fill, dtype=dtype)
    for row, target in enumerate(targets):
        if target is not None:
            out[row, : len(target[field])] = torch.from_numpy(target[field]).to(dtype)
    return out


def divergence(output: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the last axis's probabilities from those that were taught, both softened, times
    the temperature's square (arXiv:1503.02531): (..., n), (..., m <= n) -> (...)."""
    wanted = (taught.float() / temperature).log_softmax(-1)
    said = (output[..., : taught.shape[-1]].float() / temperature).log_softmax(-1)
    return (wanted.exp() * (wanted - said)).sum(-1) * temperature**2


def focus(record: Record) -> str:
    """The content that spans count in, as stored."""
    return record.messages[spanned(record)].content
