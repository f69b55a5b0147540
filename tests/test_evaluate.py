"""jobs.evaluate on a tiny bundle and data set: the answers, the comparison, and the command itself on a real Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import baselines, cluster, evaluate
from jobs.answers import Answerer, without
from mmagent import bundle as bundles
from mmagent import evaluation
from mmagent import storage as storages
from mmagent.record import SCHEMA, SCHEMA_VERSION, Media, Message, Record, Target, escape
from mmagent.shards import Dataset, ShardWriter

COLOURS = ["black", "blue", "green", "red"]


def write(folder: Path, splits: dict[str, Sequence[Record]]) -> Dataset:
    """A data set as `jobs.prepare` leaves it."""
    info: dict[str, Any] = {}
    for split, records in splits.items():
        with ShardWriter(folder, split, row_group_rows=16) as writer:
            for record in records:
                writer.add(record)
            info[split] = {"rows": len(records), "shards": writer.close()}
    document = {
        "format_version": 1, "schema_version": SCHEMA_VERSION, "name": folder.name, "source": "tests", "seed": 0,
        "created_ms": 0, "task": "classify", "tasks": {"classify": {"labels": COLOURS}}, "splits": info,
        "quarantine": {"rows": 0},
    }  # fmt: skip
    storages.publish_json(folder / "dataset.json", document)
    return Dataset.open(folder)


@pytest.fixture
def dataset(storage: Path, make_records: Callable[..., list[Record]]) -> Dataset:
    test = make_records(40, "test")
    test.append(replace(test[0], id="damaged", images=(Media(b"no picture"),)))
    test.append(replace(test[0], id="unlabelled", target=Target()))
    return write(storage / "data" / "colours", {"train": make_records(48), "validation": make_records(8), "test": test})


def rows_of(records: Sequence[Record]) -> pa.Table:
    return pa.Table.from_pylist([record.to_row() for record in records], SCHEMA)


def table_of(records: Sequence[Record], column: str = "form") -> pa.Table:
    """Predictions without answers: what the baselines read of them."""
    rows = [
        {"id": r.id, "group": r.id, "without": "", "label": r.target.label, f"slice.{column}": r.meta.get(column)}
        for r in records
    ]
    return pa.Table.from_pylist(rows, evaluation.schema([column]))


def test_every_row_is_answered_or_says_why(tiny_bundle: Path, make_records: Callable[..., list[Record]]) -> None:
    records = make_records(8)
    records[1] = replace(records[1], images=(Media(b"no picture"),))
    records[2] = replace(records[2], target=Target())
    answer = Answerer(str(tiny_bundle), ("form", "modalities", "nothing"), None, threads=1)
    table = answer(rows_of(records))
    assert table.schema == evaluation.schema(["form", "modalities", "nothing"])
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert rows[1]["error"].startswith("images[0]: not a picture")
    assert rows[2]["error"] == "the row has no target.label"
    assert [row["predicted"] for row in rows[1:3]] == [None, None]
    good = rows[0]
    assert good["confidence"] == pytest.approx(max(good["probabilities"]), abs=1e-5)
    assert sum(good["probabilities"]) == pytest.approx(1, abs=1e-4)
    assert (
        good["predicted"] == bundles.load(tiny_bundle).labels[good["probabilities"].index(max(good["probabilities"]))]
    )
    assert [rows[index]["slice.modalities"] for index in (0, 4)] == ["text+image", "image+audio"]
    assert {row["slice.nothing"] for row in rows} == {None}


def test_the_answers_are_the_predictors(tiny_bundle: Path, make_records: Callable[..., list[Record]]) -> None:
    from mmagent import Predictor

    records = make_records(8)
    rows = Answerer(str(tiny_bundle), (), None, threads=1)(rows_of(records)).to_pylist()
    direct = Predictor.load(tiny_bundle).predict(records)
    assert [row["predicted"] for row in rows] == [answer.label for answer in direct]
    assert [row["confidence"] for row in rows] == pytest.approx([answer.confidence for answer in direct], abs=1e-5)


def test_without_its_picture_a_question_has_one_answer(
    tiny_bundle: Path, make_records: Callable[..., list[Record]]
) -> None:
    records = [record for record in make_records(16) if not record.audios]
    rows = Answerer(str(tiny_bundle), ("modalities",), "image", threads=1)(rows_of(records)).to_pylist()
    blind = [row for row in rows if row["without"] == "image"]
    assert len(blind) == len(records) == len(rows) / 2
    assert len({tuple(row["probabilities"]) for row in blind}) == 1
    assert {row["slice.modalities"] for row in blind} == {"text+image"}  # the slice is that of the question as it was


def test_a_question_of_nothing_but_the_picture_is_no_question_without_it(tiny_bundle: Path, make_png: Any) -> None:
    record = Record("1", (Message("user", "<image>"),), images=(Media(make_png()),), target=Target(label="red"))
    rows = Answerer(str(tiny_bundle), (), "image", threads=1)(rows_of([record])).to_pylist()
    assert [row["error"] for row in rows] == [None, "nothing is left to ask without image"]


@pytest.mark.parametrize(
    ("content", "taken", "left"),
    [
        ("<image> what color?", "image", "what color?"),
        ("<image> <audio>", "image", "<audio>"),
        ("<image>a<audio>b", "audio", "<image>ab"),
        ("<image> " + escape("say <image> twice"), "image", escape("say <image> twice")),
        (escape("one <audio>") + " <image> two", "audio", escape("one <audio>") + " <image> two"),
        ("what? <image><audio>", "text", "<image><audio>"),
        ("back\\\\<audio><image>", "image", "back\\\\<audio>"),
        ("back\\\\<image><audio>", "image", "back\\\\<audio>"),
    ],
)
def test_a_modality_is_taken_with_its_placeholders(content: str, taken: str, left: str) -> None:
    media = (Media(b"x"),)
    record = Record("1", (Message("user", content),), images=media, audios=media)
    rest = without(record, taken)
    assert rest.messages[0].content == left
    assert (len(rest.images), len(rest.audios)) == (taken != "image", taken != "audio")


def test_words_that_become_a_placeholder_when_a_picture_goes_stay_words() -> None:
    # A backslash, the picture, and the words "<image>": without the picture, backslash and words meet.
    record = Record("1", (Message("user", "a\\\\<image>" + escape("<image>")),), images=(Media(b"x"),))
    assert list(without(record, "image").segments()) == [("text", "a\\<image>")]


def test_the_majority_answer_by_hand(storage: Path) -> None:
    def ask(key: str, words: str, label: str | None, **meta: str) -> Record:
        return Record(key, (Message("user", words),), target=Target(label=label), meta={"form": "text", **meta})

    train = [ask("1", "shape?", "red"), ask("2", "shape?", "red"), ask("3", "shape?", "blue")]
    train += [ask("4", "tie?", "green"), ask("5", "tie?", "black"), ask("6", "once?", "blue")]
    validation = [ask("7", "shape?", "blue"), ask("8", "shape?", "blue")]  # turns the majority
    test = [
        ask("a", "shape?", "blue"),
        ask("b", "other words", "blue", question="shape?", form="speech"),
        ask("c", "tie?", "black"),  # of equals the first in the alphabet
        ask("d", "never seen", "blue"),  # the most frequent of all
        ask("e", "shape?", "red"),
        ask("f", "shape?", None),
    ]
    dataset = write(storage / "data" / "hand", {"train": train, "validation": validation, "test": test})
    found = baselines.majority(dataset, "test", table_of(test))
    assert found["n"] == 5
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(4 / 5)
    assert found["slices"]["form=speech"]["metrics"]["accuracy"]["value"] == 1.0


def test_the_linear_probe_sees_colours_in_an_untrained_tower(
    storage: Path, tiny_bundle: Path, make_records: Callable[..., list[Record]]
) -> None:
    test = make_records(24, "test")
    dataset = write(storage / "data" / "probe", {"train": make_records(48), "test": test})
    found = bundles.load(tiny_bundle)
    once, again = (
        baselines.linear_probe(dataset, "test", table_of(test), found.config, found.labels, column="form", seed=0)
        for _ in range(2)
    )
    assert once == again
    assert once["metrics"]["accuracy"]["value"] > 0.9  # four plain colours are linear in almost anything
    assert once["slices"]["form=speech"]["n"] == 12
    assert "fitted on 48 training rows" in once["what"]


def test_picking_reads_the_wanted_records(dataset: Dataset) -> None:
    picked = list(baselines.pick(dataset, "test", ["test-30", "test-2", "unknown"]))
    assert [record.id for record in picked] == ["test-2", "test-30"]
    assert picked[0].images[0].bytes


def test_the_command_on_ray(
    ray_cluster: cluster.Cluster, dataset: Dataset, tiny_bundle: Path, storage: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--data", "colours", "--out", "eval/tiny", "--workers", "1"]
    assert evaluate.main([*arguments, "--before", "--without", "image"]) == 0
    out = storage / "eval" / "tiny"
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["bundle"], result["data"], result["n"]) == ("tiny", "colours", 40)
    assert result["errors"]["n"] == 2
    assert result["blind"]["n"] == 41  # the damaged picture is gone, the missing label is not
    assert set(result["before"]) == {"majority", "linear_probe"}
    assert {"form=text", "form=speech", "modalities=text+image"} <= set(result["slices"])
    table = pq.read_table(out / "predictions.parquet")
    assert table["id"].to_pylist()[:2] == ["test-0", "test-1"]
    page = (out / "report.html").read_text()
    assert "<audio" in page
    assert "Evaluation of tiny" in page
    shown = capsys.readouterr()
    assert "form=speech" in shown.out
    assert "not answered: 1 x the row has no target.label" in shown.out


def test_the_result_goes_into_the_bundle(dataset: Dataset, tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, own)
    rows = Answerer(str(own), ("form",), None, threads=1)(pa.concat_tables(dataset.read("test")))
    found = bundles.load(own)
    result = evaluation.evaluate(rows, found.labels, bundle="tiny", data="colours", split="test")
    evaluate.describe(own, dataset, result)
    again = bundles.load(own)  # sealed anew: its hashes hold
    assert "README.md" in again.manifest["files"]
    assert json.loads((own / "metrics.json").read_text())["n"] == 40
    assert "# tiny" in (own / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bundel", "x"], "unknown flag --bundel: did you mean --bundle?"),
        (["--bundle", "b", "--data", "nowhere", "--out", "o"], "is not there; make it with"),
        (["--bundle", "b", "--data", "colours", "--out", "o", "--without", "smell"], "invalid choice: 'smell'"),
        (["--bundle", "b", "--data", "colours", "--out", "o", "--workers", "0"], "1 or more is wanted"),
        (["--bundle", "nowhere", "--data", "colours", "--out", "o"], "there is no bundle 'nowhere'"),
        (["--bundle", "TINY", "--data", "colours", "--out", "o", "--split", "dev"], "has no split 'dev'"),
    ],
)
def test_a_mistake_is_one_message(
    ray_cluster: cluster.Cluster, dataset: Dataset, tiny_bundle: Path, capsys: pytest.CaptureFixture,
    arguments: list[str], words: str,
) -> None:  # fmt: skip
    given = [str(tiny_bundle) if item == "TINY" else item for item in arguments]
    try:
        status = evaluate.main(given)
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert words in capsys.readouterr().err
