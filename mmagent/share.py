"""How a global batch is shared out: what each of several workers takes of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """A global batch stays what it is, whatever the number of workers: each makes as many passes as its rows need.
    Where it does not divide, the last rows are blanks that weigh nothing."""

    batch: int  # samples of an optimizer step over all workers
    micro_batch: int  # rows of one pass, at most
    world: int  # workers

    @property
    def rows(self) -> int:
        """Of one worker in one step, blanks among them."""
        return -(-self.batch // self.world)

    @property
    def passes(self) -> int:
        """Forward passes of a worker in one step."""
        return -(-self.rows // self.micro_batch)

    @property
    def factor(self) -> float:
        """What a loss is multiplied by that was summed over a pass and divided by `micro_batch`, so that the mean over
        all passes of all workers is the mean over the global batch. Exactly 1 where the batch divides."""
        return self.passes * self.micro_batch * self.world / self.batch
