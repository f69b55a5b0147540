"""DeepSpeed ZeRO as an engine (see `jobs.engine`), over the process group that Ray Train made.

This is the only home of deepspeed, which is imported inside the worker: its import probes for accelerators, which the
driver of a GPU cluster may lack. Its JSON is derived from the config, so that no number is written twice.

Gradients go over the wire once in an optimizer step at stages 0 and 1, after each pass at stages 2 and 3, whose ranks
keep only their part of them; parameters that are frozen are in no bucket.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs import fragments
from jobs.engine import close, optimizer_of, set_lr_of, use_bf16, weights_of
from jobs.fragments import Flat, Span
from jobs.phases import Phases, Timed
from mmagent.config import Config
from mmagent.model import Batch


class ZeroEngine:
    """ZeRO at any stage."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: Config) -> None:
        deepspeed = _import_deepspeed()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._inner = optimizer_of(groups, config)
        # The parameters of its groups, before ZeRO puts flat ones in their place.
        self._members = [list(group["params"]) for group in self._inner.param_groups]
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=self._inner, config=zero_config(config, self._world, model)
        )
        self._passes = self._left = config.share(self._world).passes
        self._stage, self._clip_norm = config.zero.stage, config.optim.clip_norm
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
        if self._stage == 0 and self._clip_norm and self._left == 1:
            # DeepSpeed 0.19 clips here by a factor of one dimension, which gradients without any refuse.
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self._engine.step()
        self._left = self._left - 1 or self._passes

    def skip(self) -> None:
        close(self._zero)

    def set_lr(self, factor: float, stage: int = 0) -> float:
        return set_lr_of(self._zero, factor, stage)

    def save(self, folder: Path) -> None:
        flats = self._flats()
        if self._stage == 0:
            flats = [flat.share(self._rank, self._world) for flat in flats]
        fragments.write(folder, self._rank, self._world, flats, fragments.buffers(self.model))

    def load(self, folder: Path) -> None:
        fragments.read(folder, self._rank, self._flats(), fragments.buffers(self.model))
        if self._stage in (1, 2):
            self._zero.update_lp_params()  # what computes, of the fp32 weights, its own and the other ranks'
            self._zero._hp_optimizer_states_linked = False
        elif self._stage == 3:
            # What is whole now (small parameters, and those that a pass without a backward one has left) is of before.
            # It is not gathered here: what is whole before the first pass, DeepSpeed does not see used by another
            # module than its own, and takes away before its gradient comes.
            if stale := [each for each in self.model.parameters() if each.ds_status.name == "AVAILABLE"]:
                stale[0].partition(stale)
            for index in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)

    def state(self, folder: Path) -> dict[str, Tensor]:
        if self._stage < 3:
            return weights_of(self.model) if self._rank == 0 else {}
        out = {name: value.detach().cpu() for name, value in fragments.buffers(self.model).items()}
        with tempfile.TemporaryDirectory(prefix=".weights_", dir=folder) as place:
            for index, (name, value) in enumerate(self._gathered()):
                if self._rank == 0:
                    file = Path(place) / f"{index}.safetensors"
                    save_file({name: value.detach().contiguous()}, file)
                    out |= load_file(file)  # mapped: it takes no memory, also when the file has lost its name
        return out if self._rank == 0 else {}

    def close(self) -> None:
        # Its hooks hang on nodes of autograd, where no garbage collection finds what they hold: all that it has.
        self._engine.destroy()
        if self._stage == 3:
            from deepspeed.runtime.zero import parameter_offload as offload

            # DeepSpeed 0.19 lays every model that it partitions on a list of the process, and takes none off it.
            offload.FWD_MODULE_STACK[:] = [each for each in offload.FWD_MODULE_STACK if each is not self.model]

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """One whole parameter after the other."""
        import deepspeed

        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter

    def _flats(self) -> list[Flat]:
        """Where this rank keeps what it trains."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if self._stage == 0:
            return fragments.whole(self.model, self._inner)
        if self._stage == 3:
            return list(self._of_stage_3(names))
        out = []
        for group, members in zip(self._inner.param_groups, self._members, strict=True):
            [flat] = group["params"]  # this rank's range of the group's parameters, laid end to end
            here = [(names[id(each)], mine) for each in members if (mine := each._hp_mapping) is not None]
            places = ((name, mine.lp_fragment_address, mine.hp_fragment_address) for name, mine in here)
            spans = tuple(Span(name, of.start, at.start, of.numel) for name, of, at in places)
            out.append(Flat(flat.data, self._inner.state[flat], spans))
        return out

    def _of_stage_3(self, names: dict[int, str]) -> Iterator[Flat]:
        """Each parameter is cut into as many ranges as there are ranks, the last ones padded, and a rank's ranges of a
        group are laid end to end."""
        for members, flat in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            spans, at = [], 0
            for parameter in members:
                size = parameter.partition_numel()
                start = min(self._rank * size, parameter.ds_numel)
                spans.append(Span(names[id(parameter)], start, at, min(size, parameter.ds_numel - start)))
                at += size
            yield Flat(flat.data, self._inner.state[flat], tuple(spans))


def time_exchanges(phases: Phases) -> None:
    """Lets phases hear of all of DeepSpeed's exchanges."""
    from deepspeed.comm import comm

    comm.cdb = Timed(comm.cdb, phases)


