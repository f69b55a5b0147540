"""jobs.answers: what a bundle says to every row of every task, and what evaluation, report and card make of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import baselines
from jobs.answers import Answerer, without
from jobs.summary import table_of
from mmagent import bundle as bundles
from mmagent import card, evaluation, examples, predictions, report
from mmagent.record import SCHEMA, Media, Message, Record, Target, escape
from mmagent.shards import Dataset
from mmagent.targets import TaskInfo, kind, words_of
from mmagent.tasks import make_all

COLOURS = ("red", "green", "blue", "black")
INFOS = {
    "multilabel": TaskInfo("multilabel", COLOURS, dict.fromkeys(COLOURS, 6), rows={"train": 12}),
    "regress": TaskInfo("regress", mean=2.0, deviation=1.5, rows={"train": 12}),
    "match": TaskInfo("match", rows={"train": 12}),
    "tag": TaskInfo("tag", ("colour", "shape"), rows={"train": 12}),
    "relate": TaskInfo("relate", ("has", "lacks"), rows={"train": 12}),
    "extract": TaskInfo("extract", rows={"train": 12}),
    "classify:mood": TaskInfo("classify:mood", ("no", "yes"), rows={"train": 12}),
}


def rows_of(records: Sequence[Record]) -> pa.Table:
    return pa.Table.from_pylist([record.to_row() for record in records], SCHEMA)


def record_of(task: str, index: int, split: str = "test") -> Record:
    """A sentence on a colour and a shape, with what is right in the task's own form."""
    colour = COLOURS[index % 4]
    content = f"there is a {colour} circle in image {index}"
    at, shape = content.index(colour), content.index("circle")
    ends = [(at, at + len(colour)), (shape, shape + 6)]

    def spans(*labels: str) -> tuple[dict[str, Any], ...]:
        return tuple({"start": a, "end": b, "label": name} for (a, b), name in zip(ends, labels, strict=False))

    target, candidates = {
        "multilabel": (Target(labels=(colour, COLOURS[(index + 1) % 4])), ()),
        "regress": (Target(value=float(index % 4)), ()),
        "match": (Target(labels=("1",)), tuple({"content": word} for word in ("circle", colour, "image"))),
        "tag": (Target(spans=spans("colour", "shape")), ()),
        "relate": (Target(label=("has", "lacks")[index % 2], spans=spans("head", "tail")), ()),
        "extract": (Target(texts=(colour,), spans=spans("answer")) if index % 4 else Target(texts=()), ()),
        "classify": (Target(label=("no", "yes")[index % 2]), ()),
    }[kind(task)]
    context = (Message("context", content), Message("user", "what color?"))
    messages = context if kind(task) == "extract" else (Message("user", content),)
    meta = {"form": ("text", "other")[index % 2]}
    return Record(f"{task}-{split}-{index}", messages, target=target, task=task, candidates=candidates, split=split,
                  meta=meta)  # fmt: skip


@pytest.fixture(scope="module")
def bundle_of(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, ...], Path] = {}

    def of(*tasks: str) -> Path:
        if tasks not in made:
            folder = tmp_path_factory.mktemp("bundles") / "many"
            made[tasks] = make_bundle(folder, {task: INFOS[task] for task in tasks}, tasks[0])
        return made[tasks]

    return of


def evaluated(bundle: Path, records: Sequence[Record]) -> tuple[pa.Table, dict[str, Any]]:
    found = bundles.load(bundle)
    table = Answerer(str(bundle), ("form",), None, threads=1)(rows_of(records))
    result = evaluation.evaluate(table, make_all(found.tasks), found.task, bundle="many", data="shop", split="test")
    return table, result


@pytest.mark.parametrize("task", INFOS)
def test_every_task_from_rows_to_the_page(task: str, bundle_of: Callable[..., Path]) -> None:
    from mmagent import Predictor

    bundle = bundle_of(task)
    records = [record_of(task, index) for index in range(12)]
    table, result = evaluated(bundle, [*records, replace(records[0], id="blank", target=Target())])
    rows = {row["id"]: row for row in table.to_pylist()}
    assert rows["blank"]["error"].startswith("no usable right answer: ")
    assert result["errors"]["n"] == 1
    made = make_all(bundles.load(bundle).tasks)[task]
    assert (result["task"], result["kind"], result["main"], result["n"]) == (task, made.kind, made.score, 12)
    assert result["metrics"][made.score]["low"] is not None
    assert {"mean_confidence"} <= set(result["metrics"])
    assert set(result["slices"]) == {"form=text", "form=other"}
    assert 0 <= result["abstained"] <= 1
    json.dumps(result, allow_nan=False)

    # What is counted is what the bundle says, and comes back from the table as it was said.
    for record, answer in zip(records, Predictor.load(bundle).predict(records), strict=True):
        row = rows[record.id]
        assert row["predicted"] == answer.words
        said = predictions.decision(json.loads(row["answer"]), row["confidence"], row["probabilities"], made.labels)
        assert (said.label, said.labels, said.text) == (answer.label, answer.labels, answer.text)
        assert said.spans == answer.spans
        assert said.value == answer.value or said.value == pytest.approx(answer.value)
        assert dict(said.probabilities) == pytest.approx(dict(answer.probabilities), abs=1e-5)

    shown = [examples.shown(record, rows[record.id], made, "") for record in records]
    page = report.render(result, examples={task: shown})
    assert page.count('class="example') == 12
    assert ("Confusion matrix" in page) == (made.kind in ("classify", "relate"))
    assert ('class="passage"' in page) == (made.kind in ("tag", "relate", "extract"))
    assert ('class="chips"' in page) == (made.kind == "multilabel")
    assert ('class="ranking"' in page) == (made.kind == "match")
    assert ("Given by right value" in page) == (made.kind == "regress")
    assert ("Reliability diagram" in page) == (made.kind != "regress")
    found = bundles.load(bundle)
    assert f"- `{task}`: " in card.render(found.manifest, found.config, tasks=found.tasks, evaluation=result)
    assert "not answered: 1 x no usable right answer" in table_of(result)


