"""Pretraining's objectives: what is hidden, what comes next, and the heads that predict it, of several families."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from mmagent import freeze, language, text
from mmagent.masking import Masking, following
from mmagent.order import sample_rng
from mmagent.pretrained import BackboneError
from mmagent.tasks.task import IGNORED

WORDS = "what color is the shape in the image? there is a red circle and not a blue square"


@pytest.fixture(scope="module")
def masking(tiny_backbone: Path) -> Masking:
    return Masking.of(text.load_tokenizer(str(tiny_backbone)), 0.15)


def test_hidden_words_are_asked_for(masking: Masking, tiny_backbone: Path) -> None:
    tokenizer = text.load_tokenizer(str(tiny_backbone))
    [ids] = text.tokenize(tokenizer, [WORDS], 64)
    shown, asked = masking(ids, sample_rng(0, 0, "a"))
    places = np.flatnonzero(asked != IGNORED)
    assert len(places) == round(0.15 * (len(ids) - 2))  # of the words, without [CLS] and [SEP]
    assert asked[places].tolist() == ids[places].tolist()
    assert (np.delete(shown, places) == np.delete(ids, places)).all()
    assert shown[0] == tokenizer.cls_token_id
    assert shown[-1] == tokenizer.sep_token_id
    # A function of (seed, epoch, sample), which changes with the epoch.
    assert (masking(ids, sample_rng(0, 0, "a"))[0] == shown).all()
    assert any((masking(ids, sample_rng(0, epoch, "a"))[1] != asked).any() for epoch in (1, 2))
    # A word alone is asked for; of nothing, nothing is.
    assert (masking(ids[:2], sample_rng(0, 0, "a"))[1] != IGNORED).sum() == 1
    assert (masking(ids[[0, -1]], sample_rng(0, 0, "a"))[1] == IGNORED).all()


def test_eight_in_ten_are_masked_one_is_another_word_one_stays(masking: Masking) -> None:
    ids = np.full(20_000, int(masking.ordinary[3]))
    shown, asked = Masking(masking.mask_id, masking.ordinary, masking.signs, 0.5)(ids, np.random.default_rng(0))
    places = asked != IGNORED
    assert places.sum() == 10_000
    assert (shown[places] == masking.mask_id).mean() == pytest.approx(0.8, abs=0.02)
    assert (shown[places] == ids[0]).mean() == pytest.approx(0.1 + 0.1 / len(masking.ordinary), abs=0.02)
    assert not set(np.unique(shown)) & (masking.signs - {masking.mask_id})


def test_the_next_word() -> None:
    assert following(np.array([5, 6, 7])).tolist() == [6, 7, IGNORED]


def batch_of(folder: Path, objective: language.Objective) -> dict[str, torch.Tensor]:
    tokenizer = text.load_tokenizer(str(folder))
    rows = text.tokenize(tokenizer, [WORDS, "red circle"], 64)
    masking = Masking.of(tokenizer, 0.3)
    pairs = [
        masking(ids, np.random.default_rng(index)) if objective == "masked" else (ids, following(ids))
        for index, ids in enumerate(rows)
    ]
    longest = max(len(ids) for ids in rows)
    return {
        "ids": torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in pairs]),
        "mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in pairs]),
        "targets": torch.tensor([[*asked, *[IGNORED] * (longest - len(asked))] for _, asked in pairs]),
        "weight": torch.ones(2),
    }


@pytest.mark.parametrize(
    ("kind", "objective"), [("encoder", "masked"), ("decoder", "next"), ("transposed", "next")]
)  # fmt: skip
def test_the_head_is_transformers_own(
    tiny_backbones: dict[str, Path], tmp_path: Path, kind: str, objective: language.Objective
) -> None:
    """Predictions at the places asked for are those that Transformers' model gives everywhere; the loss is its loss."""
    folder = tiny_backbones[kind]
    assert language.objective_of(str(folder), text.load_tokenizer(str(folder))) == objective
    torch.manual_seed(0)
    model = language.load(str(folder), objective).eval()
    batch = batch_of(folder, objective)
    found = model(batch)["logits"]
    model.save(tmp_path / "saved")
    theirs = (
        (AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM)
        .from_pretrained(tmp_path / "saved")
        .eval()
    )
    logits = theirs(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
    places = batch["targets"] != IGNORED
    torch.testing.assert_close(found, logits[places], atol=1e-5, rtol=1e-4)
    # A mean over each row, then over the rows.
    with torch.no_grad():
        rows = [F.cross_entropy(logits[row], batch["targets"][row], ignore_index=IGNORED) for row in range(2)]
        assert float(language.loss(found, batch, 2)) == pytest.approx(float(sum(rows)) / 2, rel=1e-4)
    right, asked = language.hits(found, batch)
    assert int(asked) == int(places.sum())
    assert int(right) == int((logits[places].argmax(1) == batch["targets"][places]).sum())
    # What is saved is a language model for fine-tuning too, with the same states.
    encoder = text.load_encoder(str(tmp_path / "saved")).eval()
    before = text.load_encoder(str(folder)).eval()
    torch.testing.assert_close(encoder(batch["ids"], batch["mask"]), before(batch["ids"], batch["mask"]))


def test_tied_weights_are_one(tiny_backbone: Path) -> None:
    model = language.load(str(tiny_backbone), "masked")
    names = [name for name, _ in model.named_parameters()]
    words = model.backbone.model.get_input_embeddings().weight  # type: ignore[operator]
    assert any(
        parameter is words
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.startswith("head.")
    )
    assert sum("word_embeddings" in name for name in names) == 1
    assert sum(part.total for part in freeze.table(model)) == sum(each.numel() for each in model.parameters())
    other = language.load(str(tiny_backbone), "masked", weights=False)
    other.load({name: parameter.detach() + 1.0 for name, parameter in model.named_parameters()})
    tied = dict(other.named_parameters(remove_duplicate=False))
    assert torch.equal(tied["backbone.model.embeddings.word_embeddings.weight"], words + 1.0)
    assert torch.equal(tied["head.cls.predictions.decoder.weight"], words + 1.0)


def test_every_weight_learns_and_a_batch_of_nothing_teaches_nothing(tiny_backbone: Path) -> None:
    model = language.load(str(tiny_backbone), "masked")
    batch = batch_of(tiny_backbone, "masked")
    language.loss(model(batch)["logits"], batch, 2).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    nothing = batch | {"targets": torch.full_like(batch["targets"], IGNORED)}
    out = model(nothing)["logits"]
    found = language.loss(out, nothing, 2)
    found.backward()
    assert float(found) == 0.0
    assert [int(count) for count in language.hits(out, nothing)] == [0, 0]
    # All weights have a gradient, of zero: no rank of a distributed run is left waiting.
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    blank = batch | {"weight": torch.zeros(2)}
    assert float(language.loss(model(blank)["logits"], blank, 2)) == 0.0


def test_an_untrained_model_knows_nothing(tiny_backbone: Path) -> None:
    torch.manual_seed(1)
    model = language.load(str(tiny_backbone), "masked").eval()
    batch = batch_of(tiny_backbone, "masked")
    vocabulary = AutoModel.from_pretrained(tiny_backbone).config.vocab_size
    assert float(language.loss(model(batch)["logits"], batch, 2)) == pytest.approx(math.log(vocabulary), abs=0.3)


def test_what_cannot_be_pretrained(tiny_backbones: dict[str, Path]) -> None:
    folder = tiny_backbones["encoder-decoder"]
    with pytest.raises(BackboneError, match="an encoder-decoder is not supported"):
        language.objective_of(str(folder), text.load_tokenizer(str(folder)))
    with pytest.raises(BackboneError, match=r"qwen2.*has no head for pretrain\.objective=masked"):
        language.load(str(tiny_backbones["decoder"]), "masked")
