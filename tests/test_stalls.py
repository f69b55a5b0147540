"""Where a run's time went, in a chart and one sentence that names what to change."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmagent import config, stalls
from mmagent.stalls import PHASES


def line(steps: int, **seconds: float) -> dict[str, Any]:
    whole = {f"{name}_s": seconds.get(name, 0.0) for name in PHASES}
    return {"kind": "train", "step": 1, "steps": float(steps), **whole, "step_s": sum(whole.values())}


def test_shares_are_of_all_steps_behind_the_first_line() -> None:
    curves = [
        line(1, wait=99.0), line(10, forward=0.1, wait=0.1), {"kind": "validation", "step": 3, "loss": 1.0},
        line(30, forward=0.2), {"kind": "train", "step": 9, "steps": 5.0, "loss": 1.0},
    ]  # fmt: skip
    found = stalls.shares(curves)
    assert found["wait"] == pytest.approx(1.0 / 8.0)
    assert sum(found.values()) == pytest.approx(1)
    assert stalls.shares([line(2, wait=1.0)])["wait"] == 1
    assert stalls.shares([]) == stalls.shares([{"kind": "train", "step": 1, "loss": 0.5}]) == {}


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        ({"wait": 0.12, "forward": 0.5, "backward": 0.38}, "waits for data 12.0 % of its time.*cluster.threads"),
        ({"wait": 0.12, "communication": 0.3, "forward": 0.58}, "exchanges gradients.* 30.0 %.*train.accumulation"),
        ({"optimizer": 0.4, "forward": 0.6}, "updates weights 40.0 %.*train.accumulation"),
        ({"checkpoint": 0.2, "backward": 0.8}, "writes checkpoints 20.0 %.*train.eval_every_steps"),
        ({"copy": 0.2, "backward": 0.8}, "copies batches to the device 20.0 %.*model.image.size"),
        ({"other": 0.2, "backward": 0.8}, "between the parts of its steps.*train.micro_batch"),
        ({"wait": 0.04, "forward": 0.4, "backward": 0.56}, "computes 96.0 % of its time.*data.max_text_tokens"),
    ],
)
def test_the_sentence_names_the_largest_share_and_a_setting(seconds: dict[str, float], says: str) -> None:
    said = stalls.sentence(stalls.shares([line(1, **seconds)])).replace("\u00a0", " ")
    assert re.search(says, said), said


def test_the_settings_named_are_settings() -> None:
    said = " ".join([*stalls._ADVICE.values(), stalls.sentence(dict.fromkeys(PHASES, 0.0))])
    named = set(re.findall(r"\b(?:data|model|freeze|train|cluster|zero|optim)(?:\.\w+)+", said))
    assert len(named) > 6
    assert named <= set(config.keys())


def test_the_chart_shows_every_phase() -> None:
    page = str(stalls.section([line(5, forward=0.06, backward=0.03, wait=0.01)]))
    assert all(f">{name}<" in page for name in PHASES)
    assert "60.0\u00a0%" in page
    assert "A step takes 100\u00a0ms." in page
    assert "waits for data 10.0\u00a0% of its time" in page
    assert stalls.section([{"kind": "train", "step": 1, "loss": 0.5}]) is None