_BUCKET, _SMALL = 500_000_000, 100_000  # parameters; DeepSpeed's defaults


def zero_config(config: Config, world: int, model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from the config, for a group of so many workers that train a model."""
    share, parameters = config.share(world), list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    vectors = max((parameter.numel() for parameter in parameters if parameter.ndim < 2), default=0)
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": min(_BUCKET, trained),  # a bucket is memory: there is none for what is frozen
        "stage3_param_persistence_threshold": min(_SMALL, vectors),  # what is no larger stays whole on every rank
    }
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.zero.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": share.micro_batch,
        "gradient_accumulation_steps": share.passes,
        "gradient_clipping": config.optim.clip_norm if config.zero.stage else 0.0,  # see `ZeroEngine.step`
        "zero_optimization": zero,
        # Autocast, as `TorchEngine` does: parameters stay in fp32, and a layer takes what it computes best in.
        "torch_autocast": {"enabled": use_bf16(config), "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,  # `SGD`; a step of it needs nothing but a parameter and its gradient
        "zero_force_ds_cpu_optimizer": False,  # torch's steps on a CPU as well, and needs no compiler
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


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
    _send_scalars(deepspeed)
    return deepspeed


def _send_scalars(deepspeed: Any) -> None:
    """Has DeepSpeed take parameters without dimensions (a temperature, a gate). Version 0.19 sends parameters to the
    other ranks as bytes, as which torch shows nothing without a dimension: they have one for as long as that takes."""
    engine, init = deepspeed.DeepSpeedEngine, deepspeed.zero.Init
    send_all, send_one = engine._broadcast_model, init._zero_init_param
    if hasattr(send_all, "__wrapped__"):
        return

    @functools.wraps(send_all)
    def all_sent(self: Any) -> None:  # stages 0 to 2
        scalars = [each for each in self.module.parameters() if each.ndim == 0]
        for each in scalars:
            each.data = each.data.view(1)
        send_all(self)
        for each in scalars:
            each.data = each.data.view(())

    @functools.wraps(send_one)
    def one_sent(self: Any, parameter: Any) -> None:  # stage 3, which parts it then
        scalar = parameter.ndim == 0
        if scalar:
            parameter.data = parameter.data.view(1)
        send_one(self, parameter)
        if scalar:
            parameter.ds_shape = torch.Size([])

    engine._broadcast_model, init._zero_init_param = all_sent, one_sent
