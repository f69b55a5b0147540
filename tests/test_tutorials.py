"""The tutorials as they stand, run from their first block to their last on a real Ray: the recipe is smaller than the
reader's, and files that a page begins go on for some dozen rows more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster
from mmagent.record import Record
from mmagent.shards import Dataset
from mmagent.targets import TaskInfo
from serve.switches import free_ports
from tests.test_support_agent import tickets
from tests.tutorials import CHECKOUT, Shell

PAGES = CHECKOUT / "docs" / "tutorials"
COLOURS = ("red", "green", "blue", "black")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
def shell(
    ray_cluster: cluster.Cluster, storage: Path, tmp_path: Path, tiny_backbone: Path, tiny_recipe: dict[str, Any]
) -> Iterator[Shell]:
    """A terminal whose Ray runs, on a port of its own; the service that a page leaves is ended."""
    recipe = yaml.safe_load((CHECKOUT / "jobs" / "recipes" / "small.yaml").read_text())
    recipe["data"] |= {"max_text_tokens": 32}
    recipe["model"] |= tiny_recipe["model"]
    recipe["train"] |= {"epochs": 1, "min_steps": 20, "micro_batch": 16, "eval_every_steps": 20}
    [port] = free_ports(1)
    words = {"8000": str(port), "/models/bert": str(tiny_backbone), "train.min_steps=300": "train.min_steps=40"}
    found = Shell(tmp_path / "checkout", yaml.safe_dump(recipe), words)
    yield found
    found.run("python -m serve.start --stop || true")


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_laptop_in_five_minutes(shell: Shell, storage: Path) -> None:
    shell.tutorial(PAGES / "laptop.md", {})
    assert json.loads((storage / "runs" / "shapes" / "evaluation.json").read_text())["n"] > 50


def test_your_own_data(
    shell: Shell, storage: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    (shell.folder / "img").mkdir()
    (shell.folder / "wav").mkdir()
    pictures, sounds = [], []
    for number in range(120):
        colour, said = COLOURS[number % 4], number % 2
        (shell.folder / "img" / f"{number}.png").write_bytes(make_png(colour, (20 + number % 7, 20)))
        (shell.folder / "wav" / f"{number}.flac").write_bytes(make_wav(300 + 300 * said + number, format="FLAC"))
        label = ("square", "green", "blue", "black")[number % 4]
        row = {"id": str(number), "text": "what is it?", "image": f"img/{number}.png", "label": label}
        pictures += [row] if number > 1 else []
        where = ("hall", "kitchen")[number % 2]
        sounds += [
            f"I am in the {where},wav/{number}.flac,{('ann', 'bob')[number // 2 % 2]},light_{('off', 'on')[said]}"
        ]
    shell.tutorial(PAGES / "own_data.md", {"shop.jsonl": lines(pictures), "home.csv": "\n".join(sounds[1:]) + "\n"})
    audit = json.loads((storage / "eval" / "home" / "evaluation.json").read_text())
    assert {"speaker=ann", "speaker=bob"} <= set(audit["slices"])
    assert list((storage / "predictions" / "new").rglob("*.parquet"))


def test_a_support_agent_from_past_tickets(shell: Shell, storage: Path) -> None:
    shell.tutorial(PAGES / "support_agent.md", {"tickets.jsonl": lines(tickets(150))})
    assert list((storage / "feedback" / "segments").glob("*.jsonl"))


def test_operating_it(
    shell: Shell, storage: Path, tmp_path: Path, make_bundle: Callable[..., Path],
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
) -> None:  # fmt: skip
    for name in ("first", "second"):
        made = make_bundle(tmp_path / name, {"classify": TaskInfo("classify", COLOURS)}, "classify")
        shutil.copytree(made, storage / "runs" / name / "bundle")
    splits = {"train": make_records(48), "validation": make_records(16, "validation"), "test": make_records(16, "test")}
    make_dataset(storage / "data" / "shop", splits)
    shell.run("python -m jobs.promote --bundle first --channel production")
    shell.run("python -m serve.start --channel production --port 8000")
    shell.tutorial(PAGES / "operating.md", {})
    assert (storage / "channels" / "production.jsonl").read_text().count("rollback") == 1
    assert (storage.with_name("storage.lost") / "serve" / "store.sqlite").exists()
