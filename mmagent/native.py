"""Natively multimodal models: a checkpoint with towers, a processor and a chat template of its own.

What the processor makes of a conversation is said in `mmagent.conversations`. The parts of a model are recognised by
structure: the language model is what takes token ids and neither pictures nor sound, towers are the models outside of
it, and what is left joins them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmagent import pretrained
from mmagent.conversations import BY_TOKEN, MEDIA
from mmagent.model import Batch
from mmagent.pretrained import ARGUMENTS, BackboneError
from mmagent.soft import SoftModel
from mmagent.text import TextEncoder, blocks
from mmagent.writer import IGNORED, Hear, Line, Scored, Writing, aligned_at_the_end, written

KEY = "model.backbone"
PARTS = ("backbone", "image_tower", "audio_tower", "join")


def load(name: str, *, weights: bool = True, dropout: float | None = None) -> Native:
    """
    Raises:
        BackboneError: it cannot be loaded, or is no multimodal model that reads a text and writes.
    """
    part = pretrained.load_multimodal(name, key=KEY, weights=weights, dropout=dropout)
    model = Native(part.model)
    part.require(key.removeprefix("model.") for key, _ in model.named_parameters())
    return model


class Native(TextEncoder):
    """A model of Transformers that reads text with pictures or sounds, and continues it, or writes behind an encoder.

    Raises:
        BackboneError: it is an encoder-decoder whose encoder reads no tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self._pair = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
        name = type(model).__name__
        if self._pair and not {"input_ids", "decoder_input_ids"} <= pretrained.takes(model):
            raise BackboneError(
                f"the encoder of {name} reads no text, so there is no place for what is asked: give a {KEY} that reads "
                "text with its pictures or sounds (as Florence-2 does)"
            )
        super().__init__(model)
        self._language, _ = pretrained.find(model, "text", name, pairs=self._pair)
        self._accepts = pretrained.takes(model)

    @property
    def decodes(self) -> bool:
        return not self._pair

    @property
    def language(self) -> Any:
        """The part that reads tokens alone; of an encoder-decoder both."""
        return self.model.get_submodule(self._language)

    def _ask(self) -> None:
        """Its places tell of pictures too: texts are not packed."""

    def blocks(self) -> list[nn.Module]:
        if not self._pair:
            return blocks(self.language)
        return [*blocks(self.language.get_encoder()), *blocks(self.language.get_decoder())]

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
        if self._pair:
            return self._translate(batch, said)
        kept = said.shape[1] + 1
        there = torch.cat([mask.bool(), said != IGNORED], dim=1)
        longest = max(kept, int(there.sum(1).max()))  # the longest that is read and the longest reply may be two rows'
        self.check_length(longest)
        whole = torch.cat([ids, said.clamp(min=0)], dim=1)
        ids, keep, order = (each[:, -longest:] for each in aligned_at_the_end(whole, there))
        options: dict[str, Any] = {"logits_to_keep": kept} if "logits_to_keep" in self._accepts else {}
        out = self.model(
            input_ids=ids, attention_mask=keep.long(), output_hidden_states=states, use_cache=False,
            **self._given(batch, said.shape[1], order), **options,
        )  # fmt: skip
        logits = out.logits[:, -kept:-1]
        if not states:
            return Scored(logits, None)
        last = out.hidden_states[-1]
        back = last.new_zeros(len(last), whole.shape[1], last.shape[2])
        back = back.scatter(1, order[..., None].expand_as(last), last * keep[..., None])
        return Scored(logits, back[:, : mask.shape[1]])

    def _translate(self, batch: Batch, said: Tensor) -> Scored:
        """As `score_batch`, of an encoder-decoder: it reads with its encoder, and its decoder says the reply."""
        ids, mask = batch["ids"], batch["mask"]
        self.check_length(ids.shape[1])
        # The decoder begins at its first place: replies are moved there, and their logits back. Without any it says
        # one token that nobody reads, so that all ranks run the same parts.
        order = (said == IGNORED).to(torch.uint8).argsort(dim=1, stable=True)
        labels = said.gather(1, order) if said.shape[1] else ids.new_full((len(ids), 1), IGNORED)
        out = self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **self._given(batch))
        states = out.encoder_last_hidden_state
        if states.shape[1] != ids.shape[1]:
            raise BackboneError(
                f"the encoder of {type(self.model).__name__} makes {states.shape[1]} states of {ids.shape[1]} tokens, "
                "so none is known to be a word's: give a model that has places for its pictures among the tokens"
            )
        back = order.argsort(dim=1)
        logits = out.logits[:, : said.shape[1]]
        return Scored(logits.gather(1, back[..., None].expand_as(logits)), states)

    @torch.no_grad()
    def write_batch(
        self, batch: Batch, *, stops: Sequence[int], pad: int, how: Writing, hear: Hear = None
    ) -> list[Line]:
        """As `Writer.write`."""
        if self._pair:
            given = {"input_ids": batch["ids"], "attention_mask": batch["mask"], **self._given(batch)}
        else:
            ids, keep, order = aligned_at_the_end(batch["ids"], batch["mask"].bool())
            given = {"input_ids": ids, "attention_mask": keep.long(), **self._given(batch, 0, order)}
        return written(self.model, given, stops=stops, pad=pad, how=how, hear=hear)

    def _given(self, batch: Batch, more: int = 0, order: Tensor | None = None) -> dict[str, Tensor]:
        """What the model takes besides ids; of what speaks of each token, `more` are put behind, and all in order."""
        kind = next(self.parameters()).dtype
        out = {}
        for key, value in batch.items():
            if not key.startswith(MEDIA):
                continue
            name = key.removeprefix(MEDIA)
            if name.endswith(BY_TOKEN) and order is not None:
                out[name] = nn.functional.pad(value, (0, more)).gather(1, order)
            else:
                out[name] = value.to(kind) if value.is_floating_point() else value
        return out


class NativeModel(SoftModel):
    """A native model, and a head for each task that does not write."""

    def _read(self, batch: Batch) -> Tensor:
        states = self._native.score_batch(batch, None, states=True).states
        assert states is not None
        return states

    def _score(self, batch: Batch, replies: Tensor) -> Scored:
        return self._native.score_batch(batch, replies, states=bool(self.heads))

    def write(self, batch: Batch, *, stops: Sequence[int], pad: int, how: Writing, hear: Hear = None) -> list[Line]:
        return self._native.write_batch(batch, stops=stops, pad=pad, how=how, hear=hear)

    @property
    def _native(self) -> Native:
        assert isinstance(self.backbone, Native)
        return self.backbone
