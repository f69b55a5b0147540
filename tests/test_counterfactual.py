"""Words swapped for others: whole words, capitals kept, placeholders untouched; and what a bundle answers then."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import cluster, counterfactual, evaluate
from mmagent.predictions import EvaluationError
from mmagent.record import Message, Record
from mmagent.rows import parse
from mmagent.shards import Dataset

WORDS = {"he": "she", "she": "he", "paris": "lagos", "lagos": "paris"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("He said that he is in Paris.", "She said that she is in Lagos."),
        ("the weather in PARIS", "the weather in LAGOS"),
        ("nothing here", None),
        ("there", None),
    ],
)
def test_whole_words_are_swapped(text: str, wanted: str | None) -> None:
    found = counterfactual.swapped(parse({"text": text}), WORDS)
    assert (None if found is None else found.messages[-1].content) == wanted


def test_media_and_words_that_look_like_them_stay() -> None:
    record = Record("x", (Message("user", r"<image>is he \<image> there?"),))
    found = counterfactual.swapped(record, WORDS)
    assert found is not None
    assert list(found.segments()) == [("image", ""), ("text", "is she <image> there?")]


def test_where_spans_count_characters_nothing_is_swapped() -> None:
    record = parse({"text": "he is in Paris", "task": "tag"})
    spans = ({"start": 9, "end": 14, "label": "city"},)
    assert counterfactual.swapped(replace(record, target=replace(record.target, spans=spans)), WORDS) is None


def test_a_word_list_and_its_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("# names\nHe,she\nParis,Lagos\n")
    assert counterfactual.load(file) == WORDS
    for text, words in {"a,b,c\n": "two words", "a,b\na,c\n": "stands in a pair before", "#\n": "no pairs"}.items():
        file.write_text(text)
        with pytest.raises(EvaluationError, match=words):
            counterfactual.load(file)
    with pytest.raises(EvaluationError, match="cannot read"):
        counterfactual.load(tmp_path / "nowhere.csv")


@pytest.mark.long
def test_an_evaluation_tells_gaps_and_swapped_words(
    ray_cluster: cluster.Cluster, storage: Path, tiny_bundle: Path, tmp_path: Path,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [replace(each, meta={**each.meta, "region": f"r{n % 2}"}) for n, each in enumerate(make_records(64, "test"))]
    make_dataset(storage / "data" / "tiny", {"train": rows[:8], "validation": rows[:8], "test": rows})
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("shape,picture\n")
    options = ["--bundle", str(tiny_bundle), "--data", "tiny", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert evaluate.main([*options, "--slices", "region", "--swap", str(pairs)]) == 0
    shown = capsys.readouterr().out
    assert "gaps between 2 groups of region" in shown
    assert "swapped words:" in shown
    result: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["counterfactual"]["n"] == 32  # the written ones
    assert set(result["gaps"]["region"]["groups"]) == {"r0", "r1"}
    assert ">Groups</h2>" in (tmp_path / "out" / "report.html").read_text()
