"""Natively multimodal models: a checkpoint with towers, a processor and a chat template of its own.

What the processor makes of a conversation is said in `mmagent.conversations`. The parts of a model are recognised by
structure: the language model is what takes token ids and neither pictures nor sound, towers are the models outside of
it, and what is left joins them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmagent import pretrained
from mmagent.config import ModelConfig
from mmagent.conversations import BY_TOKEN, KEY, MEDIA
from mmagent.model import Batch
from mmagent.pretrained import ARGUMENTS, BackboneError
from mmagent.soft import SoftModel
from mmagent.tasks import Task
from mmagent.text import TextEncoder, blocks
from mmagent.writer import IGNORED, Scored, aligned_at_the_end, greedily

PARTS = ("backbone", "image_tower", "audio_tower", "join")


def load(name: str, *, weights: bool = True, dropout: float | None = None) -> Native:
    """
    Raises:
        BackboneError: it cannot be loaded, or is no multimodal model that continues a text.
    """
    part = pretrained.load_multimodal(name, key=KEY, weights=weights, dropout=dropout)
    model = Native(part.model)
    part.require(key.removeprefix("model.") for key, _ in model.named_parameters())
    return model


class Native(TextEncoder):
    """A model of Transformers that reads text with pictures or sounds, and continues it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._language, _ = pretrained.find(model, "text", type(model).__name__)
        self._accepts = pretrained.takes(model)

    @property
    def decodes(self) -> bool:
        return True

    @property
    def language(self) -> nn.Module:
        """The part that reads tokens alone."""
        return self.model.get_submodule(self._language)

    def _ask(self) -> None:
        """Its places tell of pictures too: texts are not packed."""

    def blocks(self) -> list[nn.Module]:
        return blocks(self.language)

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Its named parameters by the part they belong to (see `PARTS`), each once."""
        out: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in PARTS}
        place = {id(p): name for name, tower in self.towers() for p in tower.parameters()}
        place |= {id(p): "backbone" for p in self.language.parameters()}
        if (layer := self.model.get_output_embeddings()) is not None:  # type: ignore[operator]
            place |= {id(p): "backbone" for p in layer.parameters()}
        for name, parameter in self.named_parameters():
            out[place.get(id(parameter), "join")].append((name, parameter))
        return {name: own for name, own in out.items() if own}

    def own(self) -> list[tuple[str, nn.Parameter]]:
        return self.parts()["backbone"]

    def towers(self) -> Iterator[tuple[str, nn.Module]]:
        """(``image_tower`` or ``audio_tower``, a Transformers model outside of the language model), outermost ones."""
        from transformers import PreTrainedModel

        found: list[str] = []
        for name, module in self.model.named_modules():
            if not isinstance(module, PreTrainedModel) or any(name.startswith(f"{outer}.") for outer in found):
                continue
            around = not name or self._language == name or self._language.startswith(f"{name}.")
            if around or name.startswith(f"{self._language}."):
                continue
            found.append(name)
            sound = ARGUMENTS["audio"]
            hears = bool(pretrained.takes(module).intersection(sound)) or module.main_input_name in sound
            yield ("audio_tower" if hears else "image_tower"), module

    def score_batch(self, batch: Batch, reply: Tensor | None, *, states: bool) -> Scored:
        """As `Writer.score`, of a batch with what a processor made of pictures and sounds.

        Args:
            reply: (rows, reply) token ids, `IGNORED` in front of shorter ones; none: nothing is continued.
        """
        ids, mask = batch["ids"], batch["mask"]
        said = ids.new_full((len(ids), 0), IGNORED) if reply is None else reply
        self.check_length(ids.shape[1] + said.shape[1])
        whole = torch.cat([ids, said.clamp(min=0)], dim=1)
        ids, keep, order = aligned_at_the_end(whole, torch.cat([mask.bool(), said != IGNORED], dim=1))
        kept = said.shape[1] + 1
        options: dict[str, Any] = {"logits_to_keep": kept} if "logits_to_keep" in self._accepts else {}
        out = self.model(
            input_ids=ids, attention_mask=keep.long(), output_hidden_states=states, use_cache=False,
            **self._given(batch, said.shape[1], order), **options,
        )  # fmt: skip
        logits = out.logits[:, -kept:-1]
        if not states:
            return Scored(logits, None)
        last = out.hidden_states[-1]
        back = torch.zeros_like(last).scatter(1, order[..., None].expand_as(last), last * keep[..., None])
        return Scored(logits, back[:, : mask.shape[1]])

    @torch.no_grad()
    def write_batch(
        self, batch: Batch, *, max_tokens: int, stops: Sequence[int], pad: int
    ) -> list[tuple[list[int], float]]:
        """As `Writer.write`."""
        ids, keep, order = aligned_at_the_end(batch["ids"], batch["mask"].bool())
        given = {"input_ids": ids, "attention_mask": keep.long(), **self._given(batch, 0, order)}
        return greedily(self.model, given, max_tokens=max_tokens, stops=stops, pad=pad)

    def _given(self, batch: Batch, more: int, order: Tensor) -> dict[str, Tensor]:
        """What the model takes besides ids; of what speaks of each token, `more` are put behind, and all in order."""
        kind = next(self.parameters()).dtype
        out = {}
        for key, value in batch.items():
            if not key.startswith(MEDIA):
                continue
            name = key.removeprefix(MEDIA)
            if name.endswith(BY_TOKEN):
                out[name] = nn.functional.pad(value, (0, more)).gather(1, order)
            else:
                out[name] = value.to(kind) if value.is_floating_point() else value
        return out


class NativeModel(SoftModel):
    """A native model, and a head for each task that does not write."""

    def __init__(self, config: ModelConfig, tasks: Mapping[str, Task], backbone: Native) -> None:
        for name, task in tasks.items():
            if not task.reads_whole:
                raise BackboneError(
                    f"the task {name} reads places or pairs of texts, which a native multimodal model does not: set "
                    "model.join=input, which takes this checkpoint's language model"
                )
        super().__init__(config, tasks, backbone)

    def _read(self, batch: Batch) -> Tensor:
        states = self._native.score_batch(batch, None, states=True).states
        assert states is not None
        return states

    def _score(self, batch: Batch, replies: Tensor) -> Scored:
        return self._native.score_batch(batch, replies, states=bool(self.heads))

    def write(self, batch: Batch, *, max_tokens: int, stops: Sequence[int], pad: int) -> list[tuple[list[int], float]]:
        return self._native.write_batch(batch, max_tokens=max_tokens, stops=stops, pad=pad)

    @property
    def _native(self) -> Native:
        assert isinstance(self.backbone, Native)
        return self.backbone
