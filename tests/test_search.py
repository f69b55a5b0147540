"""The search: what is told before the first trial, and whole searches on a real Ray that end in the winner's bundle."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster, search
from mmagent import Predictor, bundle
from mmagent import storage as storages
from mmagent.record import Record
from mmagent.shards import Dataset
from tests.bench import rays

SPACE: dict[str, Any] = {
    "trials": 4,
    "reduction": 2,
    "seeds": 2,
    "set": {"train.max_steps": 8},
    "space": {
        "optim.lr": {"loguniform": [1.0e-4, 1.0e-2]},
        "freeze.strategy": {"choice": ["connector", {"top": {"integer": [1, 2]}}]},
    },
}


@pytest.fixture
def arguments(
    storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path, make_dataset: Callable[..., Dataset],
    make_records: Callable[..., list[Record]],
) -> Callable[..., list[str]]:  # fmt: skip
    """What the command is called with, for a space."""
    splits = {"train": make_records(64), "validation": make_records(16, "validation"), "test": make_records(8, "test")}
    make_dataset(storage / "data" / "tiny", splits)
    recipe = tmp_path / "recipe.yaml"
    train = {"micro_batch": 8, "eval_every_steps": 4, "eval_rows": 16, "epochs": 1}
    recipe.write_text(
        yaml.safe_dump({**tiny_recipe, "train": train, "cluster": {"workers": 1, "max_failures": 0}}),
    )

    def make(name: str, *overrides: str, **changed: Any) -> list[str]:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**SPACE, **changed}))
        return ["--config", str(recipe), "--space", str(file), "--name", name, *overrides]

    return make


@pytest.mark.parametrize(
    ("changed", "overrides", "words"),
    [
        ({"space": {"optim.lrr": {"uniform": [0, 1]}}}, (), "did you mean 'optim.lr'?"),
        ({"space": {"model.dropout": {"uniform": [0, 2]}}}, (), "the space cannot run, model.dropout=2: "),
        ({"unit": "seconds"}, (), "unit: seconds wants most"),
        ({"method": "population", "space": {"freeze.strategy": {"choice": ["all"]}}}, (), "the space has none"),
        (
            {"method": "population", "space": {"optim.lr_towers": {"uniform": [0.1, 1]}}},
            (),
            "the recipe leaves it open: give it a number",
        ),
        ({"method": "population", "trials": 3}, (), "wants 4 trials or more"),
        ({}, ("data.name=nobody",), "nobody"),
        ({}, ("optim.lr=fast",), "optim.lr"),
    ],
)
def test_a_mistake_is_told_before_ray_is_looked_for(
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], changed: dict[str, Any],
    overrides: tuple[str, ...], words: str,
) -> None:  # fmt: skip
    assert search.main(arguments("s", *overrides, **changed)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "overrides", "words"),
    [
        (
            {"space": {"freeze.strategy": {"choice": ["connector", {"top": {"integer": [1, 9]}}]}}},
            (),
            "the space cannot run, freeze.strategy=top:9: freeze.strategy=top:9, but the language model has 2 layers",
        ),
        ({}, ("cluster.workers=99",), "cluster.workers=99 want 99 CPUs or more, but the cluster has"),
        ({"grace": 9}, (), "grace=9 steps, but a trial has 8"),
        ({"scheduler": "hyperband", "grace": 3, "reduction": 4}, (), "hyperband would stop no trial"),
        ({"metric": "bleu"}, (), "metric=bleu is not reported: there are score, loss, accuracy"),
    ],
)
def test_a_mistake_is_told_before_the_first_trial(
    ray_cluster: cluster.Cluster, arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any], overrides: tuple[str, ...], words: str,
) -> None:  # fmt: skip
    assert search.main(arguments("s", *overrides, **changed)) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert "begins" not in shown.out
    assert not (storages.folder("search", "s") / "search.yaml").exists()  # the name is free for what is mended


@pytest.fixture
def nothing_left(ray_cluster: cluster.Cluster) -> Iterator[None]:
    """Whatever a search started is gone when it ends: actors and placement groups."""
    before = rays.living()
    yield
    left = rays.living() - before
    assert not left


@pytest.mark.long
def test_trials_and_a_winner(
    nothing_left: None, storage: Path, arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main(arguments("s")) == 0
    shown = capsys.readouterr().out
    assert "search s: 4 trials of up to 8 steps" in shown
    assert "4 of 4 done" in shown
    folder = storage / "search" / "s"
    done = json.loads((folder / "trials.json").read_text())
    assert [trial["id"] for trial in done] == ["t000", "t001", "t002", "t003"]
    assert {trial["state"] for trial in done} <= {"done", "stopped"}
    assert done[0]["sample"] == {"optim.lr": 0.001, "freeze.strategy": "connector"}  # the recipe's own
    winner = json.loads((folder / "winner.json").read_text())
    by_id = {trial["id"]: trial for trial in done}
    assert winner["score"] == by_id[winner["trial"]]["quality"]
    found = bundle.load("s")
    assert found.name == "s"
    assert found.config.optim.lr == pytest.approx(winner["sample"]["optim.lr"])
    history = json.loads((found.path / "search.json").read_text())
    assert history["trials"] == done
    assert history["seed"] == 0
    assert json.loads((folder / "evaluation.json").read_text())["split"] == "test"
    page = (folder / "report.html").read_text()
    for title in ("Search", "Trials", "Learning curves", "What freezing buys"):
        assert f">{title}</h2>" in page
    assert all(f"{trial['id']}: " in page for trial in done)
    assert Predictor.load("s", device="cpu").predict([{"text": "what color is the shape?"}])
    # The same command again has nothing to do; another space under this name is refused.
    assert search.main(arguments("s")) == 0
    assert "is finished" in capsys.readouterr().out
    assert search.main(arguments("s", trials=5)) == 2
    assert "is finished, with another recipe or space" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- slow ones


def reports(folder: Path, trial: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials" / trial / "reports.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_population_takes_over_what_the_best_have_learned(
    nothing_left: None, storage: Path, arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One of four trials learns nothing at its rate: it goes on from another's checkpoint, at another rate."""
    changes = {"optim.lr": {"loguniform": [1.0e-7, 1.0e-2]}, "model.dropout": {"uniform": [0.0, 0.3]}}
    given = arguments(
        "p", "train.epochs=3", "optim.schedule=constant", method="population", seeds=1, set={}, grace=6,
        concurrent=1, space=changes,
    )  # fmt: skip
    assert search.main(given) == 0
    folder = storage / "search" / "p"
    exploited = 0
    for place in sorted((folder / "trials").glob("t*")):
        found = reports(folder, place.name)
        steps = [record["metrics"]["step"] for record in found]
        assert steps == sorted(steps)
        assert steps[-1] == 24
        for before, after in itertools.pairwise(found):
            if before["sample"] != after["sample"]:
                exploited += 1
                assert after["metrics"]["step"] > before["metrics"]["step"] >= 6  # it went on, and did not begin again
                rates = [
                    json.loads(line)["lr"]
                    for line in (place / "metrics.jsonl").read_text().splitlines()
                    if json.loads(line)["kind"] == "train" and json.loads(line)["step"] >= after["metrics"]["step"]
                ]
                assert rates[0] == pytest.approx(after["sample"]["optim.lr"], rel=1e-3)
    assert exploited
    assert bundle.load("p").name == "p"
    winner = json.loads((folder / "winner.json").read_text())
    assert len(winner["own"]["scores"]) == 1  # the recipe's own values, which no trial has any more
    assert (folder / winner["run"] / "checkpoints").is_dir()
    assert len(list(folder.glob("trials/*/checkpoints"))) == (winner["trial"] != "recipe")  # of the winner alone
    assert not (folder / "tune").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "reduction", "grace"), [("halving", 2, 2), ("asha", 4, 0.5), ("hyperband", 2, 1)]
)
def test_twenty_stopped_trials_leave_nothing(
    nothing_left: None,
    storage: Path,
    arguments: Callable[..., list[str]],
    scheduler: str,
    reduction: float,
    grace: float,
) -> None:
    given = arguments("many", trials=40, scheduler=scheduler, reduction=reduction, grace=grace, seeds=1)
    assert search.main(given) == 0
    done = json.loads((storage / "search" / "many" / "trials.json").read_text())
    assert len(done) == 40
    assert sum(trial["state"] == "stopped" for trial in done) >= (10 if scheduler == "hyperband" else 20)
    assert all(trial["error"] is None for trial in done)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_search_that_is_stopped_goes_on(
    ray_cluster: cluster.Cluster, storage: Path, arguments: Callable[..., list[str]], how: signal.Signals
) -> None:
    given = [sys.executable, "-m", "jobs.search", *arguments("k", concurrent=1)]
    environment = {**os.environ, "MMAGENT_STORAGE": str(storage)}
    first = subprocess.Popen(given, env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if "t001  step" in line:
            break
    first.send_signal(how)
    rest = first.stdout.read()
    assert first.wait(120) == (130 if how != signal.SIGKILL else -signal.SIGKILL), rest
    folder = storage / "search" / "k"
    known = {trial: reports(folder, trial) for trial in ("t000", "t001")}
    time.sleep(1.0)
    again = subprocess.run(given, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    for trial, before in known.items():
        after = reports(folder, trial)
        assert after[: len(before)] == before  # nothing was trained again that had been reported
        steps = [record["metrics"]["step"] for record in after]
        assert steps == sorted(set(steps))
    assert len(json.loads((folder / "trials.json").read_text())) == 4


@pytest.mark.slow
def test_a_trial_that_fails_is_recorded_and_ends_nothing(
    nothing_left: None, storage: Path, arguments: Callable[..., list[str]]
) -> None:
    """A rate without bounds makes losses that are no numbers."""
    given = arguments(
        "f", "train.on_bad_loss=stop", seeds=1, scheduler="none", space={"optim.lr": {"loguniform": [1.0e25, 1.0e30]}}
    )  # fmt: skip
    assert search.main(given) == 0
    done = json.loads((storage / "search" / "f" / "trials.json").read_text())
    assert [trial["state"] for trial in done] == ["done", "failed", "failed", "failed"]
    assert all("loss" in trial["error"] for trial in done[1:])
    assert json.loads((storage / "search" / "f" / "winner.json").read_text())["trial"] == "t000"


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "hyperband"])
def test_trials_are_stopped_by_their_seconds(
    nothing_left: None, storage: Path, arguments: Callable[..., list[str]], scheduler: str
) -> None:
    given = arguments(
        "t", "train.epochs=50", unit="seconds", most=4, grace=0.25, scheduler=scheduler, reduction=2, trials=8, seeds=1,
        set={"train.max_steps": 400},
    )  # fmt: skip
    assert search.main(given) == 0
    done = json.loads((storage / "search" / "t" / "trials.json").read_text())
    assert {trial["state"] for trial in done} == {"done", "stopped"}
    assert bundle.load("t").name == "t"


