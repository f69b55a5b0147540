"""Language models of every family, tiny and untrained: encoders, decoders, and the encoders of pairs.

Each gives the states that Transformers' own model gives of a text alone, whatever stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mmagent import text
from mmagent.pretrained import BackboneError

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IDS = {"vocab_size": 259, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
ROTARY = {**SIZES, **IDS, "num_key_value_heads": 1, "max_position_embeddings": 64}
PAIR = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
# class, settings, the longest text
FAMILIES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "bert": ("Bert", {**SIZES, **IDS, "max_position_embeddings": 64}, 64),
    "roberta": ("Roberta", {**SIZES, **IDS, "max_position_embeddings": 66}, 64),  # counts from 2
    "modernbert": (
        "ModernBert", {**SIZES, **IDS, "cls_token_id": 0, "sep_token_id": 2, "max_position_embeddings": 64}, 64,
    ),
    "gpt2": ("GPT2", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, 64),
    "qwen2": ("Qwen2", ROTARY, 64),
    "qwen3": ("Qwen3", {**ROTARY, "head_dim": 16}, 64),
    "llama": ("Llama", ROTARY, 64),
    "t5": ("T5", {**IDS, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2,
                  "decoder_start_token_id": 1}, None),
    "bart": ("Bart", {**IDS, **PAIR, "d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2}, 64),
}  # fmt: skip
TEXTS = ("Grüße aus Köln, schönes Wetter!", "你好,世界。", "what color is the shape?", "hm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint("bert")``: a folder with model and tokenizer: bytes, with an end token and none for padding."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            name, settings, _ = FAMILIES[family]
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
            made[family] = tmp_path_factory.mktemp("backbones") / family
            model.save_pretrained(made[family])
            write_tokenizer(made[family], pad="<pad>" if family == "roberta" else None)
        return made[family]

    return make


def write_tokenizer(folder: Path, pad: str | None = None) -> None:
    letters = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token=pad
    ).save_pretrained(folder)


def padded(rows: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_has_the_states_of_the_checkpoints_own_model(checkpoint: Callable[[str], Path], family: str) -> None:
    """German and Chinese beside English, padded on the right with what the tokenizer has for it."""
    encoder, tokenizer = text.load_encoder(str(checkpoint(family))).eval(), text.load_tokenizer(str(checkpoint(family)))
    assert tokenizer.pad_token_id == (1 if family == "roberta" else 2)
    whole = transformers.AutoModel.from_pretrained(checkpoint(family)).eval()
    own = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    rows = [torch.from_numpy(ids) for ids in text.tokenize(tokenizer, TEXTS, 64)]
    assert [tokenizer.decode(row) for row in rows] == list(TEXTS)
    with torch.no_grad():
        states = encoder(*padded(rows, tokenizer.pad_token_id))
        for row, state in zip(rows, states, strict=True):
            wanted = own(input_ids=row[None]).last_hidden_state[0]
            torch.testing.assert_close(state[: len(row)], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_layers_are_found_and_all_of_it_can_learn(checkpoint: Callable[[str], Path], family: str) -> None:
    encoder = text.load_encoder(str(checkpoint(family)))
    assert encoder.width == 32
    blocks = encoder.blocks()
    assert len(blocks) == 2
    assert type(blocks[0]) is type(blocks[1])
    assert min(sum(p.numel() for p in block.parameters()) for block in blocks) > 4 * 32 * 32
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 2, 2]])
    out = encoder(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    (out * torch.randn_like(out)).sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_is_what_is_loaded(checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Of a pair the encoder alone, which must not come back with weights of chance."""
    encoder = text.load_encoder(str(checkpoint(family))).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # as if it had been trained
            parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder.save(tmp_path / "saved")
    again = text.load_encoder(str(tmp_path / "saved")).eval()
    assert again.state_dict().keys() == encoder.state_dict().keys()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(again(ids, torch.ones_like(ids)), encoder(ids, torch.ones_like(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_text_is_known_and_a_longer_one_refused(checkpoint: Callable[[str], Path], family: str) -> None:
    longest = FAMILIES[family][2]
    encoder = text.load_encoder(str(checkpoint(family)))
    assert encoder.max_tokens == longest
    ids = torch.full((1, longest or 200), 7)
    assert encoder(ids, torch.ones_like(ids)).shape == (1, longest or 200, 32)
    if longest is not None:
        text.check(str(checkpoint(family)), longest)
        for refuse in (
            lambda: text.check(str(checkpoint(family)), longest + 1),
            lambda: encoder(torch.full((1, longest + 1), 7), torch.ones(1, longest + 1)),
        ):
            with pytest.raises(BackboneError, match=f"takes {longest} at most: set data.max_text_tokens={longest}"):
                refuse()


def test_one_layer_is_one_layer(tmp_path: Path) -> None:
    """Each layer of a T5 is itself a list of two."""
    settings = {**FAMILIES["t5"][1], "num_layers": 1}
    transformers.T5Model(transformers.T5Config(**settings)).save_pretrained(tmp_path)
    assert len(text.load_encoder(str(tmp_path)).blocks()) == 1


def test_a_model_of_text_and_pictures_gives_its_text_part(tmp_path: Path) -> None:
    words = {**SIZES, "vocab_size": 259, "max_position_embeddings": 16, "eos_token_id": 2}
    seen = {**SIZES, "image_size": 16, "patch_size": 8}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=words, vision_config=seen)).save_pretrained(tmp_path)
    encoder = text.load_encoder(str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 2]])
    assert encoder(ids, torch.ones_like(ids)).shape == (1, 4, 32)
    assert encoder.max_tokens == 16


def test_a_model_of_pictures_is_no_language_model(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**settings)).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="is no language model: ViTModel takes"):
        text.load_encoder(str(tmp_path))


@pytest.mark.parametrize("dropout", [None, 0.0, 0.5])
def test_dropout_is_set_where_it_is_asked_for(checkpoint: Callable[[str], Path], dropout: float | None) -> None:
    encoder = text.load_encoder(str(checkpoint("bert")), dropout=dropout).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    assert torch.equal(encoder(ids, mask), encoder(ids, mask)) == (dropout == 0)


def test_of_a_pair_of_checkpoints_the_encoder_reads(writers: dict[str, Path]) -> None:
    whole = transformers.EncoderDecoderModel.from_pretrained(writers["pair"]).eval()
    encoder = text.load_encoder(str(writers["pair"])).eval()
    text.check(str(writers["pair"]), 64)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = whole.encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(encoder(ids, torch.ones_like(ids)), wanted)


def test_a_kind_that_transformers_does_not_know_is_told_in_a_line(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    transformers.LevitConfig().save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError) as told:
        text.check(str(tmp_path))
    assert len(str(told.value)) < 400
