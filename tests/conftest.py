"""What tests share: one Ray for the whole session, a storage root of each test's own, tiny material of every kind.

Nothing here needs a network, and nothing is pretended: a test that wants Ray gets a real one, started on free ports
with a temporary folder and a token of its own, so that it never meets the Ray of a running demo.
"""

from __future__ import annotations

import gc
import io
import json
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from jobs import cluster
from mmagent import storage as storages
from mmagent.record import SCHEMA_VERSION, Record
from mmagent.rows import parse
from mmagent.shards import Dataset, ShardWriter
from mmagent.targets import TaskInfo
from mmagent.tasks import Task, make_all
from tests import s3

torch.set_num_threads(1)

# Ray reads these once, when it is imported: they are set before any test can do that.
_SESSION = tempfile.TemporaryDirectory(prefix="mmagent-tests-")
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAY_AUTH_TOKEN", None)
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": f"{_SESSION.name}/token",
    "MMAGENT_STORAGE": f"{_SESSION.name}/storage",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    **cluster.LOOPBACK,
}


def pytest_unconfigure() -> None:
    _SESSION.cleanup()


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty storage root, which MMAGENT_STORAGE names."""
    root = tmp_path / "storage"
    root.mkdir()
    monkeypatch.setenv("MMAGENT_STORAGE", str(root))
    return root


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[cluster.Cluster]:
    """One Ray for the whole session; this process is connected to it. It hands out 4 CPUs on any machine."""
    started = cluster.start(num_cpus=4, object_store_bytes=200_000_000)
    os.environ |= started.environment
    try:
        import ray

        ray.init(log_to_driver=False)
        yield started
        # What still holds objects of Ray's lets them go while Ray is there: its own thread reads them (a segmentation
        # fault at exit was seen).
        gc.collect()
        ray.shutdown()
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        cluster.stop(started)


@pytest.fixture(scope="session")
def make_png() -> Callable[..., bytes]:
    """``make_png(colour="red", size=(16, 16))``: an encoded picture of one colour."""

    def make(colour: str | tuple[int, ...] = "red", size: tuple[int, int] = (16, 16), format: str = "PNG") -> bytes:
        out = io.BytesIO()
        Image.new("RGB", size, colour).save(out, format)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def make_wav() -> Callable[..., bytes]:
    """``make_wav(hz=440, seconds=0.25)``: an encoded tone; format "WAV" or "FLAC"."""

    def make(hz: float = 440.0, seconds: float = 0.25, rate_hz: int = 16_000, format: str = "WAV") -> bytes:
        time_s = np.arange(int(seconds * rate_hz)) / rate_hz  # (samples,)
        out = io.BytesIO()
        soundfile.write(out, 0.3 * np.sin(2 * np.pi * hz * time_s), rate_hz, format=format)
        return out.getvalue()

    return make


COLOURS = ("red", "green", "blue", "black")


def classify(labels: Sequence[str]) -> dict[str, Task]:
    """The tasks of a model that classifies."""
    return make_all({"classify": TaskInfo("classify", tuple(labels))})


@pytest.fixture(scope="session")
def make_records(make_png: Callable[..., bytes], make_wav: Callable[..., bytes]) -> Callable[..., list[Record]]:
    """``make_records(n, split="train")``: questions for a picture's colour, every second one spoken, labels in turn.

    The spoken question is a tone of its own pitch: hearing it is learnable, as is seeing the colour.
    """

    def make(count: int, split: str = "train") -> list[Record]:
        records = []
        for index in range(count):
            colour = COLOURS[index % len(COLOURS)]
            spoken = bool(index // len(COLOURS) % 2)
            question = {"audio": make_wav(300.0)} if spoken else {"text": "what color is the shape?"}
            row = {
                "id": f"{split}-{index}",
                "image": make_png(colour, (16, 16)),
                "label": colour,
                "split": split,
                "meta": {"form": "speech" if spoken else "text", "question": "what color is the shape?"},
                **question,
            }
            records.append(parse(row, origin="tests"))
        return records

    return make


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Transformers saves it: a BERT of 2 layers, 32 wide, untrained, with a WordPiece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?!.,'-<>\\/"
    words = "what color colour is the shape in image there a not does red green blue black yes no circle".split()
    vocabulary = list(dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words]))
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    folder = tmp_path_factory.mktemp("backbone")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_backbones(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder by kind: an encoder (BERT), two decoders (Qwen2; GPT-2, whose linear layers are transposed) and an
    encoder-decoder (T5), each of 2 layers, 32 wide, untrained, with the tokenizer of `tiny_backbone`."""
    from transformers import GPT2Config, GPT2Model, Qwen2Config, Qwen2Model, T5Config, T5Model

    size = len(json.loads((tiny_backbone / "tokenizer.json").read_text())["model"]["vocab"])
    t5 = T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=0)
    t5.decoder_start_token_id = 0
    torch.manual_seed(0)
    models = {
        "decoder": Qwen2Model(
            Qwen2Config(
                vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=64, attention_dropout=0.1, pad_token_id=0,
            )
        ),
        "transposed": GPT2Model(
            GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3)
        ),
        "encoder-decoder": T5Model(t5),
    }  # fmt: skip
    folders = {"encoder": tiny_backbone}
    for kind, model in models.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
        for file in tiny_backbone.glob("tokenizer*"):
            shutil.copy(file, folders[kind])
    return folders


