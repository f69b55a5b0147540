"""The whole circle, unattended: asked on the page, corrected there, refitted, judged, promoted, asked again: right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from jobs import cluster, refine
from mmagent import channels
from mmagent.predictor import Predictor
from mmagent.record import Media, Record
from mmagent.shards import Dataset
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running
from tests.test_serve_page import CHROMIUM, asked, browser, opened, playwright

__all__ = ["browser", "playwright"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed (Debian: apt-get install chromium)"),
]
SHADES = {"white": 255, "grey": 120}
QUESTION = "what color is the shape?"


def show(page: Page, file: Path, data: bytes) -> Any:
    """Asks about a picture; the turn."""
    file.write_bytes(data)
    page.locator("#file").set_input_files(file)
    expect(page.locator("#parts li")).to_have_count(1)
    return asked(page, QUESTION)


def test_a_correction_on_the_page_comes_back_as_an_answer(
    ray_cluster: cluster.Cluster, storage: Path, tiny_bundle: Path, browser: Browser, tmp_path: Path,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]], make_png: Callable[..., bytes],
) -> None:  # fmt: skip
    test = [
        replace(each, images=(Media(make_png(each.target.label, (20 + n % 7, 20)), None),))  # seen in no other split
        for n, each in enumerate(make_records(40, "test"))
    ]
    splits = {"train": make_records(48), "validation": make_records(16, "validation"), "test": test}
    make_dataset(storage / "data" / "tiny", splits)
    channels.append("production", tiny_bundle, share=1.0, act="promote", by="tests")
    service = Service(Predictor.load(tiny_bundle, device="cpu"), ServeConfig(), "production")
    with running(service) as address:
        (storage / "serve").mkdir(exist_ok=True)
        (storage / "serve" / "services.json").write_text(json.dumps({"production": {"url": address}}))
        for page in opened(browser, address):
            for number in range(18):
                name = [*SHADES][number % 2]
                level = SHADES[name] - number
                page.get_by_role("button", name="New conversation").click()
                turn = show(page, tmp_path / f"{number}.png", make_png((level, level, level), (32, 32)))
                turn.get_by_role("button", name="Wrong").click()
                turn.get_by_label("What would be right?").fill(name)
                turn.get_by_role("button", name="Send").click()
                expect(turn.get_by_text("Thank you.")).to_be_visible()
        small = ("cluster.workers=1", "train.micro_batch=16", "optim.lr=0.005", "train.epochs=30")
        assert refine.main(["--channel", "production", "--grow", "--promote", *small]) == 0
        verdict = json.loads((storage / "refine" / "production" / "r001" / "gate.json").read_text())
        assert verdict["accepted"]
        for page in opened(browser, address):  # the same service, not started anew
            expect(page.locator("#bundle")).to_contain_text("production-r001")
            for name, level in SHADES.items():
                page.get_by_role("button", name="New conversation").click()
                turn = show(page, tmp_path / f"{name}.png", make_png((level - 5,) * 3, (32, 32)))
                expect(turn.locator(".words")).to_have_text(name)
