"""Every task learns, answers, and survives its bundle, on every kind of language model; metrics are those of others."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.scheme import IOB2
from sklearn.metrics import average_precision_score, f1_score, r2_score, roc_auc_score

from jobs import supervised
from mmagent import bundle, freeze, text
from mmagent.batch import Inputs, PartError
from mmagent.config import Config, resolve
from mmagent.frozen import FrozenStates
from mmagent.predictor import Predictor
from mmagent.reading import Reader
from mmagent.record import Record, Target
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from mmagent.tasks import Decision, Outcome, Task, make
from mmagent.tasks.extract import exact_match, overlap_f1, spans_of
from mmagent.tasks.match import Match
from mmagent.tasks.relate import mark
from mmagent.tasks.tag import _viterbi

TEXT = "the red circle is in the blue image"


def span(words: str, label: str, content: str = TEXT) -> dict[str, Any]:
    return {"start": content.index(words), "end": content.index(words) + len(words), "label": label}


def question(task: str, row: dict[str, Any], **target: Any) -> dict[str, Any]:
    return {"task": task, "target": target, **row}


def context(words: str) -> dict[str, Any]:
    return {"messages": [{"role": "context", "content": TEXT}, {"role": "user", "content": words}]}


ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [question("classify", {"text": w}, label=w.split()[-1]) for w in ("a red", "the blue", "not red")],
    "multilabel": [
        question("multilabel", {"text": "red and blue"}, labels=["red", "blue"]),
        question("multilabel", {"text": "a green shape"}, labels=["green"]),
        question("multilabel", {"text": "is it not"}, labels=[]),
    ],
    "regress": [question("regress", {"text": "a b c"[: 2 * n - 1]}, value=10.0 * n) for n in (1, 2, 3)],
    "tag": [
        question("tag", {"text": TEXT}, spans=[span("red circle", "THING"), span("blue", "COLOUR")]),
        question("tag", {"text": "not a shape"}, spans=[]),
    ],
    "relate": [
        question("relate", {"text": TEXT}, label="in", spans=[span("circle", "head"), span("image", "tail")]),
        question("relate", {"text": TEXT}, label="has", spans=[span("image", "head"), span("blue", "tail")]),
    ],
    "extract": [
        question("extract", context("what is red?"), texts=["circle"]),
        question("extract", context("what is blue?"), texts=["image"]),
        question("extract", context("what is green?"), texts=[]),
    ],
    "match": [
        question("match", {"text": "what color?", "candidates": [{"content": "red"}, {"content": "no"}]}, labels=["0"]),
        question("match", {"text": "is it?", "candidates": [{"content": "red"}, {"content": "no"}]}, labels=["1"]),
    ],
}
ROWS["match:apart"] = [{**row, "task": "match:apart"} for row in ROWS["match"]]
LABELS = {
    "classify": ("blue", "red"), "multilabel": ("blue", "green", "red"), "tag": ("COLOUR", "THING"),
    "relate": ("has", "in"),
}  # fmt: skip


def info(task: str) -> TaskInfo:
    return TaskInfo(task, LABELS.get(task, ()), mean=20.0, deviation=8.0, dual=task == "match:apart")


def records(task: str, **media: bytes) -> list[Record]:
    return [parse({**row, **media}, default_id=str(index)) for index, row in enumerate(ROWS[task])]


@pytest.fixture(scope="module")
def decoder(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of 2 layers, untrained, with the tiny tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen2Model(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_decoder(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of 2 layers on each side, untrained, with the tiny tokenizer."""
    from transformers import AutoTokenizer, T5Config, T5Model

    folder = tmp_path_factory.mktemp("encoder-decoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2
    )
    config.decoder_start_token_id = 0
    T5Model(config).save_pretrained(folder)
    return folder


Build = Callable[..., tuple[Config, dict[str, Task], Predictor]]


@pytest.fixture
def build(tiny_recipe: dict[str, Any]) -> Build:
    """``build(backbone, *tasks)``: a config, tasks, and an untrained predictor of them."""

    def made(backbone: Path | str, *names: str, **overrides: Any) -> tuple[Config, dict[str, Task], Predictor]:
        config = resolve(
            tiny_recipe,
            {"model.backbone": str(backbone), "model.dropout": 0.0, "data.max_text_tokens": 24, **overrides},
        )
        predictor = Predictor.untrained(config, {name: info(name) for name in names}, names[0], device="cpu")
        return config, predictor.tasks, predictor

    return made