@pytest.mark.slow
def test_quality_and_cost(
    nothing_left: None, storage: Path, arguments: Callable[..., list[str]]
) -> None:  # fmt: skip
    assert search.main(arguments("c", cost="latency_ms", method="tpe", trials=3, seeds=1)) == 0
    done = json.loads((storage / "search" / "c" / "trials.json").read_text())
    assert all(trial["latency_ms"] > 0 for trial in done)
    assert all(trial["trained_parameters"] > 0 for trial in done)
    assert ">Quality and cost</h2>" in (storage / "search" / "c" / "report.html").read_text()
    assert not list((storage / "search" / "c" / "trials").glob("*/timed"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_searches_serves_its_winner_and_asks_it(tmp_path: Path) -> None:
    """`make demo-search`, a short one, on a Ray of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"MMAGENT_STORAGE": str(tmp_path / "storage"), "SCALE": "small"}
    command = [sys.executable, "-m", "jobs.demo", "search"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        subprocess.run([sys.executable, "-m", "jobs.local", "down"], env=environment, check=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "storage" / "search" / "demo_search_small"
    winner = json.loads((folder / "winner.json").read_text())
    assert winner["trial"] in {trial["id"] for trial in json.loads((folder / "trials.json").read_text())}
    assert done.stdout.count("demo_search_small") >= 3
    assert "ask it yourself" in done.stdout
