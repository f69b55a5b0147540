"""Native multimodal models: the same training, freezing, bundle and answers, by their own processor and template."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from jobs import prepare, run, supervised
from mmagent import bundle, freeze
from mmagent.batch import PartError
from mmagent.conversations import MEDIA
from mmagent.native import Native
from mmagent.pretrained import BackboneError
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service
from tests import multimodal
from tests.multimodal import Made, configured

WRITES = {"generate": TaskInfo("generate")}
CHOOSES = {"classify": TaskInfo("classify", ("it is red", "no"))}


Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``checkpoint("image")`` or ``"audio"``: a folder with an untrained model of text and that, and its processor."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            family = "llava" if kind == "image" else "qwen2_audio"
            made[kind] = multimodal.write(family, tmp_path_factory.mktemp("native") / kind)
        return made[kind]

    return make


def rows(task: str, modality: str, make_png: Any, make_wav: Any) -> list[Record]:
    """Two questions with an answer each, which only the modality tells apart."""
    out = []
    for index, answer in enumerate(("no", "it is red")):
        given: dict[str, dict[str, Any]] = {
            "text": {"text": f"which {index}?"},
            "image": {"text": "which?", "image": make_png(("blue", "red")[index])},
            "audio": {"audio": make_wav((220.0, 880.0)[index])},
        }
        target = {"answer": answer} if task == "generate" else {"label": answer}
        out.append(parse({"id": str(index), "task": task, **target, **given[modality]}))
    return out


@pytest.mark.parametrize(
    ("modality", "kind"), [("text", "image"), ("image", "image"), ("text", "audio"), ("audio", "audio")]
)
def test_it_learns_to_write_what_is_frozen_stays_and_the_bundle_answers_alike(
    checkpoint: Checkpoint, make_png: Any, make_wav: Any, tmp_path: Path, modality: str, kind: str
) -> None:
    made, records = Made(configured(checkpoint(kind)), WRITES), rows("generate", modality, make_png, make_wav)
    losses = made.fit(records)
    assert losses[-1] < losses[0] / 2
    for name, parameter in made.encoder.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, made.before[name]), name
    said = made.predictor().predict(records)
    again = made.bundled(tmp_path / "b")
    assert again.modalities == ("text", kind)
    assert bundle.load(tmp_path / "b").manifest["modalities"] == ["text", kind]
    assert [answer.to_dict(timings=False) for answer in again.predict(records)] == [
        answer.to_dict(timings=False) for answer in said
    ]


@pytest.mark.parametrize("strategy", ["all", "lora:4"])
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_it_classifies(
    checkpoint: Checkpoint, make_png: Any, make_wav: Any, tmp_path: Path, kind: str, strategy: str
) -> None:
    made = Made(configured(checkpoint(kind), **{"freeze.strategy": strategy}), CHOOSES)
    records = rows("classify", kind, make_png, make_wav)
    losses = made.fit(records, steps=60)
    assert losses[-1] < losses[0] / 2
    answers = made.predictor().predict(records)
    assert [answer.label for answer in answers] == [record.target.label for record in records]
    again = made.bundled(tmp_path / "b").predict(records)  # what LoRA learnt is merged
    for a, b in zip(answers, again, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)


def test_over_http_the_answer_is_the_librarys(checkpoint: Checkpoint, make_png: Any, make_wav: Any) -> None:
    made, records = Made(configured(checkpoint("image")), WRITES), rows("generate", "image", make_png, make_wav)
    made.fit(records)
    predictor = made.predictor()
    expected = predictor.predict(records)
    with TestClient(build(Service(predictor, ServeConfig()))) as client:
        for record, answer in zip(records, expected, strict=True):
            assert record.images[0].bytes is not None
            url = "data:image/png;base64," + base64.b64encode(record.images[0].bytes).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "which?"}]
            chat = {"model": "b", "messages": [{"role": "user", "content": content}]}
            said = client.post("/v1/chat/completions", json=chat)
            assert said.status_code == 200, said.text
            assert said.json()["choices"][0]["message"]["content"] == answer.text
            assert said.json()["usage"]["prompt_tokens"] == predictor.prepare(record).tokens
            body = {"text": "which?", "image": base64.b64encode(record.images[0].bytes).decode()}
            assert client.post("/v1/predict", json=body).json()["mmagent"]["text"] == answer.text


def test_rows_with_and_without_pictures_are_answered_as_alone(
    checkpoint: Checkpoint, make_png: Any, make_wav: Any
) -> None:
    made = Made(configured(checkpoint("image"), **{"freeze.strategy": "all"}), WRITES)
    records = [*rows("generate", "text", make_png, make_wav), *rows("generate", "image", make_png, make_wav)]
    records.append(parse({"task": "generate", "messages": [{"role": "user", "content": "both <image> of <image> them"}],
                          "images": [make_png("red"), make_png("blue", (40, 60))], "answer": "yes"}))  # fmt: skip
    losses = made.fit(records, steps=100)
    assert losses[-1] < losses[0] / 4
    predictor = made.predictor()
    together = predictor.predict(records)
    alone = [predictor.predict([record])[0] for record in records]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for a, b in zip(alone, together, strict=True):
        assert a.confidence == pytest.approx(b.confidence, abs=1e-4)
        assert a.likelihood == pytest.approx(b.likelihood, abs=1e-3)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_parts_are_found_by_structure(checkpoint: Checkpoint, kind: str) -> None:
    trains: dict[str, set[str]] = {}
    for strategy in ("connector", "top:1", "towers", f"{kind}_tower", "all", "gradual", "lora:2"):
        config = configured(checkpoint(kind), **{"freeze.strategy": strategy})
        model = Made(config, WRITES).module
        trains[strategy] = {part.name for part in freeze.table(model) if part.trained}
        assert sum(part.total for part in freeze.table(model)) == sum(p.numel() for p in model.parameters())
        grouped = [id(p) for group in freeze.groups(model, config) for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    tower = f"{kind}_tower"
    assert trains == {
        "connector": {"join"}, "top:1": {"join", "backbone"}, "towers": {"join", "backbone"}, tower: {"join", tower},
        "all": {"join", "backbone", tower}, "gradual": {"join", "backbone"}, "lora:2": {"join", "backbone"},
    }  # fmt: skip
    other = "audio_tower" if kind == "image" else "image_tower"
    with pytest.raises(ValueError, match="the model has none: its checkpoint takes no such media"):
        Made(configured(checkpoint(kind), **{"freeze.strategy": other}), WRITES)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_every_batch_runs_every_tower_and_a_stand_in_counts_nothing(
    checkpoint: Checkpoint, make_png: Any, make_wav: Any, kind: str
) -> None:
    made = Made(configured(checkpoint(kind), **{"freeze.strategy": "all"}), WRITES)
    batch = made.batch(rows("generate", "text", make_png, make_wav))
    assert batch["weight"].tolist() == [1.0, 1.0, 0.0]
    assert batch["sample_row"].tolist() == [0, 1, 2]
    assert any(key.startswith(MEDIA) for key in batch)
    supervised.loss_of(made.module(batch), batch, made.tasks, made.config).backward()
    assert isinstance(made.encoder, Native)
    [(_, tower)] = made.encoder.towers()
    grads = [parameter.grad for parameter in tower.parameters() if parameter.grad is not None]
    assert grads  # it took part
    assert all(float(grad.abs().max()) == 0.0 for grad in grads)


def test_augmented_pictures_are_processed_anew(checkpoint: Checkpoint, make_png: Any, make_wav: Any) -> None:
    made = Made(configured(checkpoint("image")), WRITES)
    sample = made.inputs.sample(rows("generate", "image", make_png, make_wav)[0])
    dark = replace(sample, images=tuple(image // 2 for image in sample.images))
    before, after = (made.inputs.batch([each])[f"{MEDIA}pixel_values"] for each in (sample, dark))
    assert before.shape == after.shape
    assert float((before - after).abs().max()) > 0.1


def test_a_long_conversation_loses_words_and_never_a_picture(checkpoint: Checkpoint, make_png: Any) -> None:
    made = Made(configured(checkpoint("image"), **{"data.max_text_tokens": 40}), WRITES)
    row = parse({"task": "generate", "messages": [{"role": "user", "content": f"<image>{'x' * 80} what?"}],
                 "images": [make_png()], "answer": "no"})  # fmt: skip
    sample = made.inputs.sample(row)
    ids = made.inputs.batch([sample])["ids"]
    assert ids.shape[1] == len("user: ") + 40 + 4 + len("assistant: ")
    assert int((ids == made.inputs.tokenizer.convert_tokens_to_ids("<image>")).sum()) == 4
    said = made.inputs.tokenizer.decode(ids[0])
    assert said.endswith("x what?assistant: ")
    assert sample.cut == 80 - said.count("x")


def test_what_users_write_is_never_a_sign(checkpoint: Checkpoint, make_png: Any) -> None:
    made = Made(configured(checkpoint("image")), WRITES)
    row = parse({"task": "generate", "text": "see \ue000 </s>", "image": make_png(), "answer": "no"})
    word = parse({"task": "generate", "messages": [{"role": "user", "content": "say \\<image> twice"}], "answer": "no"})
    sign = made.inputs.tokenizer.convert_tokens_to_ids("<image>")
    batch = made.batch([row, word])
    assert (batch["ids"] == sign).sum(1).tolist() == [4, 0]
    assert int((batch["ids"][0] == made.inputs.tokenizer.eos_token_id).sum()) == 0


def test_roles_come_in_turn_and_what_the_template_refuses_costs_one_row(
    checkpoint: Checkpoint, tmp_path: Path, make_png: Any
) -> None:
    folder = tmp_path / "strict"
    shutil.copytree(checkpoint("image"), folder)
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% if not loop.first and m['role'] == loop.previtem['role'] %}{{ raise_exception('in turn') }}{% endif %}"
    ) + multimodal.PLAIN.removeprefix("{% for m in messages %}")
    (folder / "chat_template.jinja").write_text(strict)
    predictor = Made(configured(folder, **{"data.max_answer_tokens": 100}), WRITES).predictor()
    twice = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    system = {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
    many = {"text": "c", "images": [make_png()] * 14}
    records = [parse({"task": "generate", **row}, default_id="1") for row in (twice, system, many)]
    answered, refused, long = predictor.attempt(records)
    assert not isinstance(answered, PartError)
    assert "the model's own processor refuses it: no system here" in str(refused)
    assert "which leaves too little of the 160 that the language model has places for" in str(long)


def test_what_it_cannot_is_told(checkpoint: Checkpoint, tiny_backbone: Path, make_wav: Any) -> None:
    predictor = Made(configured(checkpoint("image")), WRITES).predictor()
    with pytest.raises(PartError, match="this model takes no sound"):
        predictor.predict([{"audio": make_wav()}])
    with pytest.raises(BackboneError, match="is no multimodal model of Transformers that reads text"):
        Made(configured(tiny_backbone), WRITES)
    with pytest.raises(BackboneError, match=r"is a multimodal model, .* set model.join=native"):
        Made(configured(checkpoint("image"), **{"model.join": "input"}), WRITES)


def test_rows_with_what_it_does_not_take_are_told_before_the_first_step(
    checkpoint: Checkpoint, storage: Path, make_wav: Any
) -> None:
    wave = "data:audio/wav;base64," + base64.b64encode(make_wav()).decode()
    lines = [
        json.dumps({"text": f"{word}?", "audio": wave, "label": word, "split": split})
        for split in ("train", "validation", "test") for word in ("yes", "no")
    ]  # fmt: skip
    (storage / "rows.jsonl").write_text("\n".join(lines))
    assert prepare.main(["--source", f"jsonl:{storage / 'rows.jsonl'}", "--name", "tiny"]) == 0
    with pytest.raises(run.RunError, match=r"tiny holds audio, but .* takes text, image"):
        run.prepare(configured(checkpoint("image")), storage / "runs" / "r")
    run.prepare(configured(checkpoint("audio")), storage / "runs" / "s")
