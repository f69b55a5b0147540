"""What holds a training near the bundle that it began with: a penalty on weights that leave their place, and a teacher
for rows that are replayed (`start.hold`, `start.distil`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jobs.replay import REPLAY
from mmagent import bundle as bundles
from mmagent import inheritance
from mmagent.assembly import Model
from mmagent.batch import Sample
from mmagent.config import Config, ConfigError
from mmagent.model import Batch
from mmagent.tasks import Task

REPLAYED = "replayed"  # in a batch: (rows,), 1 where a row was seen in training before
_ADAPTER = ".lora_"  # what starts at nothing and is merged is no place to hold
_FISHER_ROWS = 256


def check(config: Config) -> None:
    """
    Raises:
        ConfigError: what `start` asks for cannot be had.
    """
    start = config.start
    if start.bundle is None:
        if start.hold != "none" or start.distil:
            raise ConfigError("start.hold and start.distil hold a run near a bundle: give start.bundle")
        return
    if start.hold != "none" and config.zero.stage == 3:
        raise ConfigError(f"start.hold={start.hold} wants whole weights on each worker: give zero.stage=0, 1 or 2")


class Anchor:
    """Beside a model that begins to learn.

    Args:
        model: with the bundle's weights, on its device, before its first step.
    """

    def __init__(self, config: Config, model: Model, device: torch.device) -> None:
        self._start, self._size = config.start, config.train.micro_batch
        assert config.start.bundle is not None
        found = bundles.load(config.start.bundle)
        self._model = model
        self._begun: dict[str, Tensor] = {}
        self._weight: dict[str, Tensor] = {}  # of each parameter, of ewc
        if self._start.hold != "none":
            self._begun = {
                name: parameter.detach().float().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and _ADAPTER not in name
            }
        self._taught: Model | None = None
        self._tasks: dict[str, Task] = {}
        if self._start.distil:
            self._taught = inheritance.teacher(config, found, inside=model.backbone is not None).to(device)
            self._tasks = {name: task for name, task in model.tasks.items() if name in found.tasks}

    @property
    def wants_rows(self) -> bool:
        """Whether `weigh` is to be called."""
        return self._start.hold == "ewc"

    def weigh(
        self, fresh: nn.Module, samples: Sequence[Sample], make: Callable[[list[Sample]], Batch],
        loss: Callable[[Batch, Batch], Tensor], device: torch.device,
    ) -> None:  # fmt: skip
        """How much answers hang on each weight: the mean square of the gradients of single samples (the empirical
        Fisher information's diagonal), scaled to a mean of 1.

        Args:
            fresh: a model as this one began, which no engine holds.
            make, loss: a micro-batch of samples, and its loss.
        """
        fresh = fresh.to(device).eval()
        held = [(name, each) for name, each in fresh.named_parameters() if name in self._begun]
        sums = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in held}
        for sample in samples[:_FISHER_ROWS]:
            batch = {key: value.to(device) for key, value in make([sample]).items()}
            fresh.zero_grad(set_to_none=True)
            loss(fresh(batch), batch).backward()
            for name, parameter in held:
                if parameter.grad is not None:
                    sums[name] += parameter.grad.float().square()
        total = sum(float(each.sum()) for each in sums.values())
        count = sum(each.numel() for each in sums.values())
        self._weight = {name: each * (count / total) for name, each in sums.items()} if total else {}

    def loss(self, out: Batch, batch: Batch) -> Tensor:
        """What is added to a micro-batch's loss; each sample carries its share, so that any split of a batch sums to
        the same."""
        found = batch["weight"].new_zeros(())
        if self._begun:
            found = found + self._penalty() * (batch["weight"].sum() / self._size)
        if self._taught is not None:
            with torch.no_grad():
                taught = self._taught(batch)
            for name, task in self._tasks.items():
                each = task.distance(out[name], taught[name], batch, self._start.temperature)
                if each is not None:
                    weight = batch["weight"] * batch[REPLAYED] * task.trust(taught[name], batch) * self._start.distil
                    found = found + (each * weight).sum() / self._size
        return found

    def _penalty(self) -> Tensor:
        """Strength / 2 times the sum over weights of F (theta - theta at the start)²."""
        parts = []
        for name, parameter in self._model.named_parameters():
            if name in self._begun:
                away = (parameter.float() - self._begun[name]).square()
                parts.append((away * self._weight[name]).sum() if name in self._weight else away.sum())
        return torch.stack(parts).sum() * (self._start.strength / 2)


def replayed(samples: Sequence[Sample], rows: Tensor) -> Tensor:
    """(rows,): 1 for the rows of replayed samples.

    Args:
        rows: of `Inputs.batch`: the sample of each row.
    """
    known = torch.tensor([float(sample.record.meta.get("source") == REPLAY) for sample in samples])
    return known[rows]
