"""A candidate that was built for something else: told by name, wherever it comes from, before anything is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import gate as gates
from jobs import promote
from mmagent import bundle, channels, succession
from mmagent.gate import Rules
from mmagent.predictor import Predictor
from mmagent.succession import MisfitError, Office
from mmagent.targets import TaskInfo
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running

KNOWN = {"classify": TaskInfo("classify", ("red", "green", "blue", "black")), "regress": TaskInfo("regress")}
PRESENT = Office("present", KNOWN, "classify", ("text", "image"))


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (PRESENT._replace(tasks={"classify": KNOWN["classify"]}), r"it has no task 'regress' \(its tasks: classify\)"),
        (
            PRESENT._replace(tasks={**KNOWN, "classify": TaskInfo("classify", ("green", "black"))}),
            "its task 'classify' lacks 2 of 4 labels: 'red', 'blue'",
        ),
        (PRESENT._replace(task="regress"), "a request that names no task meant 'classify' and would mean 'regress'"),
        (PRESENT._replace(modalities=("text", "audio")), "it takes no image"),
    ],
)
def test_what_is_lost_is_named(candidate: Office, words: str) -> None:
    with pytest.raises(MisfitError, match=f"^new cannot take the place of present: {words}"):
        succession.check(PRESENT, candidate._replace(name="new"))


def test_more_than_before_is_no_loss() -> None:
    grown = {**KNOWN, "classify": TaskInfo("classify", ("white", *KNOWN["classify"].labels)), "tag": TaskInfo("tag")}
    succession.check(PRESENT, Office("new", grown, "classify", ("audio", "image", "text")))


@pytest.fixture
def other(make_bundle: Callable[..., Path], storage: Path) -> Path:
    return make_bundle(storage / "runs" / "other" / "bundle", {"regress": TaskInfo("regress")}, "regress")


def test_the_gate_asks_nothing_of_it(tiny_bundle: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(MisfitError, match="cannot take the place of tiny: it has no task 'classify'"):
        gates.judge(bundle.load(tiny_bundle), bundle.load(other), {}, Rules(), tmp_path)
    assert not list(tmp_path.glob("gate*"))


def test_the_channel_stays_where_it_is(
    tiny_bundle: Path, other: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a service, and through one; and it moves where that is meant."""
    channels.append("c", tiny_bundle, share=1.0, act="promote", by="tests")
    assert promote.main(["--channel", "c", "--bundle", "other"]) == promote.EXIT_REFUSED
    told = capsys.readouterr().err
    assert "refused: bundle cannot take the place of tiny: it has no task 'classify' (its tasks: regress)" in told
    assert "--other-task" in told
    with running(Service(Predictor.load(tiny_bundle, device="cpu"), ServeConfig(), "c")) as address:
        there = ["--channel", "c", "--url", address, "--bundle", "other"]
        assert promote.main([*there, "--canary", "0.5"]) == promote.EXIT_REFUSED
        assert "cannot take the place of tiny: it has no task 'classify'" in capsys.readouterr().err
        assert channels.read("c").bundle == str(tiny_bundle)
        assert promote.main([*there, "--other-task"]) == 0
    assert channels.read("c").bundle == str(other)
