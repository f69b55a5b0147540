"""A loss that no good step has: no number, or far above what is usual. And the rows that had it, kept to be looked at.

The verdict is of the mean loss over all ranks and forward passes of a step, which every rank knows, so that all come
to the same one, before any of them moves a parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.workers import Final, Group
from mmagent import storage

if TYPE_CHECKING:
    from jobs.loop import Plan, State

FOLDER = "inspect"
_WINDOW = 100  # steps that the running mean looks back over, about
_FIRST = 20  # steps before a jump is one
_SHOWN_IDS = 8
_FLOOR = 0.1  # a deviation counts as no less than this share of the mean of the first steps


class BadLossError(Final):
    """A loss that is no number, or jumped; names the rows, and where they are kept."""


@dataclass(slots=True)
class Usual:
    """The mean of the losses so far and their variance, with exponentially falling weights (T. Finch, Incremental
    calculation of weighted mean and variance, 2009, section 9); of the first steps, with even ones."""

    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0
    began: float = 0.0  # the mean of the first steps

    def add(self, loss: float) -> None:
        self.seen += 1
        share = 1 / min(self.seen, _WINDOW)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)
        if self.seen <= _FIRST:
            self.began = self.mean

    def limit(self, deviations: float) -> float:
        """Above it a loss is a jump; infinite before the first steps are over."""
        if self.seen < _FIRST:
            return math.inf
        return self.mean + deviations * max(math.sqrt(self.variance), _FLOOR * abs(self.began))


def fault(loss: float, usual: Usual, deviations: float | None) -> str:
    """What is wrong with a step's loss, in words; empty where nothing is."""
    if not math.isfinite(loss):
        return "is no number"
    if deviations is not None and loss > (limit := usual.limit(deviations)):
        return f"jumped to {loss:.4g}, where {usual.mean:.4g} is usual and {limit:.4g} the limit"
    return ""


def leave_out(group: Group, plan: Plan, state: State, table: pa.Table, losses: list[float], fault: str) -> str:
    """Keeps the rows of a step whose loss is bad, and counts it; what there is to say. Every rank calls it.

    Args:
        table: this rank's rows of the step.
        losses: of its forward passes, in the order of the rows.
        fault: of the mean loss over all ranks.

    Raises:
        BadLossError: `train.on_bad_loss` is stop, or more than `train.max_skips` in a row were left out.
    """
    train, step = plan.config.train, state.step + 1
    keep(plan.folder, step, group.rank, table, losses)
    state.skipped, state.skips_in_row = state.skipped + 1, state.skips_in_row + 1
    words = f"the loss of step {step} {fault}; {_worst(group, table, losses)}; all rows of the step are kept in "
    words += f"{plan.folder / FOLDER}/step_{step}_rank_N.parquet"
    if train.on_bad_loss == "stop":
        raise BadLossError(
            f"{words}. Look at them, or lower optim.lr; train.on_bad_loss=skip leaves such batches out, and with "
            "it the same command goes on from the last checkpoint, which is good"
        )
    if state.skips_in_row > train.max_skips:
        raise BadLossError(
            f"{words}. {state.skips_in_row} bad ones in a row are more than train.max_skips={train.max_skips} allows: "
            "lower optim.lr, or look at the data; the last checkpoint is good"
        )
    return words


def _worst(group: Group, table: pa.Table, losses: list[float]) -> str:
    """The forward pass of the highest loss over all ranks, and its rows."""
    mine = max(range(len(losses)), key=lambda index: _badness(losses[index]))
    size = -(-len(table) // len(losses))  # of a micro-batch
    ids = table["id"].slice(mine * size, size).to_pylist()
    everyone = group.gather((losses[mine], ids[:_SHOWN_IDS], len(ids)))
    rank = max(range(len(everyone)), key=lambda index: _badness(everyone[index][0]))
    loss, shown, count = everyone[rank]
    rows = ", ".join(map(str, shown)) + (", ..." if count > len(shown) else "")
    return f"the worst, {loss:.4g}, is that of rank {rank} on the rows {rows}"


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def keep(folder: Path, step: int, rank: int, table: pa.Table, losses: list[float]) -> Path:
    """Writes the rows of a rank's step, with the losses of its forward passes as the file's metadata.

    Args:
        folder: the run's own.
        losses: one for each forward pass, in the order of the rows.
    """
    path = folder / FOLDER / f"step_{step}_rank_{rank}.parquet"
    words = ",".join(f"{loss:.6g}" for loss in losses)
    metadata = {**(table.schema.metadata or {}), b"losses": words.encode(), b"step": str(step).encode()}
    storage.publish_parquet(path, table.replace_schema_metadata(metadata))
    return path
