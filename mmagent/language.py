"""A language model with the head that it was pretrained with, which predicts hidden words or the next.

The head is the checkpoint's own where its files hold one, tied to the embeddings where the model says so. It is
computed where something is asked for, and nowhere else: a vocabulary is wide.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent import pretrained
from mmagent.pretrained import BackboneError
from mmagent.tasks.task import IGNORED
from mmagent.text import TextEncoder

KEY = "model.backbone"
Objective = Literal["masked", "next"]


def objective_of(name: str, tokenizer: Any) -> Objective:
    """What a checkpoint is pretrained by: hidden words where its family has a head for that and its tokenizer a sign
    for what is hidden, else the next word.

    Raises:
        BackboneError: neither; an encoder-decoder, for one.
    """
    config = pretrained.config_of(name, KEY)
    if not config.is_encoder_decoder:
        if tokenizer.mask_token_id is not None and type(config) in _classes("masked")[1]:
            return "masked"
        if type(config) in _classes("next")[1]:
            return "next"
    raise BackboneError(
        f"{name!r} ({config.model_type}) can be pretrained neither by hidden words (which wants an encoder, and a "
        "tokenizer with a mask token) nor by the next word (a decoder): an encoder-decoder is not supported"
    )


def load(name: str, objective: Objective, *, weights: bool = True, dropout: float | None = None) -> LanguageModel:
    """The checkpoint with its head; what the files lack of the head starts fresh.

    Raises:
        BackboneError: see `mmagent.pretrained.load`; also a family without such a head.
    """
    auto, known = _classes(objective)
    place, config = pretrained.locate(name), pretrained.config_of(name, KEY)
    if type(config) not in known:
        raise BackboneError(f"{name!r} ({config.model_type}) has no head for pretrain.objective={objective}")
    if not pretrained.settle(config, dropout) and dropout is not None:
        raise BackboneError(f"model.backbone_dropout={dropout}, but {name!r} has no dropout: leave it out")
    with pretrained.refusing(name, place, KEY), pretrained.quietly():
        if not weights:
            return LanguageModel(auto.from_config(copy.deepcopy(config)))
        pretrained.check_weights(name)
        whole, report = auto.from_pretrained(
            place, config=config, dtype=torch.float32, weights_only=True, output_loading_info=True
        )
    base = f"{whole.base_model_prefix}."
    lost = sorted(key for key in report["missing_keys"] if key.startswith(base))
    if lost:
        raise BackboneError(
            f"the weights in {place} lack {len(lost)} parameters, such as {lost[0]}: they belong to another model than "
            "config.json says; copy both from one place"
        )
    return LanguageModel(whole)


class LanguageModel(nn.Module):
    """
    Args:
        whole: a Transformers model with a head over its vocabulary.

    Attributes:
        backbone: the language model, as fine-tuning has it.
        head: what stands behind it.
    """

    image_tower = audio_tower = None  # parts that `mmagent.freeze` looks for

    def __init__(self, whole: Any) -> None:
        super().__init__()
        base = whole.base_model
        if base is whole or whole._parameters:
            raise BackboneError(f"{type(whole).__name__} does not keep its head apart from its language model")
        self.backbone = TextEncoder(base)
        self.head = nn.ModuleDict({name: part for name, part in whole.named_children() if part is not base})
        self._whole = (whole,)  # in a tuple: its parts are registered above, under the names that freezing knows
        self._places: Tensor | None = None  # that have a target, among all of a pass
        base.register_forward_hook(self._gather)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """batch: ids, mask, targets (rows, tokens) -> logits (places, vocabulary) of the places that have a target, row
        by row; of the first token where none has."""
        places = batch["targets"] != IGNORED
        if not places.any():
            places = torch.zeros_like(places)
            places[0, 0] = True
        options = {"use_cache": False} if "use_cache" in pretrained.takes(self._whole[0]) else {}
        packed = self.backbone.pack(batch["mask"].bool())
        if packed is None:
            self._places = places.flatten().nonzero()[:, 0]
            out = self._whole[0](input_ids=batch["ids"], attention_mask=batch["mask"], **options)
        else:
            self._places = packed.slot[places[packed.keep]]
            ids = packed.put(batch["ids"][packed.keep])
            out = self._whole[0](input_ids=ids, **self.backbone.given(packed), **options)
        return {"logits": out.logits[0]}

    def save(self, folder: Path) -> None:
        """Writes it as Transformers reads it, with its head."""
        self._whole[0].save_pretrained(folder)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights of a model of the same kind; of tied ones each once."""
        lost = {name for name, _ in self.named_parameters()} - set(weights)
        assert not lost, f"the weights lack {sorted(lost)[:3]}"
        self.load_state_dict(weights, strict=False)

    def _gather(self, module: nn.Module, given: Any, out: Any) -> Any:
        """Hands the head the states (1, places, width) of the places that are asked for; a head looks at each alone."""
        if self._places is not None:
            out.last_hidden_state = out.last_hidden_state.flatten(0, 1)[self._places][None]
        return out


def loss(logits: Tensor, batch: Mapping[str, Tensor], size: int) -> Tensor:
    """Cross-entropy, a row's mean over its targets, summed over rows by weight and divided by the nominal size of the
    micro-batch, so that any split of a batch over workers sums to the same gradient."""
    places = batch["targets"] != IGNORED
    if not places.any():
        return logits.sum() * 0.0
    each = F.cross_entropy(logits.float(), batch["targets"][places], reduction="none")
    weight = (batch["weight"] / places.sum(1).clamp(min=1))[places.nonzero()[:, 0]]
    return (each * weight).sum() / size


def hits(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How many words are predicted right, and of how many; rows of weight 0 do not count."""
    places = (batch["targets"] != IGNORED) & (batch["weight"] > 0)[:, None]
    asked = batch["targets"] != IGNORED
    if not asked.any():
        return logits.new_zeros(()), logits.new_zeros(())
    right = (logits.argmax(1) == batch["targets"][asked]) & places[asked]
    return right.sum(), places.sum()


def _classes(objective: Objective) -> tuple[Any, Any]:
    """Transformers' class for an objective, and the configs it knows."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if objective == "masked":
        return AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
