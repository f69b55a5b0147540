"""The model: an answer belongs to its sample alone, every part takes part in every pass, and it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmagent import text
from mmagent.batch import Inputs, Sample
from mmagent.config import Config, resolve
from mmagent.model import Join, MultimodalModel, align_loss
from mmagent.record import Target
from mmagent.rows import parse
from mmagent.tasks.classify import cross_entropy
from tests.conftest import classify

LABELS = ("red", "green", "blue", "black")


class Model:
    """The tiny model with its inputs; the language model inside, so that all of it can learn."""

    def __init__(self, config: Config) -> None:
        encoder = text.load_encoder(config.model.backbone)
        self.inputs = Inputs(config.model, config.data, text.load_tokenizer(config.model.backbone), classify(LABELS))
        torch.manual_seed(0)
        self.module = MultimodalModel(config.model, classify(LABELS), encoder.width, encoder).eval()
        torch.nn.init.normal_(self.module.join.order)  # zero at the start, when places are not told apart yet

    def sample(self, **row: Any) -> Sample:
        return self.inputs.sample(parse(row))

    def logits(self, samples: list[Sample]) -> Tensor:
        out: Tensor = self.module(self.inputs.batch(samples))["classify"]
        return out


Make = Callable[..., Model]


@pytest.fixture
def make(tiny_recipe: dict[str, Any]) -> Make:
    return lambda overrides=None: Model(resolve(tiny_recipe, overrides or {}))


@pytest.fixture
def samples(make: Make, make_png: Any, make_wav: Any) -> list[Sample]:
    """One of each kind; the sounds are of one length (see `test_towers` for others)."""
    model, red, blue, low, high = make(), make_png("red"), make_png("blue"), make_wav(200.0), make_wav(900.0)
    rows: list[dict[str, Any]] = [
        {"text": "is it red?"},
        {"text": "what color is the shape in the image?", "image": red},
        {"image": blue},
        {"audio": low},
        {"text": "hm?", "audio": high, "image": blue},
        {"text": "which?", "images": [red, blue], "audios": [low, high]},
    ]
    return [model.sample(label="red", **row) for row in rows]


def test_an_answer_does_not_depend_on_its_neighbours(make: Make, samples: list[Sample]) -> None:
    model = make()
    together = model.logits(samples)
    assert together.shape == (6, 4)
    for index, sample in enumerate(samples):
        torch.testing.assert_close(model.logits([sample])[0], together[index], atol=1e-5, rtol=1e-4)


def test_the_order_of_samples_does_not_matter(make: Make, samples: list[Sample]) -> None:
    model, turned = make(), [4, 0, 5, 3, 1, 2]
    torch.testing.assert_close(
        model.logits([samples[i] for i in turned]), model.logits(samples)[turned], atol=1e-5, rtol=1e-4
    )


def test_every_part_of_a_sample_is_heard(make: Make, make_png: Any, make_wav: Any) -> None:
    model, media = make(), {"image": make_png("red"), "audio": make_wav(300.0)}
    everything = model.logits([model.sample(text="is it red?", **media)])
    for changed in ({"text": "is it blue?"}, {"image": make_png("blue")}, {"audio": make_wav(900.0)}):
        other = model.logits([model.sample(**{"text": "is it red?", **media, **changed})])
        assert (other - everything).abs().max() > 1e-4, changed


def test_the_order_of_pictures_is_seen(make: Make, make_png: Any) -> None:
    model, red, blue = make(), make_png("red"), make_png("blue")
    one, other = (model.logits([model.sample(text="hm?", images=many)]) for many in ([red, blue], [blue, red]))
    assert (one - other).abs().max() > 1e-4


def test_more_pictures_than_there_are_places(make: Make, make_png: Any) -> None:
    model = make()
    assert model.logits([model.sample(images=[make_png()] * 20), model.sample(text="hm?")]).isfinite().all()


@pytest.mark.parametrize("towers", ["", "image", "audio"])
def test_models_of_fewer_senses(make: Make, towers: str, make_png: Any, make_wav: Any) -> None:
    model = make({f"model.{kind}": None for kind in ("image", "audio") if kind != towers})
    media = {"image": make_png(), "audio": make_wav()}
    rows = [{"text": "is it red?"}, *([{towers: media[towers]}] if towers else [])]
    assert model.logits([model.sample(**row) for row in rows]).isfinite().all()


def gradients(model: Model, samples: list[Sample]) -> dict[str, Tensor | None]:
    batch = model.inputs.batch(samples)
    model.module.zero_grad(set_to_none=True)
    out = model.module(batch)
    cross_entropy(out["classify"], batch["classify/label"], batch["weight"], len(samples)).backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


TOWERS = ("image_tower.", "audio_tower.", "speech.")


def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(make: Make, samples: list[Sample]) -> None:
    """All ranks reduce the same gradients, also where one rank's batch has no picture or no sound."""
    model = make()
    for part in (samples, samples[:1], samples[2:3], samples[3:4]):
        found = gradients(model, part)
        assert [name for name, gradient in found.items() if gradient is None] == []
    words = gradients(model, samples[:1])
    taught = [name for name, gradient in words.items() if name.startswith(TOWERS) and gradient.abs().max() > 0]  # type: ignore[union-attr]
    assert taught == []  # a stand-in teaches a tower nothing


