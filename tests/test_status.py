"""What there is, and where an answer comes from: from the bundle to the shards and the feedback, and back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import pruning, status
from jobs.lock import ended, held, locked
from jobs.meter import Log
from mmagent import bundle, channels, feedback
from mmagent.record import Record
from mmagent.shards import Dataset
from tests.test_feedback import line


@pytest.fixture
def lived(
    storage: Path, tiny_bundle: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]]
) -> Path:  # fmt: skip
    """A storage root where a bundle was refitted to feedback, and answered."""
    records = make_records(8)
    base = make_dataset(storage / "data" / "tiny", {"train": records, "validation": records[:2]})
    refit = make_dataset(storage / "data" / "production-r001", {"train": records[:4], "validation": records[:2]})
    info = {**refit.info, "recipe": {"bases": ["tiny"], "feedback": ["fb_1", "fb_2"]}}
    (refit.path / "dataset.json").write_text(json.dumps(info))
    home = storage / "runs" / "production-r001" / "bundle"
    shutil.copytree(tiny_bundle, home)
    manifest = json.loads((home / "manifest.json").read_text())
    (home / "manifest.json").write_text(json.dumps({**manifest, "name": "production-r001", "data": "production-r001"}))
    channels.append("production", home, share=1.0, act="promote", by="tests")
    (home.parent / "metrics.jsonl").write_text(
        '{"kind": "validation", "step": 4, "score": 0.5}\n{"kind": "validation", "step": 8, "score": 0.75}\n'
        '{"kind": "train", "step": 8, "total_steps": 8, "samples": 64, "samples_per_s": 32.0}\n{"kind": "tra'
    )
    place = feedback.folder()
    place.mkdir(parents=True)
    answered = {"bundle": "production-r001", "channel": "production", "created_ms": 5}
    rows = [line(f"fb_{n}", records[0], {"label": "red"}, answered=answered if n == 3 else {"bundle": "tiny"})
            for n in range(4)]  # fmt: skip
    (place / "2026-01-01.a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert base.rows("train") == 8
    return storage


def test_an_answers_line_goes_back_to_shards_and_feedback(lived: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--answer", "ans_fb_3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"]["name"] == "production-r001"
    assert [each["name"] for each in found["data"]] == ["production-r001", "tiny"]
    assert found["feedback"] == ["fb_1", "fb_2"]
    shards = found["data"][1]["shards"]
    real = Dataset.open(lived / "data" / "tiny").hashes("train")
    assert shards["train/part-00000.parquet"] == next(iter(real.values()))[:16]
    assert status.main(["--answer", "ans_fb_3"]) == 0
    assert "production-r001" in capsys.readouterr().out


def test_feedback_leads_to_the_bundles_that_learned_from_it(lived: Path) -> None:
    assert status.learned_from("fb_1") == {
        "feedback": "fb_1", "bundles": ["production-r001"], "answers_corrected": ["ans_fb_3"],
    }  # fmt: skip
    assert status.learned_from("fb_3")["bundles"] == []


def test_everything_that_there_is(lived: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = status.everything()
    [run] = found["runs"]
    assert (run["name"], run["state"], run["best"], run["step"]) == ("production-r001", "done", 0.75, 8)
    assert (run["metric"], run["hours"]) == ("score", {"cpu": 0.0006})
    assert found["channels"][0]["bundle"].endswith("production-r001/bundle")
    assert status.main([]) == 0
    assert "production-r001" in capsys.readouterr().out


def test_what_is_not_here_is_told(lived: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("--answer", "ans_nobody"): "no service that runs here, and no feedback, knows the answer",
        ("--answer", "ans_fb_0"): "the bundle 'tiny' that gave it is not here any more",
        ("--feedback", "fb_9"): "there is no feedback 'fb_9'",
    }
    for arguments, words in cases.items():
        assert status.main([*arguments]) == 2
        assert words in capsys.readouterr().err
    assert bundle.find(lived / "runs" / "production-r001").name == "bundle"


# ---- states


def grown(folder: Path, *rows: dict[str, Any], size: int = 1000, used_s: int = 1000, **config: Any) -> Path:
    """A run that was last written to at a time, and takes some bytes."""
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(size))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for each in (*folder.iterdir(), folder):
        os.utime(each, (used_s, used_s))
    return folder


VALIDATED = {"kind": "validation", "step": 1, "score": 0.5, "main": "macro_f1", "macro_f1": 0.25}


def state_of(folder: Path) -> tuple[str, str]:
    [found] = [each for each in status.everything()["runs"] if each["name"] == folder.name]
    return found["state"], found.get("why", "")


def test_a_runs_state_is_what_it_is(storage: Path) -> None:
    runs = storage / "runs"
    asked = grown(runs / "asked", VALIDATED, {"kind": "stop", "step": 1, "reason": "asked to"})
    assert state_of(asked) == ("stopped", "")
    run = grown(runs / "r", VALIDATED)
    assert state_of(run)[0] == "failed"
    with locked(run):
        assert held(run) == str(os.getpid())
        assert state_of(run) == ("running", "")
    assert state_of(run) == ("stopped", "")
    with pytest.raises(ValueError, match="no more"), locked(run):
        raise ValueError("no more\nroom")
    assert state_of(run) == ("failed", "ValueError: no more room")
    with pytest.raises(KeyboardInterrupt), locked(run):
        raise KeyboardInterrupt
    assert state_of(run) == ("stopped", "")
    (run / "bundle").mkdir()
    (run / "bundle" / "manifest.json").write_text("{}")
    assert state_of(run) == ("done", "")


def test_a_run_whose_process_was_killed_has_failed(storage: Path) -> None:
    run = grown(storage / "runs" / "r", VALIDATED)
    program = (
        "import sys, time; from pathlib import Path; from jobs.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        assert state_of(run) == ("running", "")
        process.send_signal(signal.SIGKILL)
    assert state_of(run) == ("failed", "it was killed")
    assert ended(run)[0] == "failed"


def test_a_round_runs_while_its_channel_is_held(storage: Path) -> None:
    run = grown(storage / "runs" / "production-r002", VALIDATED)
    for number in (1, 2):
        (storage / "refine" / "production" / f"r00{number}").mkdir(parents=True)
    with locked(storage / "refine" / "production"):
        assert state_of(run) == ("running", "")


# ---- what it took


def test_hours_by_type_and_what_they_cost(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = grown(storage / "runs" / "r", VALIDATED, cluster={"workers": 4})
    starts = [(0.0, 1800.0, 2, "cpu"), (0.0, 3600.0, 2, "cpu"), (7200.0, 9000.0, 1, "NVIDIA H100 80GB HBM3")]
    rows = [{"start_s": s, "now_s": n, "workers": w, "type": kind} for s, n, w, kind in starts]
    (run / "usage.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"start')
    (run / "timing.json").write_text('{"evaluate_s": 900}')
    search = storage / "search" / "s"
    for name in ("t000", "t001"):
        trial = grown(search / "trials" / name, VALIDATED)
        (trial / "usage.jsonl").write_text(json.dumps({"start_s": 0, "now_s": 3600, "workers": 1, "type": "cpu"}))
    found = status.everything({"cpu": 0.1, "h100": 4.0})
    [made], [searched] = found["runs"], found["searches"]
    assert made["hours"] == {"NVIDIA H100 80GB HBM3": 0.5, "cpu": 3.0}  # two starts, and the test split's workers
    assert made["money"] == pytest.approx(2.3)
    assert (searched["hours"], searched["money"]) == ({"cpu": 2.0}, 0.2)
    assert found["total"] == {"hours": {"NVIDIA H100 80GB HBM3": 0.5, "cpu": 5.0}, "money": pytest.approx(2.5)}
    assert (made["best"], made["metric"]) == (0.5, "macro_f1")
    prices = storage / "prices.yaml"
    prices.write_text("cpu: 0.1\n")
    assert status.main(["--prices", str(prices)]) == 0
    shown = capsys.readouterr().out
    assert "hours NVIDIA H100 80GB HBM3 0.5, cpu 3" in shown
    assert "without_price NVIDIA H100 80GB HBM3" in shown
    for text in ("cpu: free", "- 3", "cpu: -1"):
        prices.write_text(text)
        assert status.main(["--prices", str(prices)]) == 2
        assert "no list of prices" in capsys.readouterr().err


def test_the_workers_write_down_how_long_they_are_there(storage: Path) -> None:
    run = storage / "runs" / "r"
    for workers in (2, 3):  # it goes on with another number
        log = Log(run, rank=0, workers=workers)
        log.rewind(0)  # figures of steps that are done again are dropped, hours are not
        log.write({"kind": "train", "step": 1, "loss": 1.0})
    Log(run, rank=1, workers=9).used()
    told = [json.loads(line) for line in (run / "usage.jsonl").read_text().splitlines()]
    assert [(row["workers"], row["type"]) for row in told] == [(2, "cpu"), (3, "cpu")]
    assert all(row["now_s"] >= row["start_s"] > 1e9 for row in told)


# ---- what goes


def served(place: Path) -> Path:
    (place / "bundle").mkdir()
    (place / "bundle" / "manifest.json").write_text("{}")
    return place / "bundle"


@pytest.fixture
def many(storage: Path) -> Path:
    """Runs r0 (the oldest) to r8 of 1,000,000 bytes, and two searches."""
    for number in range(9):
        grown(storage / "runs" / f"r{number}", VALIDATED, size=1_000_000, used_s=1000 + number)
    for number in range(2):
        grown(storage / "search" / f"s{number}", size=1_000_000, used_s=2000 + number)
    return storage


def names(found: Any) -> list[str]:
    return [each["name"] for each in found]


def test_the_oldest_goes_first_and_nothing_that_somebody_needs(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = many / "runs"
    for number in (0, 1, 2, 3):
        channels.append("production", served(runs / f"r{number}"), share=1.0, act="promote", by="tests")
        for place in (runs / f"r{number}" / "bundle", runs / f"r{number}"):
            os.utime(place, (1000 + number, 1000 + number))
    (runs / "r8" / "config.yaml").write_text(yaml.safe_dump({"start": {"bundle": "r4"}}))
    os.utime(runs / "r8" / "config.yaml", (1008, 1008))
    with locked(runs / "r5"):
        os.utime(runs / "r5" / ".lock", (1005, 1005))
        os.utime(runs / "r5", (1005, 1005))
        assert status.main(["--quota-gb", "0", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert names(found["would_go"]) == ["runs/r0", "runs/r6", "runs/r7", "runs/r8", "search/s0"]
        why = {each["name"]: each["why"] for each in found["stays"]}
        assert set(why) == {"runs/r1", "runs/r2", "runs/r3", "runs/r4", "runs/r5", "search/s1"}
        assert why["runs/r3"] == "the channel production serves it"
        assert why["runs/r4"] == "runs/r8 began with it"
        assert str(os.getpid()) in why["runs/r5"]
        assert "what is held is not deleted" in found["note"]
        assert len(list(runs.iterdir())) == 9
        assert status.main(["--quota-gb", "0.0085", "--delete", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert names(found["deleted"]) == ["runs/r0", "runs/r6", "runs/r7"]
    assert sorted(each.name for each in runs.iterdir()) == ["r1", "r2", "r3", "r4", "r5", "r8"]
    assert list((many / ".gone").iterdir()) == []


def test_one_is_deleted_by_name_unless_somebody_holds_it(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    channels.append("staging", served(many / "runs" / "r2"), share=1.0, act="promote", by="tests")
    channels.append("staging", served(many / "runs" / "r3"), share=0.1, act="promote", by="tests")
    (many / "refine" / "staging" / "r001").mkdir(parents=True)
    told = {"state": "begun", "bundle": str(many / "runs" / "r4" / "bundle"), "channel": "staging", "said": 1,
            "train": 1, "aside": {}}  # fmt: skip
    (many / "refine" / "staging" / "r001" / "round.json").write_text(json.dumps(told))
    cases = {
        "r2": "the channel staging serves it",
        "runs/r3": "it is the canary of the channel staging",
        "r4": "the round staging-r001 began with it",
        "s1": "it is the newest search",
        "nobody": "there is no run and no search 'nobody'",
    }
    for name, words in cases.items():
        assert status.main(["--delete", name]) == 2
        assert words in capsys.readouterr().err
    assert status.main(["--delete", "r0"]) == 0
    assert not (many / "runs" / "r0").exists()
    (many / "search" / "r1").mkdir()
    assert status.main(["--delete", "r1"]) == 2
    assert "runs/r1, search/r1" in capsys.readouterr().err
    for wrong in (["--delete"], ["--delete", "r5", "--quota-gb", "1"], ["--quota-gb", "-1"]):
        with pytest.raises(SystemExit):
            status.main(wrong)


def test_a_deletion_that_is_interrupted_leaves_nothing_half(many: Path) -> None:
    """The process ends where it is about to take the files away."""
    program = (
        "import os, shutil; from jobs import status; shutil.rmtree = lambda place, **_: os._exit(9) "
        "if '/runs-' in str(place) else None; status.main(['--delete', 'r0'])"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert not (many / "runs" / "r0").exists()
    [aside] = (many / ".gone").iterdir()
    assert (aside / "weights").stat().st_size == 1_000_000
    assert "r0" not in names(status.everything()["runs"])
    assert status.main(["--quota-gb", "50"]) == 0
    assert not (many / ".gone").exists()


def test_nothing_goes_where_a_channel_cannot_be_read(many: Path) -> None:
    (many / "channels").mkdir()
    (many / "channels" / "production.jsonl").write_text("what?\n")
    with pytest.raises(pruning.PruneError, match="nothing is deleted"):
        pruning.found()
    assert status.main(["--quota-gb", "0", "--delete"]) == 2
    assert len(list((many / "runs").iterdir())) == 9
