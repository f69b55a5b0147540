"""Checkpoints: whole or passed over, the last good one survives a full disk, and the error names the folder."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.checkpoint import MARKER, CheckpointError, Checkpoints

Loop = dict[str, Any]


def loop(step: int, score: float = 0.0, loss: float = 1.0) -> Loop:
    return {"step": step, "score": score, "loss": loss, "position": {"epoch": 0, "window": 0, "row": step}}


def writer(content: str = "weights", size: int = 1) -> Callable[[Path], None]:
    return lambda folder: torch.save({content: torch.zeros(size)}, folder / "part.pt")


def alone(folder: Path, keep_last: int = 2) -> Checkpoints:
    return Checkpoints(folder, rank=0, barrier=bool, keep_last=keep_last)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    checkpoints.save(writer("first"), loop(10))
    path = checkpoints.save(writer("second"), loop(20, 0.5))
    found = checkpoints.latest()
    assert found is not None
    assert (found.path, found.step, dict(found.loop)) == (path, 20, loop(20, 0.5))
    assert list(torch.load(path / "part.pt")) == ["second"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / MARKER).unlink(),
        lambda path: (path / "part.pt").unlink(),
        lambda path: (path / "loop.json").unlink(),
        lambda path: (path / "part.pt").write_bytes((path / "part.pt").read_bytes()[:-1]),
        lambda path: (path / "loop.json").write_text((path / "loop.json").read_text().replace("20", "30")),
        lambda path: (path / MARKER).write_text('{"part.pt": "'),
        lambda path: os.truncate(path / "part.pt", 0),
    ],
    ids=["no marker", "a part lost", "no state", "a part cut off", "a state changed", "marker torn", "emptied"],
)
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    checkpoints = alone(tmp_path)
    checkpoints.save(writer(), loop(10, 0.1))
    damage(checkpoints.save(writer(), loop(20, 0.9)))
    for found in (checkpoints.latest(), checkpoints.best()):
        assert found is not None
        assert found.step == 10


def test_a_worker_killed_while_writing_leaves_the_last_one(tmp_path: Path) -> None:
    alone(tmp_path).save(writer(), loop(10))
    child = os.fork()
    if not child:  # pragma: no cover

        def killed(folder: Path) -> None:
            writer()(folder)
            os.kill(os.getpid(), 9)

        alone(tmp_path).save(killed, loop(20))
    os.waitpid(child, 0)
    found = alone(tmp_path).latest()
    assert found is not None
    assert found.step == 10
    alone(tmp_path).save(writer(), loop(20))  # its remains are in nobody's way
    assert steps(tmp_path) == [10, 20]
    assert [path.name for path in tmp_path.glob(".draft*")] == []


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path, keep_last=2)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.3), (5, 0.4)):
        checkpoints.save(writer(), loop(step, score))
    assert steps(tmp_path) == [2, 4, 5]
    best, latest = checkpoints.best(), checkpoints.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, latest.step) == (2, 5)


def test_several_of_the_best_are_kept_where_asked(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, rank=0, barrier=bool, keep_last=1, keep_best=2)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.7), (5, 0.3), (6, 0.2)):
        checkpoints.save(writer(), loop(step, score))
    assert steps(tmp_path) == [2, 4, 6]


def test_what_is_torn_is_named_with_its_reason(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    checkpoints.save(writer(), loop(10))
    (checkpoints.save(writer(), loop(20)) / MARKER).unlink()
    assert checkpoints.latest() is not None
    (line,) = checkpoints.torn
    assert "step_00000020 is torn and passed over: marker.json is missing" in line


# ---------------------------------------------------------------------------------------------- beside the training


@pytest.fixture
def far() -> Iterator[Path]:
    """A folder on another file system than the temporary folder."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(prefix="mmagent-tests-", dir=memory) as folder:
        yield Path(folder)


def test_the_hashes_are_those_of_the_files_wherever_they_come_from(tmp_path: Path, far: Path) -> None:
    for folder in (tmp_path, far):
        path = alone(folder / "checkpoints").save(writer(size=1000), loop(10))
        marker = json.loads((path / MARKER).read_text())
        assert marker.keys() == {"part.pt", "loop.json"}
        assert all(hashlib.sha256((path / file).read_bytes()).hexdigest() == marker[file] for file in marker)
        assert [file.name for file in path.parent.iterdir()] == [path.name]  # no draft, nothing staged
    assert not list(Path(tempfile.gettempdir()).glob("mmagent-checkpoint-*"))


def test_training_goes_on_while_a_checkpoint_is_brought_home(tmp_path: Path) -> None:
    """The second rank's part is late: the first does not wait for it, and nothing is sealed without it."""
    lasts = [True, True]
    ranks = [
        Checkpoints(tmp_path, rank=rank, world=2, barrier=lambda mine: mine and all(lasts), keep_last=2)
        for rank in range(2)
    ]
    ranks[0].begin(part(0), loop(10))
    time.sleep(0.3)
    assert steps(tmp_path) == []
    assert not ranks[0].failed
    ranks[1].begin(part(1), loop(10))
    ranks[1].wait()
    ranks[0].wait()
    assert steps(tmp_path) == [10]


def test_two_ranks_that_write_one_file_make_no_checkpoint(tmp_path: Path) -> None:
    errors = together(tmp_path, [part(0), part(0)], loop(10))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert "two ranks wrote rank_0.pt" in str(errors[0])
    assert steps(tmp_path) == []


def test_an_error_met_beside_the_training_is_raised_by_the_next_wait(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    checkpoints.save(writer(), loop(10))
    checkpoints.begin(lambda folder: (folder / "part.pt").symlink_to("/proc/self/mem"), loop(20))
    deadline = time.monotonic() + 10
    while not checkpoints.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert checkpoints.failed
    with pytest.raises(CheckpointError, match=r"the last good checkpoint is .*step_00000010"):
        checkpoints.begin(writer(), loop(30))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    checkpoints.save(writer(), loop(30))
    assert steps(tmp_path) == [10, 30]


def test_of_equal_scores_the_lowest_loss_is_the_best(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path, keep_last=1)
    for step, loss in ((1, 0.5), (2, 0.2), (3, 0.4)):
        checkpoints.save(writer(), loop(step, 0.9, loss))
    assert steps(tmp_path) == [2, 3]
    best = checkpoints.best()
    assert best is not None
    assert best.step == 2


def test_the_same_step_saved_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    checkpoints.save(writer("old"), loop(10))
    path = checkpoints.save(writer("new"), loop(10))
    assert list(torch.load(path / "part.pt")) == ["new"]
    assert steps(tmp_path) == [10]


# ---------------------------------------------------------------------------------------------- several ranks


def together(folder: Path, writes: list[Callable[[Path], None]], state: Loop) -> list[BaseException | None]:
    """Every rank saves in a thread of its own; the error of each."""
    meeting, votes = threading.Barrier(len(writes)), [True] * len(writes)
    errors: list[BaseException | None] = [None] * len(writes)

    def work(rank: int) -> None:
        def barrier(mine: bool) -> bool:
            votes[rank] = mine
            meeting.wait(10)
            everyone = all(votes)
            meeting.wait(10)
            return everyone

        try:
            Checkpoints(folder, rank=rank, barrier=barrier, keep_last=2, world=len(writes)).save(writes[rank], state)
        except CheckpointError as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(writes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return errors


def part(rank: int) -> Callable[[Path], None]:
    return lambda folder: torch.save(rank, folder / f"rank_{rank}.pt")


def fails(_: Path) -> None:
    raise RuntimeError("the file system went away")


def test_a_checkpoint_holds_every_ranks_part(tmp_path: Path) -> None:
    assert together(tmp_path, [part(rank) for rank in range(3)], loop(10)) == [None] * 3
    assert {file.name for file in (tmp_path / "step_00000010").glob("rank_*")} == {
        f"rank_{rank}.pt" for rank in range(3)
    }


@pytest.mark.parametrize("bad", [0, 1])
def test_where_one_rank_cannot_write_none_goes_on(tmp_path: Path, bad: int) -> None:
    together(tmp_path, [part(0), part(1)], loop(10))
    writes = [part(0), part(1)]
    writes[bad] = fails
    errors = together(tmp_path, writes, loop(20))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert "the file system went away" in str(errors[bad])
    assert "another rank could not write its part" in str(errors[1 - bad])
    assert all("the last good checkpoint is " in str(error) and "step_00000010" in str(error) for error in errors)
    assert steps(tmp_path) == [10]


# ---------------------------------------------------------------------------------------------- a full disk

MIB = 1 << 20


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root only; the next test limits the file size instead")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_the_new_checkpoint_only(tiny_disk: Path) -> None:
    checkpoints = alone(tiny_disk / "checkpoints", keep_last=1)
    kept = checkpoints.save(writer("good", MIB // 4), loop(10))  # 1 MiB
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(writer("too much", MIB), loop(20))  # 4 MiB
    words = str(error.value)
    assert str(tiny_disk / "checkpoints") in words
    assert f"the last good checkpoint is {kept}" in words
    found = checkpoints.latest()
    assert found is not None
    assert list(torch.load(found.path / "part.pt")) == ["good"]
    # The run goes on where there is room again: nothing of the failed one takes it.
    (tiny_disk / "other").write_bytes(bytes(MIB // 2))
    (tiny_disk / "other").unlink()
    checkpoints.save(writer("small", MIB // 8), loop(30))
    assert steps(tiny_disk / "checkpoints") == [30]


def test_a_disk_that_is_full_at_the_first_checkpoint(tiny_disk: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        alone(tiny_disk / "checkpoints").save(writer(size=MIB), loop(10))
    assert alone(tiny_disk / "checkpoints").latest() is None


def test_a_file_that_may_not_grow_costs_the_new_checkpoint_only(tmp_path: Path) -> None:
    kept = alone(tmp_path).save(writer(size=1000), loop(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            alone(tmp_path).save(writer(size=MIB), loop(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write a checkpoint into {tmp_path}" in str(error.value)
    assert f"the last good checkpoint is {kept}" in str(error.value)
    assert steps(tmp_path) == [10]


def test_the_error_says_that_the_disk_is_full(tiny_disk: Path) -> None:
    """The words of whoever wrote: Python's own say it, and so must torch's archive writer."""

    def plainly(folder: Path) -> None:
        (folder / "part").write_bytes(bytes(4 * MIB))

    for write in (plainly, writer(size=MIB)):
        with pytest.raises(CheckpointError, match="the disk is full"):
            alone(tiny_disk / "checkpoints").save(write, loop(10))
