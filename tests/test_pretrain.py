"""The pretraining command as a user walks it, on a real Ray: text and pairs in, a backbone and towers out."""

from __future__ import annotations

import itertools
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from jobs import cluster, corpus, pretrain, run, stream, train, watch
from jobs.alignment import Aligned
from jobs.engine import TorchEngine
from mmagent import freeze, text
from mmagent.config import resolve
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.shards import Dataset
from tests.test_train import lines, stop_soon

Command = Callable[..., int]
ANIMALS = "falcon otter lynx heron badger weasel ferret stoat marten beaver ibex bison".split()
TOOLS = "hammer chisel pliers wrench mallet rasp gimlet sickle trowel anvil spanner lathe".split()
LIVING = ("the {} eats in the wood", "a {} sleeps at night", "the young {} breathes", "we saw a {} drink water")
LIFELESS = ("the {} hangs on the wall", "a {} is made of steel", "the rusty {} broke", "we bought a {} for work")


def sentences() -> list[str]:
    """What is said of animals, and of tools; every word of both kinds."""
    pairs = ((ANIMALS, LIVING), (TOOLS, LIFELESS))
    return [form.format(word) for words, forms in pairs for word in words for form in forms]


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained BERT that knows the words of `sentences`, each as one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for sentence in sentences() for word in sentence.split()})
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                   intermediate_size=96, max_position_embeddings=32)
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def recipe(small_bert: Path, tmp_path: Path) -> Path:
    content = {
        "data": {"name": "x", "max_text_tokens": 16},
        "model": {"backbone": str(small_bert), "width": 32, "layers": 1, "heads": 2},
        "freeze": {"strategy": "all"},
        "optim": {"lr_backbone": 3.0e-3, "weight_decay": 0.0, "lr": 3.0e-3},
        "train": {"micro_batch": 16, "epochs": 60, "eval_every_steps": 100, "eval_rows": 64},
        "cluster": {"workers": 1, "max_failures": 0},
        "zero": {"engine": "torch"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def command(ray_cluster: cluster.Cluster, storage: Path, recipe: Path) -> Iterator[Command]:
    """``command("name", "key=value", ...)``: the exit status of a pretraining on the sentences."""
    (storage / "corpus.txt").write_text("\n\n".join(sentences() * 2))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda name, *arguments: pretrain.main(["--config", str(recipe), "--name", name, *arguments])
    for number, handler in before.items():
        signal.signal(number, handler)


def nouns(storage: Path, name: str, *, seed: int) -> None:
    """What is alive: taught on six words of each kind, asked about the six others."""
    drawn = random.Random(seed)
    rows = []
    for label, words in (("alive", ANIMALS), ("lifeless", TOOLS)):
        order = drawn.sample(words, len(words))
        rows += [{"text": f"the {word}", "label": label, "split": "train"} for word in order[:6]]
        rows += [{"text": f"a {word}", "label": label, "split": "validation"} for word in order[:3]]
        rows += [{"text": f"the {word}", "label": label, "split": "test"} for word in order[6:]]
    file = storage / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from jobs import prepare

    assert prepare.main(["--source", f"jsonl:{file}", "--name", name, "--workers", "1"]) == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_words_learned_from_plain_text_help_a_task_with_few_labels(
    command: Command, storage: Path, recipe: Path, small_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # -- stopped at its first checkpoint, gone on, and left as a backbone ------------------------------------
    folder = storage / "runs" / "words"
    watcher = stop_soon(folder)
    assert command("words", "--source", "text:corpus.txt") == watch.EXIT_STOPPED
    watcher.join()
    assert "the same command goes on from there" in capsys.readouterr().out
    assert not (folder / "backbone").exists()
    assert command("words", "--source", "text:corpus.txt") == 0
    shown = capsys.readouterr().out
    assert "goes on at step" in shown
    assert "model.backbone=runs/words/backbone" in shown
    made = json.loads((folder / "backbone" / "pretrained.json").read_text())
    assert (made["objective"], made["from"], made["data"]) == ("masked", str(small_bert), "text:corpus.txt")
    first, *_, last = lines(folder, "validation")
    assert (first["main"], last["step"]) == ("perplexity", made["checkpoint"]["step"] or last["step"])
    assert made["validation"]["perplexity"] < 15 < 80  # of 70 words; an untrained model's is about 70
    assert last["perplexity"] <= first["perplexity"] * 1.5
    before, after = (load_file(place / "model.safetensors") for place in (small_bert, folder / "backbone"))
    assert any(not torch.equal(before[key], after[f"bert.{key}"]) for key in before if f"bert.{key}" in after)
    # Done: the same command has nothing left to do.
    assert command("words", "--source", "text:corpus.txt") == 0
    assert "validation perplexity" not in capsys.readouterr().out

    # -- the same few labels, with the language model frozen, before and after --------------------------------
    right = {}
    for kind, backbone in (("before", str(small_bert)), ("after", "runs/words/backbone")):
        found = []
        for seed in (0, 1):
            nouns(storage, f"nouns{seed}", seed=seed) if kind == "before" else None
            settings = [f"data.name=nouns{seed}", f"model.backbone={backbone}", "freeze.strategy=connector"]
            name = f"{kind}{seed}"
            arguments = [
                "--config",
                str(recipe),
                "--name",
                name,
                *settings,
                "train.epochs=40",
                "train.eval_every_steps=20",
            ]
            assert train.main(arguments) == 0
            result = json.loads((storage / "runs" / name / "evaluation.json").read_text())
            found.append(result["metrics"]["accuracy"]["value"])
        right[kind] = sum(found) / len(found)
    print(f"words never labelled: {right['before']:.0%} right before, {right['after']:.0%} after pretraining")
    assert right["after"] >= 0.85
    assert right["after"] >= right["before"] + 0.15


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_decoder_learns_what_comes_next_in_two_zero_workers(
    command: Command, storage: Path, tiny_backbones: dict[str, Path], stage: int
) -> None:
    settings = [
        f"model.backbone={tiny_backbones['decoder']}", "cluster.workers=2", "zero.engine=deepspeed",
        f"zero.stage={stage}",
        "train.max_steps=12", "train.eval_every_steps=6", "optim.lr_backbone=0.01",
    ]  # fmt: skip
    assert command("next", "--source", "text:corpus.txt", *settings) == 0
    made = json.loads((storage / "runs" / "next" / "backbone" / "pretrained.json").read_text())
    assert made["objective"] == "next"
    first, last = lines(storage / "runs" / "next", "validation")
    assert last["perplexity"] < first["perplexity"]
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(storage / "runs" / "next" / "backbone").config.model_type == "qwen2"


@pytest.fixture
def pairs(
    storage: Path, tiny_recipe: dict[str, Any],
    make_dataset: Callable[..., Dataset], make_png: Callable[..., bytes], make_wav: Callable[..., bytes],
) -> dict[str, Any]:  # fmt: skip
    """A data set of pictures and sounds, each with words of its own colour, and a recipe that learns from it."""
    colours = ("red", "green", "blue", "black")

    def pair(index: int, split: str) -> Record:
        word, kind = colours[index % 4], index // 4 % 2
        media: dict[str, Any] = {"audio": make_wav(200.0 * (1 + index % 4))} if kind else {"image": make_png(word)}
        row = {"id": f"{split}-{index}", "text": f"{word} circle", "label": word, "split": split, **media}
        return parse(row | ({"text": "", "meta": {"transcript": f"{word} circle"}} if kind else {}))

    counts = {"train": 128, "validation": 16}
    records = {split: [pair(index, split) for index in range(count)] for split, count in counts.items()}
    make_dataset(storage / "data" / "pairs", records)
    return tiny_recipe | {
        "data": tiny_recipe["data"] | {"name": "pairs"},
        "train": {"micro_batch": 16, "epochs": 12, "eval_every_steps": 32, "eval_rows": 16},
        "optim": {"lr": 3.0e-3}, "cluster": {"workers": 1, "max_failures": 0}, "zero": {"stage": 0},
        "pretrain": {"objective": "align"},
    }  # fmt: skip


def test_a_run_on_pairs_reads_them_and_learns(pairs: dict[str, Any], storage: Path) -> None:
    """What the slow test below does, in this process alone and in plain torch."""
    dataset = Dataset.open(storage / "data" / "pairs")
    config = resolve(pairs, {"zero.engine": "torch"})
    plan = pretrain.prepare(config, storage / "runs" / "seen", dataset, "pairs").plan
    learner = Aligned(plan)
    engine = TorchEngine(learner.model, freeze.groups(learner.model, plan.config), plan.config)
    learner.begin(engine.device)
    corpus_made = Dataset.open(storage / "runs" / "seen" / "corpus")
    rows = learner.rows(stream.tables(*run.reads(plan, corpus_made, "validation", 1)))
    assert len(rows) == 16
    losses, tables = [], stream.tables(*run.reads(plan, corpus_made, "train", 1))
    engine.set_lr(1.0)
    for step in itertools.islice(learner.steps(tables), 24):
        assert not step.bad_rows
        [batch] = step.micros
        loss = learner.loss(engine.forward(batch), batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_towers_learn_the_words_that_belong_to_them(
    ray_cluster: cluster.Cluster, storage: Path, pairs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(pairs))
    assert pretrain.main(["--config", str(tmp_path / "align.yaml"), "--name", "seen", "--data", "pairs"]) == 0
    folder = storage / "runs" / "seen"
    made = json.loads((folder / "backbone" / "pretrained.json").read_text())
    assert made["validation"]["recall_at_1/image"] >= 0.9
    assert made["validation"]["recall_at_1/audio"] >= 0.9
    text.load_encoder("runs/seen/backbone")

    # A training begins with these towers, and says so where they do not fit.
    start = [f"model.{kind}.start=runs/seen/towers/{kind}" for kind in ("image", "audio")]
    given = ["--config", str(tmp_path / "align.yaml"), "--no-evaluate"]
    given += ["data.name=pairs", "train.max_steps=1", "optim.lr=1e-9", *start]
    assert train.main(["--name", "begun", *given]) == 0
    bundle = load_file(storage / "runs" / "begun" / "bundle" / "model.safetensors")
    tower = load_file(folder / "towers" / "image" / "tower.safetensors")
    torch.testing.assert_close(bundle["image_tower.places"], tower["tower.places"], atol=1e-6, rtol=1e-5)
    heard = load_file(folder / "towers" / "audio" / "tower.safetensors")
    torch.testing.assert_close(bundle["speech.weight"], heard["projection.weight"], atol=1e-6, rtol=1e-5)
    assert train.main(["--name", "wide", *given, "model.image.width=64"]) == 2


# ---------------------------------------------------------------------------------------------- before the first step


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "text:corpus.txt", "freeze.strategy=connector"], "give freeze.strategy=all"),
        (["--source", "text:corpus.txt", "pretrain.objective=align"], "give the section model.image or model.audio"),
        (["--source", "text:nowhere.txt"], "nowhere.txt does not exist"),
        (["--data", "nowhere"], "is not there; make it with"),
        (["--source", "txt:corpus.txt"], "did you mean text:PATH"),
        (["--source", "text:corpus.txt", "data.max_text_tokens=64"], "takes 32 at most"),
        (["--source", "text:corpus.txt", "pretrain.mask=0.2"], "did you mean 'pretrain.mask_share'"),
        (["--source", "text:one.txt"], "more are wanted"),
        (["--data", "x", "--map", "text=body"], "--map is for a source"),
    ],
)
def test_a_mistake_is_told_before_a_worker_starts(
    command: Command, storage: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (storage / "one.txt").write_text("the otter\n")
    assert command("r", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (storage / "runs" / "r" / "ray").exists()


def test_passages_are_as_long_as_the_model_reads_and_each_once(small_bert: Path) -> None:
    tokenizer = text.load_tokenizer(str(small_bert))
    long = " ".join(sentences()[:12])
    records = [("train", parse({"text": words})) for words in (long, "the otter", "the otter", "<image> a lynx")]
    made = [record for _, record in corpus.passages(records, tokenizer, 16)]
    said = [text.words(record) for record in made]
    assert said[-2:] == ["the otter", "<image> a lynx"]  # what a user typed like a placeholder is words
    assert " ".join(said[:-2]) == long
    assert all(len(tokenizer(words)["input_ids"]) <= 16 for words in said)
    assert len({record.id for record in made}) == len(made)


def test_the_words_of_a_pair(make_png: Callable[..., bytes], make_wav: Callable[..., bytes]) -> None:
    rows = (
        {"id": "caption", "text": "what is this?", "image": make_png(), "task": "generate", "answer": "a red square"},
        {"id": "spoken", "audio": make_wav(), "meta": {"transcript": "turn it off"}, "label": "off"},
        {"id": "own", "text": "a blue one", "image": make_png(), "label": "x"},
        {"id": "words", "text": "no picture", "label": "x"},
        {"id": "deaf", "audio": make_wav(), "text": "not heard", "label": "x"},
    )
    records = [("train", parse(row)) for row in rows]
    found = {record.id: text.words(record) for _, record in corpus.pairs(records, ["image", "audio"], cut=True)}
    assert found == {"caption": "a red square", "spoken": "turn it off", "own": "a blue one", "deaf": "not heard"}
    seen = dict(corpus.pairs(records, ["image"], cut=False))
    assert seen.keys() == {"train"}
    assert [record.id for _, record in corpus.pairs(records, ["image"], cut=False)] == ["caption", "own"]


def test_a_corpus_is_made_once_and_cut_by_the_seed(storage: Path, small_bert: Path, tmp_path: Path) -> None:
    tokenizer = text.load_tokenizer(str(small_bert))

    def make(folder: str, seed: int) -> Dataset:
        records = [("train", parse({"text": words})) for words in sentences()]
        made = corpus.passages(records, tokenizer, 16)
        return corpus.write(made, tmp_path / folder, name="words", share=0.2, seed=seed, mark={"seed": seed})

    one = make("a", 0)
    assert one.rows("train") + one.rows("validation") == len(sentences())
    assert 0.05 < one.rows("validation") / len(sentences()) < 0.4
    written = (tmp_path / "a" / "dataset.json").stat().st_mtime_ns
    make("a", 0)
    assert (tmp_path / "a" / "dataset.json").stat().st_mtime_ns == written
    held = [{row["id"] for part in made.read("validation") for row in part.to_pylist()} for made in (one, make("b", 1))]
    assert held[0] != held[1]
