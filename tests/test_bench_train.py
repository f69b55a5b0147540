"""The measurement of training's speed, on little of it: each side learns, and the figures are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from jobs import cluster
from mmagent import text
from tests.bench import kept, packing, texts, train


@pytest.mark.slow
def test_packed_and_padded_models_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure` compares their losses after every step."""
    for name, value in (("SAMPLES", 6), ("STEPS", 2), ("WARM_STEPS", 0)):
        monkeypatch.setattr(packing, name, value)
    found = packing.measure()
    assert found.keys() == {"encoder", "decoder"}
    assert all(value > 0 for value in found.values())


def test_texts_have_the_tokens_asked_for() -> None:
    tokenizer = AutoTokenizer.from_pretrained(text.locate(texts.BACKBONE))
    made = texts.rows(40, tokenizer, 10, 50)
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in made]
    assert min(lengths) >= 10
    assert max(lengths) <= 50
    assert len(set(lengths)) > 15
    assert all(row["label"] in row["text"].split() for row in made)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_small_measurement_writes_every_figure(
    ray_cluster: cluster.Cluster, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALE", "small")
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(train, "EVEN", train.EVEN._replace(rows=128, steps=8, warm_steps=2))  # as of SCALE=small
    monkeypatch.setattr(train, "VARIED", train.VARIED._replace(rows=128, steps=4))
    for name, value in (("ROUNDS", 1), ("ROWS", 192), ("WARM_STEPS", 2)):
        monkeypatch.setattr(kept, name, value)
    monkeypatch.setattr(kept, "SETTINGS", (*kept.SETTINGS, "train.max_steps=6", "train.eval_every_steps=6"))
    assert train.main([], tmp_path) == 0
    rows = json.loads((tmp_path / "runs" / "bench" / "train.json").read_text())["rows"]
    found = {row["id"].removeprefix("train."): row["value"] for row in rows}
    assert set(found) == {
        "bucket_speedup", "bucket_speedup.encoder", "bucket_speedup.decoder", "vs_plain", "vs_trainer",
        "vs_trainer_full", "cache_speedup", "cache_speedup.fill_s", "cache_speedup.larger",
        "cache_speedup.larger.fill_s", "cache_speedup.towers", "cache_speedup.towers.fill_s", "samples_per_s",
        "plain_samples_per_s", "trainer_samples_per_s", "wait_share",
    }  # fmt: skip
    assert found["bucket_speedup"] == min(found["bucket_speedup.encoder"], found["bucket_speedup.decoder"])
    assert found["vs_trainer"] == pytest.approx(found["samples_per_s"] / found["trainer_samples_per_s"], rel=1e-3)
    assert 0 <= found["wait_share"] < 1
