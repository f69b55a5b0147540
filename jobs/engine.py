"""The engine of a training loop: forward, backward, step, save, load; DeepSpeed ZeRO, or plain torch in one process.

The loop never asks which. This is the only home of deepspeed, which is imported inside the worker: its import probes
for accelerators, which the driver of a GPU cluster may lack. Its JSON is derived from the config, so that no number is
written twice.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jobs.phases import Phases, Timed
from mmagent.config import Config
from mmagent.model import Batch


class Engine(Protocol):
    """What the loop needs. `backward` and `step` are called once for each micro-batch; a step that ends an
    accumulation updates the parameters. A micro-batch's loss is divided by `train.accumulation`, however many there
    are: the sum over them is the mean over the samples of an optimizer step."""

    device: torch.device
    model: Any  # a module of the parts that `mmagent.freeze` knows

    def begin(self, micros: int) -> None:
        """An optimizer step of so many micro-batches begins; where it is not called there are `train.accumulation`."""
        ...

    def forward(self, batch: Batch) -> dict[str, Tensor]: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...

    def set_lr(self, factor: float, stage: int = 0) -> float:
        """Sets every group's learning rate to its peak times `factor`, and to nothing where the group opens at a later
        stage (see `mmagent.freeze.stage`); returns the highest."""
        ...

    def save(self, folder: Path) -> None:
        """Writes this rank's part into `folder`; all ranks must call it."""
        ...

    def load(self, folder: Path) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """The model's whole weights on rank 0, on the CPU; all ranks must call it."""
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
        self._accumulation = self._left = config.train.accumulation
        self._clip = config.optim.clip_norm
        self._bf16 = use_bf16(config)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = optimizer_of(groups, config)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            out: dict[str, Tensor] = self.model(batch)
        return out

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()

    def begin(self, micros: int) -> None:
        self._left = micros

    def step(self) -> None:
        self._left -= 1
        if not self._left:
            self._left = self._accumulation
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def set_lr(self, factor: float, stage: int = 0) -> float:
        return _set_lr(self._optimizer, factor, stage)

    def save(self, folder: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "torch.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def state(self) -> dict[str, Tensor]:
        return {key: value.detach().cpu() for key, value in self.model.state_dict().items()}


class ZeroEngine:
    """DeepSpeed ZeRO over the process group that Ray Train made."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: Config) -> None:
        deepspeed = _import_deepspeed()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer_of(groups, config), config=zero_config(config)
        )
        # What a gradual run has closed now moves later: going back to this checkpoint takes it back too.
        self._leaves_out_frozen = config.freeze.strategy != "gradual"
        self._accumulation = self._left = config.train.accumulation
        self.model: Any = model
        self.device = torch.device(self._engine.device)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self._engine(batch)
        return out

    def begin(self, micros: int) -> None:
        self._left = micros

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed counts by a fixed number; gradients are exchanged, and the step taken, where it is told.
        self._engine.set_gradient_accumulation_boundary(self._left == 1)
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()
        self._left = self._left - 1 or self._accumulation

    def set_lr(self, factor: float, stage: int = 0) -> float:
        return _set_lr(self._optimizer, factor, stage)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=self._leaves_out_frozen)

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag="zero", load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"the checkpoint {folder} holds no part for this rank")

    def state(self) -> dict[str, Tensor]:
        import deepspeed

        saved = self.model.state_dict().keys()  # a buffer that is made anew with the model is none of its weights
        out = {key: value.detach().cpu() for key, value in self.model.named_buffers() if key in saved}
        for name, parameter in self.model.named_parameters():
            # One parameter at a time: no rank ever holds the model twice.
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if torch.distributed.get_rank() == 0:
                    out[name] = parameter.detach().cpu().float().clone()
        return out


def make(model: nn.Module, groups: list[dict[str, Any]], config: Config) -> Engine:
    return (
        ZeroEngine(model, groups, config) if config.zero.engine == "deepspeed" else TorchEngine(model, groups, config)
    )


def tell(engine: Engine, phases: Phases) -> None:
    """Lets phases hear of an engine's collectives, which run inside its backward passes and steps. On a GPU they run
    beside the computation, and what of them is not hidden stays a part of the phase that had to wait for it."""
    if isinstance(engine, ZeroEngine) and engine.device.type == "cpu":
        from deepspeed.comm import comm

        comm.cdb = Timed(comm.cdb, phases)  # all of DeepSpeed's exchanges go through it


def pinned(batch: Batch, device: torch.device) -> Batch:
    """A batch that can be copied to a device while it computes; what lies there already is left alone."""
    if device.type != "cuda":
        return batch
    return {key: value if value.is_cuda else value.pin_memory() for key, value in batch.items()}


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device that computes."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def zero_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from the config."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {"stage": config.zero.stage},
        # Autocast, as `TorchEngine` does: parameters stay in fp32, and a layer takes what it computes best in.
        "torch_autocast": {"enabled": use_bf16(config), "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,  # `SGD`; a step of it needs nothing but a parameter and its gradient
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _set_lr(optimizer: Any, factor: float, stage: int) -> float:
    for group in optimizer.param_groups:
        group["closed"] = group["stage"] > stage
        group["lr"] = 0.0 if group["closed"] else group["peak_lr"] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed speaks at import and at every start; what matters of it is raised as an error.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    with contextlib.redirect_stdout(None):
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19 compiles an op for all-reduce within one machine at every first start on a CPU, which only its
    # inference calls. It wants a C++ compiler, and a worker that is killed meanwhile leaves a lock in
    # ~/.cache/torch_extensions that all later ones wait for without end.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed
