"""The rounds of faults, a few of them: what is hurt goes on, and what is lost would be seen."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jobs.lock import locked
from tests.bench import faults, lab
from tests.bench.faults import GLOO, Found


def line(step: int, *ids: str, loss: float = 1.0) -> dict[str, object]:
    return {"step": step, "ids": list(ids), "loss": loss.hex()}


def write(folder: Path, trace: lab.Trace) -> Path:
    (folder / "trace").mkdir(parents=True)
    for rank, lines in trace.items():
        (folder / "trace" / f"{rank}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def judged(tmp_path: Path, found: lab.Trace, *, same: bool = True) -> Found:
    wanted = {"rank_0": [line(1, "a"), line(2, "c")], "rank_1": [line(1, "b"), line(2, "d")]}
    return faults._judged("kind", 0, 1, False, "", write(tmp_path / "run", found), wanted, same=same)


def test_what_is_lost_and_repeated_is_seen(tmp_path: Path) -> None:
    found = judged(tmp_path, {"rank_0": [line(1, "a"), line(2, "a")], "rank_1": [line(1, "b"), line(2, "d")]})
    assert (found.lost, found.repeated, found.equal) == (1, 1, False)
    assert "part at step 2" in found.words
    assert (tmp_path / "run").exists()


def test_another_loss_is_seen(tmp_path: Path) -> None:
    other = {"rank_0": [line(1, "a"), line(2, "c")], "rank_1": [line(1, "b"), line(2, "d", loss=1.0 + 1e-12)]}
    found = judged(tmp_path, other)
    assert (found.lost, found.repeated, found.equal) == (0, 0, False)


def test_another_number_of_ranks_shares_out_the_same_steps(tmp_path: Path) -> None:
    found = judged(tmp_path, {"rank_0": [line(1, "a", "b"), line(2, "d", "c", loss=1.00001)]}, same=False)
    assert (found.lost, found.repeated, found.equal, found.words) == (0, 0, True, "")
    assert not (tmp_path / "run").exists()


def test_a_torn_file_is_another(tmp_path: Path) -> None:
    for seed in range(8):
        step = tmp_path / str(seed) / "step_00000004"
        step.mkdir(parents=True)
        for name in ("a", "b"):
            (step / name).write_bytes(b"0123456789")
        faults._tear(step.parent, random.Random(seed))
        assert {file.name: file.read_bytes() for file in step.iterdir()} != dict.fromkeys("ab", b"0123456789")


def test_two_at_once_do_not_take_each_others_folders(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(storage / "bench" / "faults"):
        assert faults.main(["--rounds", "1", "--ray", "0"], storage) == 2
    assert "is being worked on by process" in capsys.readouterr().err
    assert not (storage / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_go_on_where_they_stopped(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(GLOO)
    assert faults.main(["--rounds", str(count - 2), "--ray", "0"], tmp_path) == 0
    assert faults.main(["--rounds", str(count), "--ray", "0"], tmp_path) == 0
    assert f"{count - 2} of {count} rounds are known" in capsys.readouterr().out
    rows = json.loads((tmp_path / "runs" / "bench" / "faults.json").read_text())["rows"]
    found = {row["id"].removeprefix("faults."): row["value"] for row in rows}
    assert found["rounds"] == count
    assert not any(found[name] for name in ("samples_lost", "samples_repeated", "hangs", "trace_mismatches"))
    known = [json.loads(line) for line in (storage / "bench" / "faults.jsonl").read_text().splitlines()]
    assert {each["kind"] for each in known} == {*GLOO}
    assert all(each["hurts"] for each in known)
