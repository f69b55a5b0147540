"""generate: the language model writes, whatever stands before it, alone or in a batch, before and after its bundle."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf
from transformers import AutoTokenizer

from jobs import prepare, run, supervised
from mmagent import bundle, freeze, text
from mmagent.assembly import load_language
from mmagent.batch import Inputs
from mmagent.config import Config, resolve
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from mmagent.tasks import Decision, Outcome, make, make_all

INFOS = {"generate": TaskInfo("generate")}
ANSWERS = ("red circle", "the blue image", "not green")


def rows(modality: str, make_wav: Callable[..., bytes]) -> list[Record]:
    given: list[dict[str, Any]] = []
    for index, answer in enumerate(ANSWERS):
        row: dict[str, Any] = {"text": f"what is {'abc'[index]}", "answer": answer}
        if modality == "image":
            words = [{"role": "user", "content": "what is <image> there"}]
            row = {"messages": words, "images": [picture(index)], "target": {"text": answer}}
        elif modality == "audio":
            row = {"audio": make_wav(200.0 * (index + 1)), "answer": answer}
        given.append({"task": "generate", **row})
    return [parse(row, default_id=str(index)) for index, row in enumerate(given)]


def picture(index: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def configured(recipe: dict[str, Any], backbone: Path, **overrides: Any) -> Config:
    given = {
        "model.backbone": str(backbone), "model.join": "input", "model.dropout": 0.0, "model.head_dropout": 0.0,
        "data.max_text_tokens": 24, "data.max_answer_tokens": 12, "freeze.strategy": "all", **overrides,
    }  # fmt: skip
    return resolve(recipe, given)


def trained(config: Config, records: list[Record], infos: dict[str, TaskInfo], steps: int) -> tuple[list[float], Any]:
    """The losses of a few steps on all rows, and a predictor of what they taught."""
    tasks = make_all(infos)
    encoder = load_language(config.model, tasks, dropout=0.0)
    tokenizer = text.load_tokenizer(config.model.backbone)
    module = supervised.build(config, tasks, encoder)
    inputs = Inputs(config.model, config.data, tokenizer, tasks, encoder)
    batch = inputs.batch([inputs.sample(record) for record in records])
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    losses: list[float] = []
    for _ in range(steps):
        loss = supervised.loss_of(module(batch), batch, tasks, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    predictor = Predictor(
        name="b", config=config, tasks=tasks, task=next(iter(infos)), model=module, encoder=encoder,
        tokenizer=tokenizer, device="cpu",
    )  # fmt: skip
    return losses, predictor


@pytest.mark.long
@pytest.mark.parametrize("modality", ["text", "image", "audio"])
@pytest.mark.parametrize("kind", ["decoder", "transposed", "encoder-decoder", "pair"])
def test_it_learns_to_write(
    writers: dict[str, Path], tiny_recipe: dict[str, Any], make_wav: Callable[..., bytes], tmp_path: Path, kind: str,
    modality: str,
) -> None:  # fmt: skip
    absent = {f"model.{other}": None for other in ("image", "audio") if other != modality}
    config = configured(tiny_recipe, writers[kind], **absent)
    records = rows(modality, make_wav)
    losses, predictor = trained(config, records, INFOS, steps=300 if kind == "pair" else 150)
    assert losses[29] < losses[0] / 2
    said = predictor.predict(records)
    assert [answer.text for answer in said] == list(ANSWERS)
    assert [predictor.predict([record])[0].text for record in records] == list(ANSWERS)  # alone as in a batch
    assert all(0.5 < answer.confidence < 1 for answer in said)

    bundle.save(
        tmp_path / "b", name="b", config=config, tasks=INFOS, task="generate",
        state={k: v for k, v in predictor.model.state_dict().items() if not k.startswith("backbone.")},
        backbone=predictor.model.backbone, tokenizer=predictor.inputs.tokenizer, calibration=predictor.calibration,
        origin={},
    )  # fmt: skip
    after = Predictor.load(tmp_path / "b", device="cpu").predict(records)
    assert [each.to_dict(timings=False) for each in after] == [each.to_dict(timings=False) for each in said]
    half = Predictor.load(tmp_path / "b", device="cpu", precision="bf16").predict(records)
    assert [each.text for each in half] == list(ANSWERS)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_what_is_frozen_stays(
    writers: dict[str, Path], tiny_recipe: dict[str, Any], make_wav: Callable[..., bytes], kind: str
) -> None:
    config = configured(tiny_recipe, writers[kind], **{"model.audio": None, "freeze.strategy": "connector"})
    before = {name: value.clone() for name, value in load_language(config.model, INFOS).state_dict().items()}
    losses, predictor = trained(config, rows("image", make_wav), INFOS, steps=20)
    assert losses[-1] < losses[0]
    after = predictor.model.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_tasks_share_a_model_that_writes(
    writers: dict[str, Path], tiny_recipe: dict[str, Any], make_wav: Callable[..., bytes]
) -> None:
    infos = {"classify": TaskInfo("classify", ("blue", "red")), **INFOS}
    config = configured(tiny_recipe, writers["decoder"], **{"model.image": None, "model.audio": None})
    asked = [parse({"task": "classify", "text": f"a {c}", "label": c}, default_id=c) for c in ("red", "blue")]
    records = [*rows("text", make_wav), *asked]
    losses, predictor = trained(config, records, infos, steps=120)
    assert losses[-1] < losses[0] / 2
    assert [answer.words for answer in predictor.predict(records)] == [*ANSWERS, "red", "blue"]


def test_the_right_answer_is_weighed_without_being_written(
    writers: dict[str, Path], tiny_recipe: dict[str, Any], make_wav: Callable[..., bytes]
) -> None:
    """The likelihood is that of the tokens one by one, from the language model alone."""
    config = configured(tiny_recipe, writers["decoder"], **{"model.image": None, "model.audio": None})
    _, predictor = trained(config, rows("text", make_wav), INFOS, steps=5)
    [record] = rows("text", make_wav)[:1]
    sample = predictor.prepare(record)
    [raw] = predictor.raws([sample])
    prompt, reply = sample.views[0].ids.tolist(), sample.views[0].reply
    assert reply is not None
    model = predictor.model.backbone.model
    chances = 0.0
    for index, token in enumerate(reply.tolist()):
        ids = torch.tensor([prompt + reply[:index].tolist()])
        chances += float(model(input_ids=ids).logits[0, -1].log_softmax(-1)[token])
    assert raw.likelihood[0] == pytest.approx(chances, rel=1e-4)
    assert raw.likelihood[1] == len(reply)


def test_an_encoder_does_not_write(tiny_recipe: dict[str, Any], tiny_backbone: Path) -> None:
    config = configured(tiny_recipe, tiny_backbone)
    with pytest.raises(text.BackboneError, match="only reads: the task generate wants a decoder"):
        load_language(config.model, INFOS)


def test_nothing_to_train_is_told(writers: dict[str, Path], tiny_recipe: dict[str, Any]) -> None:
    config = configured(
        tiny_recipe, writers["decoder"], **{"model.image": None, "model.audio": None, "freeze.strategy": "connector"}
    )
    tasks = make_all(INFOS)
    with pytest.raises(ValueError, match=r"leaves nothing of this model to train.*lora:R"):
        supervised.build(config, tasks, load_language(config.model, tasks))


def test_a_chat_template_frames_what_users_say(writers: dict[str, Path], tiny_recipe: dict[str, Any]) -> None:
    """Its signs in a user's words are words; a picture stands where its placeholder is."""
    config = configured(tiny_recipe, writers["decoder"], **{"model.audio": None})
    tokenizer = text.load_tokenizer(config.model.backbone)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tasks = make_all(INFOS)
    inputs = Inputs(config.model, config.data, tokenizer, tasks, load_language(config.model, tasks))
    words = [{"role": "user", "content": "red <image> <|endoftext|> blue"}]
    row = {"task": "generate", "messages": words, "images": [picture(0)]}
    ids = inputs.sample(parse(row, default_id="1")).views[0].ids
    assert int((ids == tokenizer.eos_token_id).sum()) == 1
    assert config.model.image is not None
    assert int((ids == -1).sum()) == config.model.image.tokens
    shown = tokenizer.decode([token if token >= 0 else tokenizer.pad_token_id for token in ids.tolist()])
    pads = "<pad>" * config.model.image.tokens
    assert shown == f"user: red {pads} <|endoftext|> blue<|endoftext|>assistant:"


