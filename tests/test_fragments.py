"""Training state on disk: what some ranks wrote, others read, or they say what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from jobs import fragments
from jobs.fragments import Flat, Span, StateError

SIZES = {"a": 7, "b": 3, "c": 1}


def laid_out(rank: int, world: int, values: float | None = None) -> list[Flat]:
    """The parameters laid end to end and cut into even parts, as ZeRO does: that of a rank. With `values` every element
    is its place among all plus this; without, it is empty."""
    total = sum(SIZES.values())
    size = -(-total // world)
    first, flat, spans, at = rank * size, torch.zeros(size), [], 0
    for name, count in SIZES.items():
        low, high = max(at, first), min(at + count, first + size)
        if low < high:
            spans.append(Span(name, low - at, low - first, high - low))
        at += count
    state: dict[str, Any] = {}
    if values is not None:
        flat = torch.arange(first, first + size) + values
        state = {"step": torch.tensor(3.0), "exp_avg": -flat, "momentum_buffer": None}
    return [Flat(flat, state, tuple(spans))]


def saved(folder: Path, world: int) -> Path:
    for rank in range(world):
        buffers = {"seen": torch.tensor(10 + rank)}
        fragments.write(folder, rank, world, laid_out(rank, world, 0.5), buffers)
    return folder


@pytest.mark.parametrize("before", [1, 2, 3, 13])
@pytest.mark.parametrize("after", [1, 2, 4, 13])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, before: int, after: int) -> None:
    saved(tmp_path, before)
    for rank in range(after):
        [flat], seen = laid_out(rank, after), torch.tensor(0)
        fragments.read(tmp_path, rank, [flat], {"seen": seen})
        assert int(seen) == 10 + rank % before
        real = sum(span.count for span in flat.spans)
        first = rank * len(flat.weights)
        assert flat.weights[:real].tolist() == [first + place + 0.5 for place in range(real)]
        if real:
            assert flat.state["exp_avg"][:real].tolist() == (-flat.weights[:real]).tolist()
            assert set(flat.state) == {"step", "exp_avg"}
            assert float(flat.state["step"]) == 3.0
        else:
            assert flat.state == {}


def test_ranks_that_hold_the_same_write_each_a_part(tmp_path: Path) -> None:
    [whole] = laid_out(0, 1, 0.5)
    for rank in range(3):
        fragments.write(tmp_path, rank, 3, [whole.share(rank, 3)], {})
    sizes = [file.stat().st_size for file in sorted(tmp_path.iterdir())]
    assert len(sizes) == 3
    [found] = laid_out(0, 1)
    fragments.read(tmp_path, 0, [found], {})
    assert found.weights.tolist() == whole.weights.tolist()


def test_a_part_that_was_not_yet_open_has_no_state_again(tmp_path: Path) -> None:
    [flat] = laid_out(0, 1, 0.5)
    flat.state.clear()
    fragments.write(tmp_path, 0, 1, [flat], {})
    [later] = laid_out(0, 1, 9.0)
    fragments.read(tmp_path, 0, [later], {})
    assert later.state == {}
    assert later.weights.tolist() == flat.weights.tolist()


def test_what_stands_in_a_checkpoint(tmp_path: Path) -> None:
    """Of a module: what its optimizer steps, and the buffers that it saves; no pickle."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], fused=True)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    fragments.write(tmp_path, 0, 1, fragments.whole(model, optimizer), fragments.buffers(model))
    with safe_open(tmp_path / "part_00000_of_00001.safetensors", framework="pt") as file:
        names = set(file.keys())
    trained = ("0.weight", "0.bias", "1.weight", "1.bias")
    wanted = {f"{key}/{name}" for key in ("weight", "step", "exp_avg", "exp_avg_sq") for name in trained}
    assert names == wanted | {f"buffer/1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "part_00001_of_00002.safetensors").unlink(), "does not hold the parts of 2 ranks"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "does not hold the parts of any ranks: nothing"),
        (lambda folder: (folder / "part_00000_of_00002.safetensors").write_bytes(b"torn"), "cannot be read"),
    ],
)
def test_state_that_is_not_whole_is_refused(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(saved(tmp_path, 2))
    with pytest.raises(StateError, match=words) as error:
        fragments.read(tmp_path, 0, laid_out(0, 1), {})
    assert str(tmp_path) in str(error.value)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    larger = Flat(torch.zeros(9), {}, (Span("a", 0, 0, 9),))
    with pytest.raises(StateError, match="it has 7 of the 9 numbers wanted of a"):
        fragments.read(tmp_path, 0, [larger], {})
    with pytest.raises(StateError, match="another model: it has no mean"):
        fragments.read(tmp_path, 0, [], {"mean": torch.zeros(1)})
