"""Packed texts: fewer and fuller rows, the same states, logits and gradients; told of in each family's own way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from mmagent import language, packing
from mmagent.packing import pack, plan
from mmagent.tasks.task import IGNORED
from mmagent.text import TextEncoder, load_encoder
from mmagent.writer import Writer, load_writer

LENGTHS = [40, 3, 17, 25, 9, 31, 1]
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 66, "pad_token_id": 1,
}  # fmt: skip
SMALL = {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 2}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
# How a family is told of packed texts; none: it cannot be, and its rows are padded.
FAMILIES: list[tuple[str, dict[str, Any], packing.Style | None]] = [
    ("Bert", SIZES, "blocks"),
    ("Roberta", SIZES, "blocks"),  # its places begin behind the padding token's id
    ("Electra", SIZES | {"embedding_size": 16}, "blocks"),
    ("MPNet", SIZES, "added"),
    ("T5Encoder", {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "blocks"),
    ("ModernBert", SIZES | {"local_attention": 8}, None),  # a block is no window
    ("Longformer", SIZES | {"attention_window": 8}, None),
    ("GPT2", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, "places"),
    ("Qwen2", SIZES | {"num_key_value_heads": 2}, "places"),
    ("Mistral", SIZES | GROUPED | {"sliding_window": 6}, "places"),
    ("Gemma2", SIZES | GROUPED | {"sliding_window": 6}, "places"),
    ("Bloom", SMALL, None),  # no places to give
    ("Mamba", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, None),  # recurrent
]


def texts(lengths: list[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids, mask: (texts, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 90, mask.shape, generator=generator)
    return torch.where(mask.bool(), ids, 1), mask


def unpacked(encoder: TextEncoder, compute: Callable[[], Any]) -> Any:
    style, encoder.packs = encoder.packs, None
    try:
        return compute()
    finally:
        encoder.packs = style


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "sizes", "style"), FAMILIES, ids=[name for name, *_ in FAMILIES])
def test_states_and_gradients_are_those_of_padded_rows(
    family: str, sizes: dict[str, Any], style: packing.Style | None
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.removesuffix('Encoder')}Config")(**sizes)
    encoder = TextEncoder(getattr(transformers, f"{family}Model")(config)).eval()
    assert encoder.packs == style
    ids, mask = texts()
    packed = encoder.pack(mask.bool())
    assert (packed is not None) == (style is not None)
    if packed is None:
        return
    assert packed.places.numel() < 0.6 * mask.numel()
    weight = torch.randn(*mask.shape, encoder.width) * mask[..., None]
    found = encoder(ids, mask)
    mine = gradients(encoder, (found * weight).sum())
    wanted = unpacked(encoder, lambda: encoder(ids, mask))
    theirs = gradients(encoder, (wanted * weight).sum())
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=1e-5)
    assert not found[~mask.bool()].any()
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=2e-4, rtol=1e-3, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("kind", ["decoder", "transposed", "encoder-decoder"])
def test_replies_are_scored_as_in_padded_rows(writers: dict[str, Path], kind: str) -> None:
    writer: Writer = load_writer(str(writers[kind]), dropout=0.0).eval()
    assert writer.packs is not None
    ids, mask = texts([20, 3, 9, 14, 1])
    reply = torch.full((5, 8), IGNORED)
    for row, length in enumerate([2, 8, 1, 0, 5]):  # one has none
        reply[row, 8 - length :] = torch.arange(10 + row, 10 + row + length)
    said = reply != IGNORED

    def scored() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out = writer.score(writer.embed(ids), mask, reply, states=True)
        assert out.states is not None
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), reply.flatten(), ignore_index=IGNORED)
        return out.logits.detach(), out.states.detach(), gradients(writer, loss)

    (logits, states, mine), (wanted, others, theirs) = scored(), unpacked(writer, scored)
    torch.testing.assert_close(logits[said], wanted[said], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[mask.bool()], others[mask.bool()], atol=1e-5, rtol=1e-5)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-5, rtol=1e-3, msg=f"{name}: {{}}".format)


def test_no_reply_at_all_leaves_every_weight_a_gradient_of_zero(writers: dict[str, Path]) -> None:
    """No rank of a distributed run is left waiting."""
    writer = load_writer(str(writers["decoder"]))
    ids, mask = texts([20, 3, 9, 14])
    out = writer.score(writer.embed(ids), mask, torch.full((4, 2), IGNORED), states=False)
    mine = gradients(writer, (out.logits * 0).sum())
    assert mine.keys() == {name for name, _ in writer.named_parameters()}
    assert not any(gradient.any() for gradient in mine.values())


@pytest.mark.parametrize("kind", ["encoder", "decoder", "transposed"])
def test_pretraining_asks_the_same_of_packed_texts(tiny_backbones: dict[str, Path], kind: str) -> None:
    objective: language.Objective = "masked" if kind == "encoder" else "next"
    torch.manual_seed(0)
    model = language.load(str(tiny_backbones[kind]), objective, dropout=0.0).eval()
    assert model.backbone.packs is not None
    ids, mask = texts([30, 2, 11, 24, 8])
    ids = ids % 40
    targets = torch.where(mask.bool(), ids, IGNORED)
    targets[:, ::3] = IGNORED
    batch = {"ids": ids, "mask": mask, "targets": targets, "weight": torch.ones(5)}

    def learned() -> tuple[Tensor, dict[str, Tensor]]:
        loss = language.loss(model(batch)["logits"], batch, 5)
        return loss.detach(), gradients(model, loss)

    (mine, own), (wanted, theirs) = learned(), unpacked(model.backbone, learned)
    torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=1e-6)
    for name, gradient in theirs.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-5, rtol=1e-3, msg=f"{name}: {{}}".format)


def test_every_token_has_a_place_and_blocks_keep_texts_apart() -> None:
    _, mask = texts()
    packed = pack(mask.bool(), width=32, most=None)
    assert packed is not None
    x = torch.randn(*mask.shape, 3)
    assert torch.equal(packed.back(packed.put(x[mask.bool()])), x * mask[..., None])
    assert len(set(packed.slot.tolist())) == sum(LENGTHS) == len(packed.slot)
    numbers = (torch.arange(len(LENGTHS))[:, None] * mask)[mask.bool()]
    assert torch.equal(packed.owner.flatten()[packed.slot], numbers)
    within = torch.cat([torch.arange(length) for length in LENGTHS])
    assert torch.equal(packed.places.flatten()[packed.slot], within)
    blocks = packed.blocks()[:, 0]
    assert torch.equal(blocks.sum(-1).flatten()[packed.slot], torch.tensor(LENGTHS)[numbers])


@pytest.mark.parametrize("count", [1, 2, 7, 32, 64, 256])
@pytest.mark.parametrize("most", [None, 200, 512])
def test_rows_are_full(count: int, most: int | None) -> None:
    lengths = np.random.default_rng(count).integers(10, 201, count).tolist()
    bins = plan(lengths, width=384, most=most)
    if bins is None:
        assert count <= 7
        return
    assert sorted(text for row in bins for text in row) == list(range(count))
    size = max(sum(lengths[text] for text in row) for row in bins)
    assert max(lengths) <= size <= max(max(lengths), min(most or math.inf, 2 * max(lengths)))
    if count >= 32:
        assert sum(lengths) > (0.95 if most != 200 else 0.85) * size * len(bins)


@pytest.mark.parametrize("lengths", [[], [0], [7], [5, 5, 5], [100, 99, 98], [0, 0]])
def test_what_saves_little_is_padded(lengths: list[int]) -> None:
    assert plan(lengths, width=64) is None


def test_a_model_without_weights_is_not_asked(tiny_backbone: Path) -> None:
    with torch.device("meta"):
        assert load_encoder(str(tiny_backbone), weights=False).packs is None
    assert load_encoder(str(tiny_backbone), weights=False).packs == "blocks"


def test_asking_leaves_the_mode_and_the_random_numbers_as_they_were(tiny_backbone: Path) -> None:
    model = transformers.AutoModel.from_pretrained(tiny_backbone).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    encoder = TextEncoder(model)
    assert encoder.packs is not None
    assert all(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())
