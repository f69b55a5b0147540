"""Training state on disk: each rank writes the ranges that it keeps, and any number of ranks reads those that it needs.

    part_00001_of_00002.safetensors   of rank 1 of 2:
        weight/NAME                   a range of a parameter, flattened; its place is in the file's metadata
        exp_avg/NAME, ...             the same range of the optimizer's state
        step/NAME                     a number of the whole parameter
        buffer/NAME                   what the module keeps beside its parameters, whole

Nothing in it knows a ZeRO stage, a number of ranks or DeepSpeed, and nothing in it is a pickle: a run goes on at
another stage and with other workers. Parameters that no optimizer holds are not in it: they are what the config makes
them. Reading maps the files and copies the wanted ranges; neither way holds anything twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_NUMBERS = ("step",)  # what an optimizer counts of a whole parameter


class StateError(OSError):
    """Saved state that is not whole, or is of another model; names the folder and what is missing."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a range of a parameter lies in a tensor."""

    name: str  # of the parameter
    start: int  # first element, of the flattened parameter
    at: int  # where it is in the tensor, flattened
    count: int  # elements


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor that an optimizer steps: a parameter, or ranges of many, as an engine lays them out."""

    weights: Tensor
    state: dict[str, Any]  # the optimizer's of it, which is read and filled
    spans: tuple[Span, ...]

    def share(self, rank: int, world: int) -> Flat:
        """What one of several ranks writes that all hold the same."""
        cuts = ((span, span.count * rank // world, span.count * (rank + 1) // world) for span in self.spans)
        return replace(self, spans=tuple(Span(s.name, s.start + a, s.at + a, b - a) for s, a, b in cuts))


def whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Flat]:
    """The layout of an optimizer that steps the model's parameters themselves."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        Flat(parameter.data, optimizer.state[parameter], (Span(names[id(parameter)], 0, 0, parameter.numel()),))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a module keeps beside its parameters; a buffer that is made anew with it is none of its state."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def write(folder: Path, rank: int, world: int, flats: Iterable[Flat], kept: Mapping[str, Tensor]) -> None:
    """Writes a rank's part. `kept`: see `buffers`.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    tensors = {f"buffer/{name}": buffer.detach().contiguous() for name, buffer in kept.items()}
    ranges: dict[str, tuple[int, int]] = {}
    for flat in flats:
        for span in (span for span in flat.spans if span.count):
            ranges[span.name] = (span.start, span.count)
            tensors[f"weight/{span.name}"] = _range(flat.weights, span)
            for key, value in flat.state.items():
                if key in _NUMBERS:
                    tensors[f"{key}/{span.name}"] = torch.as_tensor(value, dtype=torch.float32).cpu().clone()
                elif value is not None:  # SGD's momentum before its first step
                    tensors[f"{key}/{span.name}"] = _range(value, span)
    save_file(tensors, folder / _file(rank, world), metadata={"ranges": json.dumps(ranges)})


def read(folder: Path, rank: int, flats: Iterable[Flat], kept: Mapping[str, Tensor]) -> None:
    """Fills weights, optimizer state and buffers with what was saved, by however many ranks.

    Raises:
        StateError: a part is missing or damaged, or the state is of another model.
    """
    saved = _Saved(folder)
    with torch.no_grad():
        for flat in flats:
            _fill(saved, flat)
        for name, buffer in kept.items():
            # A rank's own; with more ranks than before some get the same.
            buffer.copy_(saved.buffer(name, rank % saved.world))


class _Saved:
    """The parts in a folder, mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("part_*_of_*.safetensors"))
        self.world = int(files[0].stem.rpartition("_")[2]) if files else 0
        if not files or [file.name for file in files] != [_file(rank, self.world) for rank in range(self.world)]:
            raise StateError(f"{folder} does not hold the parts of {self.world or 'any'} ranks: {_names(files)}")
        try:
            self._parts = [safe_open(file, framework="pt") for file in files]
        except SafetensorError as error:
            raise StateError(f"a part in {folder} cannot be read: {error}") from error
        self._places: dict[str, list[tuple[int, int, int]]] = {}  # name -> (part, start, count)
        self._keys: dict[str, set[str]] = {}
        for index, part in enumerate(self._parts):
            for name, (start, count) in json.loads(part.metadata()["ranges"]).items():
                self._places.setdefault(name, []).append((index, start, count))
            for tensor in part.keys():  # noqa: SIM118  no mapping
                key, _, name = tensor.partition("/")
                self._keys.setdefault(name, set()).add(key)

    def states(self, name: str) -> set[str]:
        """What the optimizer held of a parameter."""
        return self._keys.get(name, set()) - {"weight"}

    def number(self, key: str, name: str) -> float:
        [part, *_] = self._places[name][0]
        return float(self._parts[part].get_tensor(f"{key}/{name}"))

    def buffer(self, name: str, rank: int) -> Tensor:
        try:
            return self._parts[rank].get_tensor(f"buffer/{name}")
        except SafetensorError as error:
            raise StateError(f"{self.folder} is of another model: it has no {name}") from error

    def fill(self, key: str, span: Span, target: Tensor) -> None:
        """Copies a range of a parameter, or of its state, from wherever it lies. target: (span.count,)."""
        found = 0
        for part, start, count in self._places.get(span.name, ()):
            low, high = max(start, span.start), min(start + count, span.start + span.count)
            if low < high:
                values = self._parts[part].get_slice(f"{key}/{span.name}")[low - start : high - start]
                target[low - span.start : high - span.start].copy_(values)
                found += high - low
        if found != span.count:
            raise StateError(
                f"{self.folder} is of another model: it has {found} of the {span.count} numbers wanted of {span.name}"
            )


def _fill(saved: _Saved, flat: Flat) -> None:
    """What the optimizer had no state of (a part that was not yet open) has none again."""
    spans = [span for span in flat.spans if span.count]
    before = dict(flat.state)
    flat.state.clear()
    for key in sorted({key for span in spans for key in saved.states(span.name)}):
        holders = [span for span in spans if key in saved.states(span.name)]
        if key in _NUMBERS:
            number = max(saved.number(key, span.name) for span in holders)
            flat.state[key] = torch.tensor(number, dtype=torch.float32, device=flat.weights.device)
            continue
        old = before.get(key)
        flat.state[key] = torch.zeros_like(flat.weights) if old is None else old.zero_()
        for span in holders:
            saved.fill(key, span, _range(flat.state[key], span))
    for span in spans:
        saved.fill("weight", span, _range(flat.weights, span))


def _range(tensor: Tensor, span: Span) -> Tensor:
    return tensor.detach().view(-1).narrow(0, span.at, span.count)


def _file(rank: int, world: int) -> str:
    return f"part_{rank:05d}_of_{world:05d}.safetensors"


def _names(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files) or "nothing there"
