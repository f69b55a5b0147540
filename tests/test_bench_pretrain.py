"""The measurement of what learning without labels gains: its material, and all of it on a little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import cluster
from tests.bench import docstrings, pretrain

MODULE = '''
"""A module's own words are not taken, however many they are, since they tell of many things."""

class Net:
    """A toy network: every toy layer of it is applied to what the one before it gives.

    Parameters
    ----------
    width : how wide
    """

def fit(x):
    """Too short."""

def train(net):
    """Trains the *toybox* with :func:`fit` for as long as it takes.

    It stops early. Args:
    net: a network
    Args:
        net: all of this is left out
    """

async def again(net):
    """A toy network: every toy layer of it is applied to what the one before it gives."""
'''


def test_the_prose_of_docstrings_without_the_library_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "toy"
    (package / "tests").mkdir(parents=True)
    for name in ("__init__.py", "net.py", "tests/net.py"):
        (package / name).write_text(MODULE if name == "net.py" else MODULE.replace("layer", "part"))
    (package / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings, "LIBRARIES", {"toy": ("toy",)})
    found = docstrings.collect()
    assert {each.words for each in found} == {
        "A it network: every it part of it is applied to what the one before it gives.",
        "A it network: every it layer of it is applied to what the one before it gives.",
        "Trains the toybox with fit for as long as it takes. It stops early. Args: net: a network",
    }
    assert {each.of for each in found} == {"toy"}
    assert docstrings.collect() == found


def test_a_caption_says_what_a_picture_s_questions_tell() -> None:
    questions = ["what shape?", "what colour?", "is it red?", "what colour?"]
    found = pretrain._captions(questions, ["circle", "blue", "no", "red"], [4, 4, 4, 7])
    assert found == {4: "a blue circle"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_measurement_writes_every_figure(
    ray_cluster: cluster.Cluster, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "FEW", ("train.min_steps=2", "train.epochs=1", "train.eval_every_steps=2"))
    monkeypatch.setattr(pretrain, "TEST_ROWS", 40)
    monkeypatch.setattr(pretrain, "TEXTS", 300)
    monkeypatch.setattr(pretrain, "CAPTIONS", 200)
    monkeypatch.setattr(docstrings, "LIBRARIES", {name: docstrings.LIBRARIES[name] for name in ("networkx", "ray")})
    given = ["--labels", "2", "--seeds", "1", "train.epochs=1", "train.max_steps=3"]
    assert pretrain.main(["--only", "text", "--only", "pairs", *given], tmp_path) == 0
    rows = json.loads((tmp_path / "runs" / "bench" / "pretrain.json").read_text())["rows"]
    found = {row["id"]: row["value"] for row in rows}
    assert set(found) == {
        f"pretrain.{part}.{figure}" for part in ("text", "pairs") for figure in ("before", "after", "gain")
    }
    for part in ("text", "pairs"):
        gain = found[f"pretrain.{part}.after"] - found[f"pretrain.{part}.before"]
        assert found[f"pretrain.{part}.gain"] == pytest.approx(gain, abs=1e-2)
    assert not list((storage / "runs").glob("pretrain-*"))