def fit(config: Config, tasks: Mapping[str, Task], rows: list[Record], steps: int = 30) -> tuple[list[float], Any]:
    """The losses of a few steps on all rows, and the module."""
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    module = supervised.build(config, tasks, encoder)
    frozen = FrozenStates(encoder)
    inputs = Inputs(config.model, config.data, tokenizer, tasks)
    batch = inputs.batch([inputs.sample(record) for record in rows])
    batch["text_states"] = frozen(batch["ids"], batch["mask"])
    optimizer = torch.optim.AdamW(freeze.groups(module, config), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = supervised.loss_of(module(batch), batch, tasks, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, module.eval()


@pytest.mark.parametrize("backbone", ["tiny_backbone", "decoder", "encoder_decoder"])
@pytest.mark.parametrize("task", sorted(ROWS))
def test_the_loss_falls_by_half_and_the_language_model_stays(
    build: Build, request: pytest.FixtureRequest, task: str, backbone: str
) -> None:
    folder = request.getfixturevalue(backbone)
    config, tasks, _ = build(folder, task, **{"model.image": None, "model.audio": None})
    before = {name: value.clone() for name, value in text.load_encoder(str(folder)).state_dict().items()}
    losses, module = fit(config, tasks, records(task))
    assert losses[-1] < losses[0] / 2
    assert module.backbone is None  # its states were computed outside of what trains
    after = text.load_encoder(str(folder)).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("task", sorted(ROWS))
def test_every_task_takes_pictures_and_sound(
    build: Build, tiny_backbone: Path, make_wav: Callable[..., bytes], task: str
) -> None:
    config, tasks, _ = build(tiny_backbone, task)
    losses, _ = fit(config, tasks, records(task, image=_noise(), audio=make_wav()), steps=20)
    assert losses[-1] < losses[0] * 0.7


@pytest.mark.parametrize("task", sorted(ROWS))
def test_a_bundle_gives_the_answers_of_the_model_it_was_made_of(
    build: Build, tiny_backbone: Path, tmp_path: Path, task: str
) -> None:
    config, tasks, _ = build(tiny_backbone, task)
    rows = records(task)
    _, module = fit(config, tasks, rows, steps=60)
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    before = Predictor(
        name="b",
        config=config,
        tasks=tasks,
        task=task,
        model=module,
        encoder=encoder,
        tokenizer=tokenizer,
        device="cpu",
    )
    said = before.predict(rows)
    bundle.save(
        tmp_path / "b", name="b", config=config, tasks={task: info(task)}, task=task, state=module.state_dict(),
        backbone=encoder, tokenizer=tokenizer, calibration=before.calibration, origin={},
    )  # fmt: skip
    after = Predictor.load(tmp_path / "b", device="cpu").predict(rows)
    assert [a.to_dict(timings=False) for a in after] == [b.to_dict(timings=False) for b in said]
    assert _right(tasks[task], rows, said) == len(rows)


def test_tasks_share_a_batch_and_a_model(build: Build, tiny_backbone: Path) -> None:
    """The gradient of a mixed batch is the sum of the tasks' own."""
    config, tasks, _ = build(tiny_backbone, *sorted(ROWS), **{"model.image": None, "model.audio": None})
    rows = [record for task in ROWS for record in records(task)]
    losses, module = fit(config, tasks, rows, steps=60)
    assert losses[-1] < losses[0] / 2
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    inputs, frozen = Inputs(config.model, config.data, tokenizer, tasks), FrozenStates(encoder)

    def gradient(part: list[Record]) -> torch.Tensor:
        batch = inputs.batch([inputs.sample(record) for record in part])
        batch["text_states"] = frozen(batch["ids"], batch["mask"])
        module.zero_grad()
        supervised.loss_of(module(batch), batch, tasks, config).backward()
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    parts = [gradient(records(task)) for task in ROWS]
    torch.testing.assert_close(gradient(rows), torch.stack(parts).sum(0), atol=1e-5, rtol=1e-3)


def test_a_task_that_the_model_has_not_is_named(build: Build, tiny_backbone: Path) -> None:
    _, _, predictor = build(tiny_backbone, "classify", "tag")
    with pytest.raises(PartError, match="no task 'regress'; it has classify, tag"):
        predictor.predict([{"text": "hm?", "task": "regress"}])
    with pytest.raises(PartError, match="head and tail"):
        build(tiny_backbone, "relate")[2].predict([{"text": "hm?"}])


# ---------------------------------------------------------------------------------------------- reading


def test_strides_cover_a_long_text_and_tell_its_characters(tiny_backbone: Path) -> None:
    reader = Reader(text.load_tokenizer(str(tiny_backbone)), 16)
    content = " ".join(random.Random(0).choices(["red", "circle", "the", "blue"], k=60))
    views = reader.placed("what color?", content)
    assert len(views) > 5
    seen = set()
    for view in views:
        assert len(view.ids) <= 16
        assert view.offsets is not None
        for start, end in view.offsets[view.offsets[:, 0] >= 0]:
            assert content[start:end].strip() == content[start:end] != ""
            seen |= set(range(start, end))
    assert seen == {index for index, character in enumerate(content) if character != " "}


def test_placeholders_take_no_part_and_move_nothing(tiny_backbone: Path) -> None:
    reader = Reader(text.load_tokenizer(str(tiny_backbone)), 32)
    [view] = reader.placed("", "<image> red")
    assert view.offsets is not None
    assert view.offsets[view.offsets[:, 0] >= 0].tolist() == [[8, 11]]


def test_a_span_in_two_strides_begins_once(tiny_backbone: Path) -> None:
    task = make(info("tag"))
    content = "the " * 20 + "red circle" + " the" * 20
    record = parse(question("tag", {"text": content}, spans=[span("red circle", "THING", content)]))
    reader = Reader(text.load_tokenizer(str(tiny_backbone)), 12)
    tags = [task.target(record, view) for view in task.views(record, reader)]
    found = [target["tags"] for target in tags if target is not None and (target["tags"] > 0).any()]
    assert found
    for each in found:
        assert [tag for tag in each if tag > 0] in ([3, 4], [3], [4])


def test_spans_are_marked_and_found_again() -> None:
    marked, places = mark("ab cd", {"head": (0, 2), "tail": (3, 5)})
    assert marked == "@ ab @ # cd #"
    assert "".join("ab cd"[places[i] : places[i] + 1] for i, c in enumerate(marked) if c.isalpha()) == "abcd"
    assert len(places) == len(marked) + 1


# ---------------------------------------------------------------------------------------------- metrics


def outcomes(pairs: list[tuple[Any, Decision]]) -> list[Outcome]:
    return [Outcome(gold, decision) for gold, decision in pairs]


def test_tags_are_counted_as_seqeval_counts() -> None:
    rng, task = np.random.default_rng(0), make(TaskInfo("tag", ("A", "B", "C")))
    pairs, truth, said = [], [], []
    for _ in range(40):
        both = [_spans(rng) for _ in range(2)]
        truth.append(_iob(both[0]))
        said.append(_iob(both[1]))
        gold = [[start, end, label] for start, end, label in both[0]]
        decided = tuple({"start": start, "end": end, "label": label, "text": ""} for start, end, label in both[1])
        pairs.append((gold, Decision(spans=decided)))
    found = task.measure(outcomes(pairs))
    assert set(found) == set(task.measures)
    assert found["micro_f1"]["value"] == pytest.approx(seqeval_f1(truth, said, mode="strict", scheme=IOB2))
    macro = seqeval_f1(truth, said, mode="strict", scheme=IOB2, average="macro")
    assert found["macro_f1"]["value"] == pytest.approx(macro)


def test_multilabel_numbers_are_scikit_learns() -> None:
    rng, task = np.random.default_rng(1), make(TaskInfo("multilabel", ("a", "b", "c")))
    truth, chances = rng.random((60, 3)) > 0.6, rng.random((60, 3))
    pairs = [
        (
            [label for label, there in zip("abc", row, strict=True) if there],
            Decision(
                labels=tuple(label for label, p in zip("abc", chance, strict=True) if p > 0.5),
                probabilities=dict(zip("abc", chance, strict=True)),
            ),
        )
        for row, chance in zip(truth, chances, strict=True)
    ]
    found = task.measure(outcomes(pairs), resamples=50)
    assert set(found) == set(task.measures)
    assert found["micro_f1"]["value"] == pytest.approx(f1_score(truth, chances > 0.5, average="micro"))
    assert found["macro_f1"]["value"] == pytest.approx(f1_score(truth, chances > 0.5, average="macro"))
    assert found["map"]["value"] == pytest.approx(average_precision_score(truth, chances, average="macro"))
    low, value, high = (found["micro_f1"][key] for key in ("low", "value", "high"))
    assert low is not None
    assert value is not None
    assert high is not None
    assert low < value < high


def test_thresholds_are_those_of_best_f1() -> None:
    task = make(TaskInfo("multilabel", ("a",)))
    raws = [np.array([x], np.float32) for x in (-3.0, -2.0, -1.0, 2.0)]
    rows = [Record("", (), target=Target(labels=labels)) for labels in ((), ("a",), ("a",), ("a",))]
    fitted = task.calibrate(raws, rows, ["text"] * 4)
    said = [task.decide(raw, records("multilabel")[0], fitted, "text").labels for raw in raws]
    assert said == [(), ("a",), ("a",), ("a",)]


@pytest.mark.parametrize("kind", ["classify", "relate"])
def test_what_is_measured_of_classes(kind: str) -> None:
    task = make(TaskInfo(kind, ("a", "b")))
    pairs = [(gold, Decision(label="a", probabilities={"a": 0.7, "b": 0.3})) for gold in "ab"]
    found = task.measure(outcomes(pairs))
    assert set(found) == set(task.measures)
    assert found[task.score]["value"] == 0.5


def test_regression_numbers_are_scikit_learns() -> None:
    rng, task = np.random.default_rng(2), make(TaskInfo("regress", mean=5.0, deviation=2.0))
    truth = rng.normal(1e6, 3, 50)  # far from zero: sums of squares must not lose it
    said = truth + rng.normal(0, 1, 50)
    found = task.measure(outcomes([(t, Decision(value=s)) for t, s in zip(truth, said, strict=True)]))
    assert set(found) == set(task.measures)
    assert found["r2"]["value"] == pytest.approx(r2_score(truth, said), abs=1e-6)
    assert found["mae"]["value"] == pytest.approx(np.abs(truth - said).mean())
    assert found["rmse"]["value"] == pytest.approx(np.sqrt(np.square(truth - said).mean()))


def test_ranks_by_hand_and_auc_by_scikit_learn() -> None:
    task = make(TaskInfo("match"))
    pairs = [
        (["1"], Decision(label="0", probabilities={"0": 0.6, "1": 0.3, "2": 0.1})),
        (["0"], Decision(label="0", probabilities={"0": 0.9, "1": 0.1})),
    ]
    found = task.measure(outcomes(pairs))
    assert set(found) == set(task.measures)
    assert found["mrr"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["recall_at_1"]["value"] == pytest.approx(0.5)
    assert found["auc"]["value"] == pytest.approx(roc_auc_score([0, 1, 0, 1, 0], [0.6, 0.3, 0.1, 0.9, 0.1]))


@pytest.mark.parametrize(
    ("said", "gold", "exact", "f1"),
    [
        ("The Red circle.", "red circle", 1, 1),
        ("red circle", "a big red circle", 0, 0.8),
        ("", "", 1, 1),
        ("", "red", 0, 0),
        ("blue", "red", 0, 0),
    ],
)
def test_answers_are_compared_as_squad_does(said: str, gold: str, exact: float, f1: float) -> None:
    assert exact_match(said, gold) == exact
    assert overlap_f1(said, gold) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("margins", "answered", "said"),
    [
        ((1.0, 2.0, 3.0, 4.0), (False, False, True, True), (False, False, True, True)),  # too bold a model
        ((-4.0, -3.0, -2.0, -1.0), (False, True, True, True), (False, True, True, True)),  # too shy
        ((-4.0, -3.0, -2.0, -1.0), (True, True, True, True), (True, True, True, True)),
        ((1.0, 2.0, 3.0, 3.0), (False, False, False, False), (False, False, False, False)),
        ((-1.0, 1.0, 1.0, 2.0), (False, True, False, True), (False, True, True, True)),  # equal scores, one fate
    ],
)
def test_what_is_no_answer_is_tuned(
    margins: tuple[float, ...], answered: tuple[bool, ...], said: tuple[bool, ...]
) -> None:
    """The best span is the right one; whether it is said is what validation tunes, by F1."""
    task, messages = make(TaskInfo("extract")), parse(context("what is red?")).messages
    rows = [Record("", messages, target=Target(texts=("circle",) if known else ())) for known in answered]
    at = TEXT.index("circle")
    raws = [[(margin, at, at + 6), (margin - 1, 0, 3)] for margin in margins]
    fitted = task.calibrate(raws, rows, ["text"] * len(rows))
    answers = [task.decide(raw, row, fitted, "text") for raw, row in zip(raws, rows, strict=True)]
    assert [bool(answer.text) for answer in answers] == list(said)
    assert all(answer.confidence > 1 / 3 for answer in answers)


def test_without_need_no_answer_stays_where_it_was() -> None:
    task, messages = make(TaskInfo("extract")), parse(context("what is red?")).messages
    row = Record("", messages, target=Target(texts=("red",)))
    assert task.calibrate([[(7.0, 4, 7)], []], [row, row], ["text"] * 2).least == 0.0


def test_an_answer_that_stands_nowhere_is_no_answer() -> None:
    assert spans_of(Record("", parse(context("hm?")).messages, target=Target(texts=("purple",)))) == []
    assert spans_of(Record("", parse(context("hm?")).messages, target=Target(texts=("red",)))) == [(4, 7)]
    assert spans_of(Record("", parse(context("hm?")).messages)) is None


def test_the_best_allowed_path_is_found() -> None:
    """Against all paths of a small case."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores = rng.normal(size=(4, 5))
        allowed = [
            path
            for path in itertools.product(range(5), repeat=4)
            if all(
                tag == 0 or tag % 2 == 1 or before in (tag, tag - 1) for before, tag in itertools.pairwise((0, *path))
            )
        ]
        best = max(allowed, key=lambda path: sum(scores[t, tag] for t, tag in enumerate(path)))
        assert tuple(_viterbi(scores)) == best


def test_candidates_are_ranked_within_their_record_alone() -> None:
    """A record's loss does not depend on which records share its batch."""
    task = Match(info("match"))
    scores = torch.tensor([[1.0], [0.0], [3.0], [2.0], [1.0]])
    right, weight = torch.tensor([1.0, 0, 0, 1, 0]), torch.tensor([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])

    def loss(rows: slice) -> torch.Tensor:
        batch = {
            "match/right": right[rows], "match/known": torch.ones(5)[rows], "weight": weight[rows],
            "sample_row": torch.tensor([0, 0, 1, 1, 1])[rows],
        }  # fmt: skip
        return task.loss(scores[rows], batch, 1, 0.0)

    torch.testing.assert_close(loss(slice(0, 5)), loss(slice(0, 2)) + loss(slice(2, 5)))


def _right(task: Task, rows: list[Record], answers: list[Any]) -> int:
    """How many answers say what the records hold."""
    right = 0
    for record, answer in zip(rows, answers, strict=True):
        gold = task.gold(record)
        said = {
            "classify": answer.label, "relate": answer.label, "multilabel": sorted(answer.labels or ()),
            "regress": answer.value and round(answer.value / 10) * 10.0,
            "extract": [answer.text] if answer.text else [],
            "tag": [[s["start"], s["end"], s["label"]] for s in answer.spans or ()], "match": [answer.label],
        }[task.kind]  # fmt: skip
        right += said == (sorted(gold) if task.kind == "multilabel" else gold)
    return right


def _spans(rng: np.random.Generator) -> list[tuple[int, int, str]]:
    """Spans of a text of 12 one-character tokens, apart from each other."""
    out, at = [], 0
    while (at := at + int(rng.integers(0, 3))) < 10:
        end = at + int(rng.integers(1, 3))
        out.append((at, end, str(rng.choice(["A", "B", "C"]))))
        at = end
    return out


def _iob(spans: list[tuple[int, int, str]]) -> list[str]:
    tags = ["O"] * 12
    for start, end, label in spans:
        tags[start:end] = [f"B-{label}", *[f"I-{label}"] * (end - start - 1)]
    return tags


def _noise() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()
