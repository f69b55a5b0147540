"""Why an answer: how much each word, picture region and stretch of sound speaks for it.

- ``integrated_gradients`` (M. Sundararajan et al. 2017, arXiv:1703.01365, by captum): the answer's score, integrated
  from an empty input to the real one. What is empty: for words the mean state, for a picture its mean colour, for sound
  its mean frame.
- ``rollout`` (S. Abnar, W. Zuidema 2020, arXiv:2005.00928): the attention of the fusion layers to each token,
  multiplied through. One forward pass; blind to what the answer is.
- ``occlusion``: what the answer's score loses where a part is taken away (see `mmagent.occlusion`); for every model,
  and the only one for those that join at the input or are native. Many forward passes.

Evidence is found on a decoded sample, so it costs no second decoding; `without` takes evidence away again, which is how
its worth is measured (`tests.bench.confidence`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmagent import occlusion, text
from mmagent.answer import Answer
from mmagent.batch import Sample
from mmagent.evidence import BINS, GRID, Evidence, ExplainError, Word, part, scaled
from mmagent.model import MultimodalModel
from mmagent.predictor import Predictor
from mmagent.reading import without as without_places
from mmagent.towers import Block

Method = Literal["integrated_gradients", "rollout", "occlusion"]
_STEPS = 24  # of the integral


def explain(predictor: Predictor, sample: Sample, answer: Answer, method: Method | None = None) -> Evidence:
    """
    Args:
        method: none: the first of the list above that the model has.

    Raises:
        ExplainError: see the class.
    """
    model = predictor.model
    if method is None:
        method = "integrated_gradients" if isinstance(model, MultimodalModel) else "occlusion"
    with torch.inference_mode(False):
        if method == "occlusion":
            return scaled(method, answer.words, *occlusion.find(predictor, sample, answer))
        if not isinstance(model, MultimodalModel):
            raise ExplainError(
                f"{method} is for models that join at the output (model.join=output); this one joins elsewhere, where "
                "occlusion finds evidence: serve with --explain occlusion, or without --explain"
            )
        if len(sample.views) > 1:
            sample = _viewed(sample, answer)
        batch = {key: value.clone() for key, value in predictor.tensors([sample]).items()}
        if method == "rollout":
            words, images, audios = _rollout(model, batch)
        else:
            words, images, audios = _integrated(predictor, model, sample, batch, answer)
    grids = [_grid(image) for image in images] if sample.images else []
    bins = [_binned(audio) for audio in audios] if sample.audios else []
    return scaled(method, answer.words, _words(predictor, sample, words), grids, bins)


def without(predictor: Predictor, sample: Sample, evidence: Evidence, units: Sequence[tuple[str, int, int]]) -> Sample:
    """A sample with some of its units taken away: words left out, regions of a picture filled with its mean colour,
    stretches of sound with its mean frame."""
    gone = [evidence.words[place] for kind, _, place in units if kind == "word"]
    shown = occlusion.covered(sample, units)
    if any(word.place is not None for word in gone):
        less = predictor.prepare(occlusion.unsaid(sample.record, [word.place for word in gone if word.place]))
        return replace(less, images=shown.images, audios=shown.audios)
    if not gone:
        return shown
    [view] = shown.views
    tokens = {token for word in gone for token in word.tokens}
    keep = [at for at in range(len(view.ids)) if at not in tokens]
    return replace(shown, views=(replace(view, ids=view.ids[keep], offsets=None),))


_Found = tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]  # of tokens, of pixels (h, w), of frames; as they come


def _integrated(
    predictor: Predictor, model: MultimodalModel, sample: Sample, batch: Mapping[str, Tensor], answer: Answer
) -> _Found:
    from captum.attr import IntegratedGradients

    task = predictor.tasks[sample.task]
    given = {"text_states": batch["text_states"]}
    if sample.images:
        given["images"] = batch["images"][None]
    if sample.audios:
        given["audios"] = batch["audios"][None]
    empty = {
        "text_states": given["text_states"].mean(1, keepdim=True).expand_as(given["text_states"]),
        "images": given["images"].mean((-2, -1), keepdim=True).expand_as(given["images"]) if sample.images else None,
        "audios": _mean_frames(given["audios"], batch["audio_frames"]) if sample.audios else None,
    }

    def score(*parts: Tensor) -> Tensor:
        """(copies, ...) of each input -> (copies,)."""
        copies = len(parts[0])
        many = _repeated(batch, copies) | {
            key: part if key == "text_states" else part.flatten(0, 1) for key, part in zip(given, parts, strict=True)
        }
        return task.evidence(model(many)[sample.task], answer)

    baselines = tuple(value for key in given if (value := empty[key]) is not None)
    with torch.enable_grad():
        found = IntegratedGradients(score).attribute(tuple(given.values()), baselines=baselines, n_steps=_STEPS)
    by_kind = dict(zip(given, found, strict=True))
    images = by_kind["images"][0].sum(1).cpu().numpy() if sample.images else []
    frames = batch["audio_frames"].tolist()
    audios = by_kind["audios"][0].sum(-1).cpu().numpy() if sample.audios else []
    return (
        by_kind["text_states"][0].sum(-1).cpu().numpy(),
        [*images],
        [each[:long] for each, long in zip(audios, frames, strict=False)],
    )


def _rollout(model: MultimodalModel, batch: Mapping[str, Tensor]) -> _Found:
    """Attention of the answer token, through the residual connections of all fusion layers."""
    joined: list[Any] = []
    seen: list[Tensor] = []
    hooks = [model.join.register_forward_pre_hook(lambda _, given: joined.append(given[0]))]
    hooks += [
        block.register_forward_pre_hook(lambda block, given: seen.append(_attention(block, *given)))
        for block in model.join.blocks
    ]
    try:
        with torch.no_grad():
            model(dict(batch))
    finally:
        for hook in hooks:
            hook.remove()
    parts: list[tuple[Tensor, Tensor]] = joined[0]
    rolled = torch.eye(seen[0].shape[-1])
    for weights in seen:
        mixed = 0.5 * weights.cpu() + 0.5 * torch.eye(len(rolled))
        rolled = mixed / mixed.sum(-1, keepdim=True) @ rolled
    keep = torch.cat([torch.ones(1, dtype=torch.bool), *(kept[0].cpu() for _, kept in parts)])
    found = torch.zeros(len(keep)).masked_scatter(keep, rolled[0])  # tokens that are kept stand in their order
    return _split(model, batch, found[1:], [kept.shape[1] for _, kept in parts])


def _attention(block: Block, x: Tensor, keep: Tensor) -> Tensor:
    """(tokens, tokens): whom each token attends to, the mean over heads, for a batch of one."""
    batch, tokens, width = x.shape
    q, k, _ = block.qkv(block.norm1(x)).view(batch, tokens, 3, block.heads, width // block.heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / (width // block.heads) ** 0.5  # (batch, heads, tokens, tokens)
    return scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1).mean(1)[0]


def _split(model: MultimodalModel, batch: Mapping[str, Tensor], found: Tensor, sizes: Sequence[int]) -> _Found:
    """Weights of the join's places by what stands there: the sentence, text, then sounds, then pictures."""
    _, words, *media = (part.numpy() for part in found.split(list(sizes)))
    audios: list[np.ndarray] = []
    images: list[np.ndarray] = []
    if model.audio_tower is not None:
        heard = media.pop(0).reshape(int(batch["audio_slots"]), -1)
        audios = [each[1:] for each in heard]  # the first place of each is the whole of it
    if model.image_tower is not None:
        for each in media.pop(0).reshape(int(batch["image_slots"]), -1):
            side = int(len(each) ** 0.5)
            images.append(each[-side * side :].reshape(side, side))
    return words, images, audios