@pytest.fixture(scope="session")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of language models with their output layers: decoders (Qwen2, and GPT-2, which counts places), and
    encoder-decoders (T5, and a pair of BERTs), each of 2 layers, 32 wide, untrained, with a byte-level tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import (
        BertConfig,
        EncoderDecoderConfig,
        EncoderDecoderModel,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )  # fmt: skip

    learner = ByteLevelBPETokenizer()
    words = ["red circle", "the blue image", "not green", "what is there a b c"]
    learner.train_from_iterator(words * 3, 300, special_tokens=["<|endoftext|>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner._tokenizer, eos_token="<|endoftext|>", pad_token="<pad>", model_max_length=64
    )
    size = len(tokenizer)
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=1)
    t5.decoder_start_token_id, t5.eos_token_id = 1, 0
    half = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        pad_token_id=1,
    )  # fmt: skip
    pair = EncoderDecoderConfig.from_encoder_decoder_configs(half, half)
    pair.decoder_start_token_id, pair.eos_token_id, pair.pad_token_id = 1, 0, 1
    models: dict[str, Any] = {
        "decoder": Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=64, eos_token_id=0, pad_token_id=1,
            )
        ),
        "transposed": GPT2LMHeadModel(
            GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
        ),
        "encoder-decoder": T5ForConditionalGeneration(t5),
        "pair": EncoderDecoderModel(pair),
    }  # fmt: skip
    folders = {kind: tmp_path_factory.mktemp(f"writer-{kind}") for kind in models}
    for kind, model in models.items():
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a real S3 server (moto's) with a bucket `s3.BUCKET`."""
    with s3.server() as url:
        yield url


@pytest.fixture
def object_storage(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty storage root in S3, which MMAGENT_STORAGE names, with a mirror of this test's own."""
    url = f"s3://{s3.BUCKET}/{secrets.token_hex(4)}"
    for name, value in {**s3.CREDENTIALS, "AWS_ENDPOINT_URL": s3_server, "MMAGENT_STORAGE": url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MMAGENT_MIRROR", str(tmp_path / "mirror"))
    yield url
    storages.leave()


@pytest.fixture(scope="session")
def tiny_recipe(tiny_backbone: Path) -> dict[str, Any]:
    """A recipe for `mmagent.config.resolve`: the tiny backbone, pictures 16 pixels wide, sound up to 5 s."""
    return {
        "data": {"name": "tiny", "max_text_tokens": 32, "media": {"max_image_pixels": 1_000_000, "max_audio_s": 5.0}},
        "model": {
            "backbone": str(tiny_backbone), "width": 32, "layers": 1, "heads": 2,
            "image": {"width": 32, "layers": 1, "tokens": 4, "size": 16},
            "audio": {"width": 32, "layers": 1, "tokens": 4, "mels": 40, "max_s": 5.0},
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Dataset]:
    """``make_dataset(folder, {"train": records, ...})``: a data set as `jobs.prepare` leaves it, labels `COLOURS`."""

    def make(folder: Path, splits: Mapping[str, Sequence[Record]], row_group_rows: int = 16) -> Dataset:
        info: dict[str, Any] = {}
        for split, records in splits.items():
            with ShardWriter(folder, split, row_group_rows=row_group_rows) as writer:
                for record in records:
                    writer.add(record)
                labels = Counter(record.target.label for record in records if record.target.label is not None)
                info[split] = {"rows": len(records), "shards": writer.close(), "labels": dict(labels)}
        rows, counts = {split: about["rows"] for split, about in info.items()}, info.get("train", {}).get("labels", {})
        tasks = {"classify": TaskInfo("classify", tuple(sorted(COLOURS)), counts, rows=rows).to_dict()}
        document = {
            "format_version": 1, "schema_version": SCHEMA_VERSION, "name": folder.name, "source": "tests", "seed": 0,
            "created_ms": 0, "task": "classify", "tasks": tasks, "splits": info, "quarantine": {"rows": 0},
        }  # fmt: skip
        storages.publish_json(folder / "dataset.json", document)
        return Dataset.open(folder)

    return make


@pytest.fixture(scope="session")
def make_bundle(tiny_backbone: Path, tiny_recipe: dict[str, Any]) -> Callable[..., Path]:
    """``make_bundle(folder, {task: TaskInfo}, task)``: a bundle named as its folder, untrained: text, pictures (16
    pixels wide) and sound in."""
    from mmagent import bundle, text
    from mmagent.calibration import Calibration
    from mmagent.config import resolve
    from mmagent.model import MultimodalModel

    def make(folder: Path, infos: Mapping[str, TaskInfo], task: str) -> Path:
        config = resolve(tiny_recipe, {})
        encoder, tokenizer = text.load_encoder(str(tiny_backbone)), text.load_tokenizer(str(tiny_backbone))
        torch.manual_seed(0)
        model = MultimodalModel(config.model, make_all(infos), encoder.width, None)
        bundle.save(
            folder, name=folder.name, config=config, tasks=infos, task=task, state=model.state_dict(), backbone=encoder,
            tokenizer=tokenizer, calibration={name: Calibration() for name in infos},
            origin={"run": "tiny", "data": "tiny"},
        )  # fmt: skip
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle folder named ``tiny`` with `COLOURS` as its answers."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    return make_bundle(folder, {"classify": TaskInfo("classify", COLOURS)}, "classify")
