"""What there is, and where an answer comes from: from the bundle to the shards and the feedback, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import status
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
