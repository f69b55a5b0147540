"""The engine of a training loop: forward, backward, step, save, load; plain torch in one process, or ZeRO
(`jobs.zero`).

The loop never asks which. Both save the same fragments (`jobs.fragments`), which either reads.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jobs import fragments
from jobs.phases import Phases
from mmagent.config import Config
from mmagent.model import Batch


class Engine(Protocol):
    """What the loop needs. `backward` and `step` are called once for each micro-batch; a step that ends an
    accumulation updates the parameters. A micro-batch's loss is divided by `Share.passes`, however many there are: the
    sum over them is the mean over the samples of an optimizer step."""

    device: torch.device
    model: Any  # a module of the parts that `mmagent.freeze` knows

    def begin(self, micros: int) -> None:
        """An optimizer step of so many micro-batches begins; where it is not called there are `Share.passes`."""
        ...

    def forward(self, batch: Batch) -> dict[str, Tensor]: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...

    def skip(self) -> None:
        """The next step moves no parameter and no state of the optimizer, whatever the gradients are."""
        ...

    def set_lr(self, factor: float, stage: int = 0) -> float:
        """Sets every group's learning rate to its peak times `factor`, and to nothing where the group opens at a later
        stage (see `mmagent.freeze.stage`); returns the highest."""
        ...

    def save(self, folder: Path) -> None:
        """Writes this rank's part into `folder`; all ranks must call it."""
        ...

    def load(self, folder: Path) -> None:
        """Takes what was saved, by this number of ranks or another, at this ZeRO stage or another; all ranks must call
        it.

        Raises:
            StateError: it is not whole, or of another model.
        """
        ...

    def close(self) -> None:
        """Lets go of what it holds: a process may make another. Nothing else is called afterwards."""
        ...

    def state(self, folder: Path) -> dict[str, Tensor]:
        """The model's whole weights on rank 0, on the CPU; all ranks must call it. Never a second copy in memory: they
        are those that train, or lie in files that vanish with them.

        Args:
            folder: where there is room for such files.
        """
        ...


def schedule(step: int, total: int, config: Config) -> float:
    """The learning rate at a step as a share of its peak: a linear rise, then what `optim.schedule` says, down to
    `final_share`: half a cosine (arXiv:1608.03983), a straight line; or the peak to the end."""
    warmup = max(1, round(config.optim.warmup_share * total))
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.optim.schedule]
    return config.optim.final_share + (1 - config.optim.final_share) * left


def cooldown(step: int, first: int, end: int, total: int, config: Config) -> float:
    """The learning rate as a share of its peak at a step from `first` on, of a run that ends with `end` in place of
    `total`: a straight line from where the schedule stood down to `optim.final_share` (arXiv:2405.18392: what a whole
    schedule gains by its small rates, a short fall from any step gains as well)."""
    high = schedule(first, total, config)
    return high + (min(high, config.optim.final_share) - high) * (step - first) / (end - first)


def use_bf16(config: Config) -> bool:
    """bf16 where asked for, or by itself where a GPU computes it; on CPUs it is slower than fp32."""
    if config.train.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return config.train.precision == "bf16"


class SGD(torch.optim.SGD):
    """Stochastic gradient descent with momentum and decoupled weight decay: with v <- mu v + grad L, a step is
    theta <- theta - eta v - eta lambda theta (SGDW, arXiv:1711.05101, algorithm 1). torch's own adds the decay to the
    gradient, and so to the momentum."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float) -> None:
        own = [{**group, "decay": group["weight_decay"], "weight_decay": 0.0} for group in groups]
        super().__init__(own, lr=0.0, momentum=momentum)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["decay"])
        return super().step(closure)


def optimizer_of(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """The optimizer of a config: the same object steps in plain torch and inside ZeRO."""
    made: torch.optim.Optimizer
    if config.optim.name == "sgd":
        made = SGD(groups, config.optim.momentum)
    else:
        made = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)  # one pass over memory, not ten
    made.register_step_pre_hook(_skip_closed)
    return made


def _skip_closed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A group that a gradual run has not opened takes no step: ZeRO would give it gradients of zero."""
    for group in optimizer.param_groups:
        if group.get("closed"):
            for parameter in group["params"]:
                parameter.grad = None


class TorchEngine:
    """Plain PyTorch in one process: what ZeRO is measured against."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: Config) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = model.to(self.device)
        self._passes = self._left = config.share(1).passes
        self._clip = config.optim.clip_norm
        self._bf16 = use_bf16(config)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = optimizer_of(groups, config)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            out: dict[str, Tensor] = self.model(batch)
        return out

    def backward(self, loss: Tensor) -> None:
        (loss / self._passes).backward()

    def begin(self, micros: int) -> None:
        self._left = micros

    def step(self) -> None:
        self._left -= 1
        if not self._left:
            self._left = self._passes
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        close(self._optimizer)

    def set_lr(self, factor: float, stage: int = 0) -> float:
        return set_lr_of(self._optimizer, factor, stage)

    def save(self, folder: Path) -> None:
        assert self._left == self._passes, "gradients that wait for the end of a step are in no checkpoint"
        flats = fragments.whole(self.model, self._optimizer)
        fragments.write(folder, 0, 1, flats, fragments.buffers(self.model))

    def load(self, folder: Path) -> None:
        flats = fragments.whole(self.model, self._optimizer)
        fragments.read(folder, 0, flats, fragments.buffers(self.model))

    def state(self, folder: Path) -> dict[str, Tensor]:
        return weights_of(self.model)

    def close(self) -> None:
        pass


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A whole module's weights on the CPU; of tied ones each once."""
    found = [*model.named_parameters(), *fragments.buffers(model).items()]
    return {name: value.detach().cpu() for name, value in found}


def make(model: nn.Module, groups: list[dict[str, Any]], config: Config) -> Engine:
    if config.zero.engine == "torch":
        return TorchEngine(model, groups, config)
    from jobs.zero import ZeroEngine

    return ZeroEngine(model, groups, config)


def tell(engine: Engine, phases: Phases) -> None:
    """Lets phases hear of an engine's collectives, which run inside its backward passes and steps. On a GPU they run
    beside the computation, and what of them is not hidden stays a part of the phase that had to wait for it."""
    if not isinstance(engine, TorchEngine) and engine.device.type == "cpu":
        from jobs import zero

        zero.time_exchanges(phases)


def kind(device: torch.device) -> str:
    """What computes, as a price list may call it: "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def pinned(batch: Batch, device: torch.device) -> Batch:
    """A batch that can be copied to a device while it computes; what lies there already is left alone."""
    if device.type != "cuda":
        return batch
    return {key: value if value.is_cuda else value.pin_memory() for key, value in batch.items()}


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device that computes."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def set_lr_of(optimizer: Any, factor: float, stage: int) -> float:
    """What `Engine.set_lr` says, of an optimizer."""
    for group in optimizer.param_groups:
        group["closed"] = group["stage"] > stage
        group["lr"] = 0.0 if group["closed"] else group["peak_lr"] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)


def close(optimizer: Any) -> None:
    """No group takes the next step; `set_lr_of` opens them again."""
    for group in optimizer.param_groups:
        group["closed"] = True
