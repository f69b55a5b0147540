"""A channel's bundle refitted to feedback on a real Ray: poison set aside, new labels learned, judged, promoted; and
what is told where there is nothing to do, or something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import cluster, refine, rounds, submission
from jobs.lock import locked
from mmagent import bundle, channels, feedback
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.shards import Dataset
from tests.test_feedback import line

KEYS = ("ann", "bob", "cid", "dan")


@pytest.fixture
def said(
    storage: Path, tiny_bundle: Path, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
    make_png: Callable[..., bytes],
) -> Callable[..., None]:  # fmt: skip
    """``said(rows)``: feedback on answers of the channel production; each a picture's colour, by a key."""
    test = [  # of pictures in no other split: what training has seen is not judged by
        replace(each, images=(replace(each.images[0], bytes=make_png(each.target.label, (20 + n % 7, 20))),))
        for n, each in enumerate(make_records(40, "test"))
    ]
    splits = {"train": make_records(48), "validation": make_records(16, "validation"), "test": test}
    make_dataset(storage / "data" / "tiny", splits)
    channels.append("production", tiny_bundle, share=1.0, act="promote", by="tests")
    record = make_records(1)[0]

    def write(rows: list[tuple[str, str, tuple[int, int, int]]]) -> None:
        """(key, label, the picture's colour)."""
        place = feedback.folder()
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "2026-11-27.tests.jsonl", "a") as out:
            for number, (key, label, colour) in enumerate(rows):
                shown = replace(record.images[0], bytes=make_png(colour))
                asked = replace(record, images=(shown,), target=replace(record.target, label=None))
                told = line(f"fb_{key}{number}_{label}", asked, {"label": label}, key=key, created_ms=number)
                out.write(json.dumps({**told, "answered": {"channel": "production"}}) + "\n")

    return write


SHADES = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "white": (255, 255, 255)}
LIES = {"red": "green", "green": "blue", "blue": "black", "black": "red", "white": "red"}