def test_long_words_are_cut_and_pictures_are_not(writers: dict[str, Path], tiny_recipe: dict[str, Any]) -> None:
    config = configured(tiny_recipe, writers["decoder"], **{"model.audio": None, "data.max_text_tokens": 8})
    tasks = make_all(INFOS)
    tokenizer = text.load_tokenizer(config.model.backbone)
    inputs = Inputs(config.model, config.data, tokenizer, tasks, load_language(config.model, tasks))
    words = [{"role": "user", "content": "red " * 20 + "<image> blue " + "green " * 3}]
    row = {"task": "generate", "messages": words, "images": [picture(0)]}
    [view] = inputs.sample(parse(row, default_id="1")).views
    kept = [token for token in view.ids.tolist() if token >= 0]
    assert len(kept) == 8
    assert view.cut > 0
    assert config.model.image is not None
    assert int((view.ids == -1).sum()) == config.model.image.tokens
    assert tokenizer.decode(kept).endswith("green green \n")


def test_metrics_are_those_of_the_libraries() -> None:
    said = ["the cat sat on the mat", "a dog barks loudly", "nothing"]
    golds = [["the cat sat on a mat"], ["the dog barks loudly", "a dog barks"], ["something else"]]
    outcomes = [
        Outcome({"texts": right, "heard": True}, Decision(text=one, likelihood=(-2.0, 4)))
        for one, right in zip(said, golds, strict=True)
    ]
    found = make(INFOS["generate"]).measure(outcomes)
    references = [[right[min(index, len(right) - 1)] if index == 0 else (right[1] if len(right) > 1 else right[0])
                   for right in golds] for index in range(2)]  # fmt: skip
    assert found["bleu"]["value"] == pytest.approx(corpus_bleu(said, references).score / 100)
    assert found["chrf"]["value"] == pytest.approx(corpus_chrf(said, references).score / 100)
    scorer = RougeScorer(["rougeL"])
    rouge = [max(scorer.score(g, s)["rougeL"].fmeasure for g in right) for s, right in zip(said, golds, strict=True)]
    assert found["rouge_l"]["value"] == pytest.approx(np.mean(rouge))
    assert found["perplexity"]["value"] == pytest.approx(np.exp(0.5))
    assert found["exact"]["value"] == 0
    assert found["wer"]["value"] == pytest.approx((1 + 1 + 2) / (6 + 4 + 2))