def test_a_sample_of_weight_zero_teaches_nothing(make: Make, samples: list[Sample]) -> None:
    model = make()
    wanted = gradients(model, samples[:2])
    filled = [
        *samples[:2],
        replace(samples[4], weight=0.0),
        replace(samples[5], record=replace(samples[5].record, target=Target())),
    ]
    batch = model.inputs.batch(filled)
    model.module.zero_grad(set_to_none=True)
    cross_entropy(model.module(batch)["classify"], batch["classify/label"], batch["weight"], 2).backward()
    for name, parameter in model.module.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_it_learns_four_answers(make: Make, make_png: Any, make_wav: Any) -> None:
    model = make({"model.dropout": 0.0})
    rows: list[Mapping[str, Any]] = [
        {"text": "what color?", "image": make_png("red"), "label": "red"},
        {"text": "what color?", "image": make_png("blue"), "label": "blue"},
        {"audio": make_wav(300.0), "image": make_png("red"), "label": "green"},
        {"audio": make_wav(2000.0), "image": make_png("red"), "label": "black"},
    ]
    batch = model.inputs.batch([model.sample(**row) for row in rows])
    optimizer = torch.optim.AdamW(model.module.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = cross_entropy(model.module(batch)["classify"], batch["classify/label"], batch["weight"], 4)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert model.module(batch)["classify"].argmax(1).tolist() == batch["classify/label"].tolist()


# ---------------------------------------------------------------------------------------------- the join


@pytest.fixture
def join(tiny_recipe: dict[str, Any]) -> Join:
    torch.manual_seed(0)
    return Join(resolve(tiny_recipe, {"model.layers": 3}).model, 32).eval()


def test_what_is_masked_changes_nothing_wherever_it_lies(join: Join) -> None:
    words, picture = torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    kept = torch.ones(2, 5, dtype=torch.bool)
    kept[1, 3:] = False
    seen = torch.tensor([[True] * 4, [False] * 4])
    wanted = join([(words, kept), (picture, seen)]).answer
    junk = torch.full((2, 7, 32), 5.0)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    around = [(junk, hidden), (words, kept), (junk, hidden), (picture, seen), (junk, hidden)]
    torch.testing.assert_close(join(around).answer, wanted, atol=1e-5, rtol=1e-4)
    # and a sample alone, without the padding its neighbour needs
    torch.testing.assert_close(join([(words[1:, :3], kept[1:, :3])]).answer, wanted[1:], atol=1e-5, rtol=1e-4)


def test_nothing_but_masked_tokens_is_still_an_answer(join: Join) -> None:
    assert join([(torch.randn(1, 3, 32), torch.zeros(1, 3, dtype=torch.bool))]).answer.isfinite().all()


def test_the_states_of_the_texts_tokens_come_back_to_their_places(join: Join) -> None:
    sentence, words = (torch.randn(2, 1, 32), torch.ones(2, 1, dtype=torch.bool)), torch.randn(2, 6, 32)
    kept = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    picture = (torch.randn(2, 4, 32), torch.tensor([[True] * 4, [False] * 4]))
    tokens = join([sentence, (words, kept), picture], with_tokens=True).tokens
    assert tokens is not None
    assert (tokens[~kept] == 0).all()
    alone = [(sentence[0][1:], sentence[1][1:]), (words[1:, [1, 2, 4]], kept[1:, [1, 2, 4]])]
    there = join(alone, with_tokens=True).tokens
    assert there is not None
    torch.testing.assert_close(tokens[1, [1, 2, 4]], there[0], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_the_loss_is_the_same_for_any_split_of_a_batch(pieces: int, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(16, 5, requires_grad=True), torch.randint(0, 5, (16,))
    labels[3], weights = -100, torch.rand(16)
    weights[-5:] = 0  # a short last batch, filled up
    whole = cross_entropy(logits, labels, weights, 16, smoothing)
    [wanted] = torch.autograd.grad(whole, logits)
    size = 16 // pieces
    order = torch.randperm(16)
    parts = [cross_entropy(logits[rows], labels[rows], weights[rows], size, smoothing) for rows in order.split(size)]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, logits)[0], wanted)


def test_the_loss_by_hand() -> None:
    logits = torch.tensor([[np.log(3.0), 0.0], [0.0, 0.0], [9.0, 0.0]])
    loss = cross_entropy(logits, torch.tensor([0, 1, -100]), torch.tensor([1.0, 2.0, 1.0]), 4)
    assert float(loss) == pytest.approx((-np.log(0.75) - 2 * np.log(0.5)) / 4)


def test_speech_that_says_the_words_costs_nothing() -> None:
    states = torch.randn(2, 4, 8)
    mask, real = torch.ones(2, 4), torch.ones(2)
    assert float(align_loss(states, states, _ids(2, 4), mask, real, 2)) == pytest.approx(0, abs=1e-5)
    assert float(align_loss(states + 1, states, _ids(2, 4), mask, real, 2)) > 0.1


def test_speech_that_says_another_s_words_costs_more_than_one_that_says_none() -> None:
    states, mask, real = torch.randn(2, 4, 8), torch.ones(2, 4), torch.ones(2)
    swapped = float(align_loss(states.flip(0), states, _ids(2, 4), mask, real, 2))
    blurred = float(align_loss(states.mean(0, keepdim=True).expand(2, -1, -1), states, _ids(2, 4), mask, real, 2))
    assert swapped > blurred > 0


def test_the_same_words_said_twice_are_no_rivals() -> None:
    states, mask, real = torch.randn(1, 4, 8).expand(2, -1, -1), torch.ones(2, 4), torch.ones(2)
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert float(align_loss(states, states, ids, mask, real, 2)) == pytest.approx(0, abs=1e-5)


def test_only_real_speech_with_known_words_is_taught() -> None:
    speech, states = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 6, 8)
    mask = torch.tensor([[1.0] * 6, [0.0] * 6, [1.0] * 6])
    loss = align_loss(speech, states, _ids(3, 6), mask, torch.tensor([1.0, 1.0, 0.0]), 3)
    [gradient] = torch.autograd.grad(loss, speech)
    assert [bool(row.any()) for row in gradient] == [True, False, False]
    alone = align_loss(speech[:1], states[:1], _ids(1, 6), mask[:1], torch.ones(1), 3)
    torch.testing.assert_close(loss, alone)


@pytest.mark.parametrize("real", [0.0, 1.0])
def test_a_batch_in_which_no_words_are_known_teaches_nothing(real: float) -> None:
    speech = torch.randn(2, 4, 8, requires_grad=True)
    loss = align_loss(speech, torch.randn(2, 1, 8), _ids(2, 1), torch.zeros(2, 1), torch.full((2,), real), 2)
    [gradient] = torch.autograd.grad(loss, speech)
    assert float(loss.detach()) == 0
    assert not gradient.any()


def test_fewer_words_than_speech_tokens_and_more() -> None:
    for tokens in (1, 4, 20):
        said, states, mask = torch.randn(2, 4, 8), torch.randn(2, tokens, 8), torch.ones(2, tokens)
        loss = align_loss(said, states, _ids(2, tokens), mask, torch.ones(2), 2)
        assert loss.isfinite()


def _ids(sounds: int, tokens: int) -> torch.Tensor:
    """Token ids of sentences that all differ: (sounds, tokens)."""
    return torch.arange(sounds)[:, None].expand(sounds, tokens)