def _repeated(batch: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
    """The batch of one sample as that of so many."""
    out = {}
    for key, value in batch.items():
        if value.ndim == 0:
            out[key] = value
            continue
        many = value.repeat(copies, *[1] * (value.ndim - 1))
        if key.endswith("_row"):
            many = many + torch.arange(copies, device=many.device).repeat_interleave(len(value))
        out[key] = many
    return out


def _mean_frames(audios: Tensor, frames: Tensor) -> Tensor:
    """(1, sounds, frames, channels): each sound's mean frame in every place of it."""
    out = torch.zeros_like(audios)
    for which, long in enumerate(frames.tolist()):
        out[0, which, :long] = audios[0, which, :long].mean(0)
    return out


def _viewed(sample: Sample, answer: Answer) -> Sample:
    """The view that the answer is of: the chosen candidate's; of strides the first."""
    which = int(answer.label) if answer.label is not None and sample.record.candidates else 0
    at = next((n for n, view in enumerate(sample.views) if view.index == which), 0)
    view = sample.views[at]
    images, audios = sample.media(at)
    return replace(sample, views=(replace(view, index=0),), images=images, audios=audios, more=())


def _words(predictor: Predictor, sample: Sample, weights: np.ndarray) -> list[Word]:
    """Weights of tokens, by the words that they make; signs of the tokenizer's own belong to none."""
    if not sample.has_words:
        return []
    read = without_places(sample.views[0], -3).ids
    words = text.words(sample.record)
    pieces = predictor.inputs.pieces(words)
    opening = len(text.frame(predictor.inputs.tokenizer)[0])
    lost = max(0, len(pieces) + opening - len(read)) if len(read) < len(pieces) + opening else 0
    out: list[Word] = []
    for number, (start, end) in enumerate(pieces[lost:]):
        place = opening + number
        if end <= start or place >= len(weights):
            continue
        weight = max(0.0, float(weights[place]))
        joined = out and out[-1].end == start and not words[start].isspace() and words[start].isalnum()
        if joined:
            last = out[-1]
            out[-1] = Word(words[last.start : end], last.start, end, (*last.tokens, place), last.weight + weight)
        else:
            out.append(Word(words[start:end], start, end, (place,), weight))
    return out


def _grid(values: np.ndarray) -> np.ndarray:
    """(height, width) -> (GRID, GRID): what speaks for the answer, added up by region."""
    positive = torch.from_numpy(np.maximum(values, 0).astype(np.float32))[None, None]
    if min(values.shape) < GRID:
        positive = torch.nn.functional.interpolate(positive, (GRID, GRID), mode="bilinear", align_corners=False)
    return torch.nn.functional.adaptive_avg_pool2d(positive, GRID)[0, 0].numpy() * (values.size / GRID**2)


def _binned(values: np.ndarray) -> np.ndarray:
    """(frames,) -> (BINS,)."""
    positive = np.maximum(values, 0)
    return np.array([positive[part(len(values), at, BINS)].sum() for at in range(BINS)], np.float32)