def test_freezing_finds_both_halves_of_an_encoder_decoder(
    writers: dict[str, Path], tiny_recipe: dict[str, Any]
) -> None:
    config = configured(
        tiny_recipe, writers["encoder-decoder"],
        **{"model.image": None, "model.audio": None, "freeze.strategy": "top:1"},
    )  # fmt: skip
    tasks = make_all(INFOS)
    model = supervised.build(config, tasks, load_language(config.model, tasks))
    open_ = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("backbone.model.decoder.block.1.") for name in open_)
    assert not any(name.startswith("backbone.model.encoder.block.") for name in open_)
    assert {part.name: part.total for part in freeze.table(model)}["backbone"] > 0


def test_an_end_that_the_language_model_does_not_know_is_told_before_the_first_step(
    writers: dict[str, Path], tiny_recipe: dict[str, Any], storage: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "decoder"
    shutil.copytree(writers["decoder"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<the end>"})
    tokenizer.save_pretrained(folder)
    lines = [json.dumps({"text": "hm?", "answer": "no", "split": split}) for split in ("train", "validation", "test")]
    (storage / "rows.jsonl").write_text("\n".join(lines))
    assert prepare.main(["--source", f"jsonl:{storage / 'rows.jsonl'}", "--name", "rows"]) == 0
    config = configured(tiny_recipe, folder, **{"data.name": "rows"})
    with pytest.raises(run.RunError, match="ends a text with '<the end>', number"):
        run.prepare(config, storage / "runs" / "r")