def shades(count: int, *, keys: tuple[str, ...] = KEYS, liar: str = "") -> list[tuple[str, str, tuple[int, int, int]]]:
    """Pictures of slightly different shades, each told by one key; a liar says another colour."""
    out = []
    for number in range(count):
        name = [*SHADES][number % len(SHADES)]
        key = keys[number // len(SHADES) % len(keys)]
        r, g, b = SHADES[name]
        shade = (abs(r - number // 5 % 40), abs(g - number // 5 % 40), abs(b - number // 5 % 40))
        out.append((key, LIES[name] if key == liar else name, shade))
    return out


def run(*arguments: str) -> int:
    small = ("cluster.workers=1", "cluster.max_failures=0", "train.micro_batch=16", "optim.lr=0.005", "train.epochs=20")
    return refine.main(["--channel", "production", "--replay", "0.5", *arguments, *small])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_round_learns_a_new_label_and_takes_no_poison(
    ray_cluster: cluster.Cluster, said: Callable[..., None], storage: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said(shades(200, keys=(*KEYS, "eve"), liar="eve"))
    (tmp_path / "words.csv").write_text("color,circle\n")
    (tmp_path / "rules.yaml").write_text("slices: [modalities, form]\nswap: words.csv\nmax_swapped: 1.0\n")
    assert run("--grow", "--promote", "--rules", str(tmp_path / "rules.yaml")) == 0
    shown = capsys.readouterr().out
    place = storage / "refine" / "production" / "r001"
    aside = [json.loads(row) for row in (place / "aside.jsonl").read_text().splitlines()]
    assert {(each["key"], each["reason"]) for each in aside} == {("eve", "suspicious key")}
    assert len(aside) >= 30
    told = json.loads((place / "round.json").read_text())
    assert told["state"] == "accepted"
    assert told["train"] + told["validation"] + told["test"] + sum(told["aside"].values()) == 200
    verdict = json.loads((place / "gate.json").read_text())
    assert verdict["accepted"]
    checks = {each["name"]: each for each in verdict["checks"]}
    assert checks["new"]["after"] > checks["new"]["before"] + 0.3
    assert checks["fixed, with noisy image"]["rows"] == 40
    assert checks["fixed, with noisy image"]["passed"] is None
    assert "fixed, answers that change with words swapped" in checks
    assert "fixed, classify, gap of accuracy between groups of form" in checks
    assert verdict["flips"]["gained"] > verdict["flips"]["lost"]
    assert "Answers that changed" in (place / "gate.html").read_text()
    # The candidate answers the channel now, knows the new label, and says where it comes from.
    found = bundle.load(channels.read("production").bundle)
    assert found.path == storage / "runs" / "production-r001" / "bundle"
    assert found.labels[-1] == "white"
    assert len(Predictor.load(found.path, device="cpu").labels) == 5
    assert "channel production: production-r001" in shown
    assert (found.path / "memory.parquet").is_file()
    assert "answers that change with words swapped" in (found.path / "README.md").read_text()
    # The same feedback teaches nothing a second time.
    assert run("--grow") == 0
    assert "nothing new for production" in capsys.readouterr().out


def test_what_is_wrong_is_told_before_anything_is_trained(
    ray_cluster: cluster.Cluster, said: Callable[..., None], storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    assert "nothing new for production: 0 pieces of feedback" in capsys.readouterr().out
    said([("ann", "pink", (9, 9, 9))])
    assert run() == 0
    assert "1 set aside (1 unknown label)" in capsys.readouterr().out
    assert run("--least", "3", "--drift", "0.2") == 0
    waits = "production is left as it is: 1 new pieces of feedback of --least 3, no service tells of drift"
    assert waits in capsys.readouterr().out
    cases: dict[tuple[str, ...], str] = {
        ("--channel", "nowhere"): "there is no channel 'nowhere'",
        ("--hold", "tightly"): "distil, l2_sp, ewc, lora:R or none is wanted",
        ("--rules", "/nowhere.yaml"): "cannot read the gate's rules",
        ("optim.lrr=1",): "did you mean 'optim.lr'",
        ("--scrub", "nothing"): "MODULE:FUNCTION is wanted",
        ("--search", "1"): "2 trials or more are wanted",
    }
    for arguments, words in cases.items():
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    with locked(storage / "refine" / "production"):
        assert run() == 2
    assert "'production' is being worked on by process" in capsys.readouterr().err
    assert not list((storage / "refine" / "production").glob("r*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_learning_rate_is_searched(
    ray_cluster: cluster.Cluster, said: Callable[..., None], storage: Path
) -> None:  # fmt: skip
    said([each for each in shades(60) if each[1] != "white"])
    assert run("--search", "2", "train.epochs=6") in (0, refine.EXIT_REFUSED)
    place = storage / "search" / "production-r001"
    trials = json.loads((place / "trials.json").read_text())
    assert len({trial["sample"]["optim.lr"] for trial in trials}) == 2
    assert 0.005 in {trial["sample"]["optim.lr"] for trial in trials}
    found = bundle.load(place / "bundle")
    assert found.name == "production-r001"
    assert found.config.start.distil == 1.0
    assert (storage / "refine" / "production" / "r001" / "gate.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_as_a_submitted_job(
    ray_cluster: cluster.Cluster, said: Callable[..., None], storage: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through Ray's job submission: in a copy of the working directory, told by its exit status and its logs."""
    said([each for each in shades(60) if each[1] != "white"])
    rules = storage / "rules.yaml"
    rules.write_text("max_loss: 1\nmin_gain: -1\nmax_ece_rise: 1\nmax_slowdown: 1000\n")  # whatever it learns
    command = ["python", "-m", "jobs.refine", "--channel", "production", "--replay", "0.5", "--rules", str(rules)]
    small = ["cluster.workers=1", "train.micro_batch=16", "optim.lr=0.005", "train.epochs=20"]
    submission.run(ray_cluster.dashboard, [*command, *small], cluster.CHECKOUT)
    assert "round r001 of production" in capfd.readouterr().out
    assert bundle.load(storage / "runs" / "production-r001" / "bundle").name == "production-r001"
    told = json.loads((storage / "refine" / "production" / "r001" / "round.json").read_text())
    assert told["state"] == "accepted"
    assert run("--replay", "0.5") == 0  # here: nothing is left to learn


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("hold", ["l2_sp", "ewc", "lora:4", "none"])
def test_every_way_of_holding(
    ray_cluster: cluster.Cluster, said: Callable[..., None], storage: Path, hold: str
) -> None:  # fmt: skip
    said([each for each in shades(60) if each[1] != "white"])
    assert run("--hold", hold) in (0, refine.EXIT_REFUSED)
    assert bundle.load(storage / "runs" / "production-r001" / "bundle").config.start.bundle
    assert channels.read("production").bundle.endswith("tiny")  # nobody said --promote


def test_a_round_that_was_stopped_goes_on(
    said: Callable[..., None], storage: Path, tiny_bundle: Path
) -> None:  # fmt: skip
    args = refine._parser().parse_args(["--replay", "0.5"])
    found = bundle.load(tiny_bundle)
    first = refine._round(args, found)
    assert first.name == "r001"
    first.mkdir(parents=True)
    state: dict[str, Any] = {"state": "begun", "bundle": str(found.path), "asked": refine._asked(args)}
    (first / rounds.FILE).write_text(json.dumps(state))
    assert refine._round(args, found) == first
    (first / rounds.FILE).write_text(json.dumps({**state, "state": "refused"}))
    assert refine._round(args, found).name == "r002"