def test_tasks_of_one_bundle_are_measured_apart(bundle_of: Callable[..., Path]) -> None:
    records = [record_of(task, index) for index in range(4) for task in ("tag", "regress", "multilabel")]
    _, result = evaluated(bundle_of("tag", "regress"), records)
    assert result["task"] == "tag"
    assert {name: block["n"] for name, block in result["tasks"].items()} == {"tag": 4, "regress": 4}
    assert result["unanswered"]["multilabel"]["n"] == 4
    page = report.render(result)
    assert "tag: Before and after" in page
    assert "regress: Answers" in page
    assert "this bundle has no task &#x27;multilabel&#x27;" in page
    assert table_of(result).startswith("task tag\n")


def test_relations_of_other_spans_are_other_questions(bundle_of: Callable[..., Path]) -> None:
    record = record_of("relate", 0)
    head, tail = record.target.spans or ()
    turned = ({**head, "label": "tail"}, {**tail, "label": "head"})
    other = replace(record, id="turned", target=replace(record.target, spans=turned))
    rows = Answerer(str(bundle_of("relate")), (), None, threads=1)(rows_of([record, other])).to_pylist()
    assert rows[0]["probabilities"] != rows[1]["probabilities"]


def test_spans_keep_their_place_when_a_picture_goes(make_png: Callable[..., bytes]) -> None:
    content = "<image> a red circle and " + escape("<image>")
    spans = ({"start": content.index("red"), "end": content.index("red") + 3, "label": "colour"},)
    record = Record("1", (Message("user", content),), images=(Media(make_png()),), target=Target(spans=spans),
                    task="tag")  # fmt: skip
    rest = without(record, "image")
    assert not rest.images
    assert words_of(rest.messages[0].content, spans[0]) == "red"
    assert [each for each, _ in rest.segments()] == ["text"]


def test_candidates_lose_the_modality_too(bundle_of: Callable[..., Path]) -> None:
    record = record_of("match", 0)
    rows = Answerer(str(bundle_of("match")), (), "text", threads=1)(rows_of([record])).to_pylist()
    assert [row["error"] for row in rows] == [None, "nothing is left to ask without text"]


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("multilabel", {"constant"}), ("regress", {"constant"}), ("relate", {"majority", "linear_probe"}),
        ("classify:mood", {"majority", "linear_probe"}), ("tag", set()), ("match", set()), ("extract", set()),
    ],
)  # fmt: skip
def test_what_each_task_is_compared_with(
    task: str, names: set[str], bundle_of: Callable[..., Path], make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    train = [record_of(task, index, "train") for index in range(12)]
    test = [record_of(task, index) for index in range(12)]
    dataset = make_dataset(tmp_path / "shop", {"train": train, "test": test})
    dataset = replace(dataset, info=dataset.info | {"task": task, "tasks": {task: INFOS[task].to_dict()}})
    bundle = bundle_of(task)
    table, _ = evaluated(bundle, test)
    found = bundles.load(bundle)
    before = baselines.before(dataset, "test", table, found.config, found.tasks, task, column="form", seed=0)
    assert set(before) == names
    main = make_all(found.tasks)[task].score
    for entry in before.values():
        assert entry["n"] == 12
        assert entry["metrics"][main]["value"] is not None
        assert set(entry["slices"]) == {"form=text", "form=other"}
    result = evaluation.evaluate(
        table, make_all(found.tasks), task, bundle="many", data="shop", split="test", before={task: before}
    )
    assert result.get("before", {}) == before
    assert ("before: " in report.render(result)) == bool(names)


def test_every_row_is_answered_or_says_why(tiny_bundle: Path, make_records: Callable[..., list[Record]]) -> None:
    records = make_records(8)
    records[1] = replace(records[1], images=(Media(b"no picture"),))
    records[2] = replace(records[2], target=Target())
    answer = Answerer(str(tiny_bundle), ("form", "modalities", "nothing"), None, threads=1)
    table = answer(rows_of(records))
    assert table.schema == predictions.schema(["form", "modalities", "nothing"])
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert rows[1]["error"].startswith("images[0]: not a picture")
    assert rows[2]["error"] == "no usable right answer: no label"
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
