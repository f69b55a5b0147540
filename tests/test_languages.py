"""Nothing is English: German and Chinese, written and spoken, from a file of rows to an answer with its characters."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import prepare, supervised
from jobs.speech import render
from mmagent import freeze, text
from mmagent.batch import Inputs
from mmagent.config import resolve
from mmagent.frozen import FrozenStates
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.shards import Dataset
from mmagent.speech import Clip


@dataclass(frozen=True)
class Language:
    voice: str
    sentences: tuple[tuple[str, str, str, str], ...]  # words, intent, from, to

    def __str__(self) -> str:
        return self.voice


GERMAN = Language(
    "de+f2",
    (
        ("Ich möchte einen Flug von München nach Köln buchen", "buchen", "München", "Köln"),
        ("Storniere bitte die Reise von Köln nach Zürich", "stornieren", "Köln", "Zürich"),
        ("Gibt es einen Zug von Zürich nach München?", "fragen", "Zürich", "München"),
    ),
)
CHINESE = Language(
    "cmn",
    (
        ("我想订一张从北京到上海的机票", "预订", "北京", "上海"),
        ("请取消从上海到广州的行程", "取消", "上海", "广州"),
        ("有没有从广州到北京的火车?", "询问", "广州", "北京"),
    ),
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers, untrained, with a WordPiece tokenizer that learned the sentences of both languages."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    learner = BertWordPieceTokenizer(strip_accents=False, lowercase=False)
    sentences = [words for language in (GERMAN, CHINESE) for words, *_ in language.sentences]
    learner.train_from_iterator(sentences, vocab_size=400, min_frequency=1, show_progress=False)
    folder = tmp_path_factory.mktemp("languages")
    PreTrainedTokenizerFast(
        tokenizer_object=learner._tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=learner.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def prepared(storage: Path, name: str, rows: list[dict[str, Any]]) -> tuple[Dataset, list[Record]]:
    """What `jobs.prepare` makes of rows."""
    file = storage / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert prepare.main(["--source", f"jsonl:{file}", "--name", name]) == 0
    dataset = Dataset.open(storage / "data" / name)
    return dataset, [Record.from_row(row) for table in dataset.read("train") for row in table.to_pylist()]


def trained(config: Any, dataset: Dataset, records: list[Record], steps: int) -> Predictor:
    """A predictor whose join, towers and heads have seen the records."""
    predictor = Predictor.untrained(config, dataset.tasks, dataset.task, device="cpu")
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    module = supervised.build(config, predictor.tasks, encoder)
    inputs = Inputs(config.model, config.data, tokenizer, predictor.tasks)
    batch = inputs.batch([inputs.sample(record) for record in records])
    batch["text_states"] = FrozenStates(encoder)(batch["ids"], batch["mask"])
    optimizer = torch.optim.AdamW(freeze.groups(module, config), lr=3e-3)
    for _ in range(steps):
        loss = supervised.loss_of(module(batch), batch, predictor.tasks, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Predictor(
        name="b", config=config, tasks=predictor.tasks, task=dataset.task, model=module.eval(), encoder=encoder,
        tokenizer=tokenizer, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("language", [GERMAN, CHINESE], ids=str)
def test_spans_are_found_in_written_sentences(
    storage: Path, backbone: Path, tiny_recipe: dict[str, Any], language: Language
) -> None:
    rows = [
        {
            "text": words,
            "spans": [
                {"start": words.index(place), "end": words.index(place) + len(place), "label": label}
                for label, place in (("from", start), ("to", end))
            ],
            "split": split,
        }
        for split in ("train", "validation", "test")
        for words, _, start, end in language.sentences
    ]
    dataset, records = prepared(storage, "written", rows)
    overrides = {"model.backbone": str(backbone), "model.image": None, "model.audio": None, "model.dropout": 0.0}
    predictor = trained(resolve(tiny_recipe, overrides), dataset, records, steps=60)
    for words, _, start, end in language.sentences:
        spans = predictor.predict([{"text": words}])[0].spans
        assert spans is not None
        assert {span["label"]: span["text"] for span in spans} == {"from": start, "to": end}
        assert all(words[span["start"] : span["end"]] == span["text"] for span in spans)


@pytest.mark.parametrize("language", [GERMAN, CHINESE], ids=str)
def test_intents_are_heard_in_spoken_sentences(
    storage: Path, backbone: Path, tiny_recipe: dict[str, Any], language: Language
) -> None:
    clips = {words: Clip(words, language.voice) for words, *_ in language.sentences}
    sounds = {clip.text: sound for clip, sound in render(clips.values(), 1)}
    assert len(set(sounds.values())) == len(clips)
    rows = [
        {"audio": base64.b64encode(sounds[words]).decode(), "label": intent, "split": split}
        for split in ("train", "validation", "test")
        for words, intent, *_ in language.sentences
    ]
    dataset, records = prepared(storage, "spoken", rows)
    assert set(dataset.tasks["classify"].labels) == {intent for _, intent, *_ in language.sentences}
    overrides = {"model.backbone": str(backbone), "model.image": None, "model.dropout": 0.0}
    predictor = trained(resolve(tiny_recipe, overrides), dataset, records, steps=40)
    answers = predictor.predict([{"audio": sounds[words]} for words, *_ in language.sentences])
    assert [answer.label for answer in answers] == [intent for _, intent, *_ in language.sentences]
