"""A language model that writes: with its output layer, as a decoder or as an encoder with a decoder behind it.

Rows of a batch differ in length. A decoder gets them aligned at their ends, so that what is written follows each row's
own last token, and its places are counted from the row's first: the rows of a batch do not change each other's text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmagent import pretrained
from mmagent.packing import Packed
from mmagent.text import TextEncoder, blocks

IGNORED = -100  # a place of a reply that holds no token


class Scored(NamedTuple):
    """What a writer says of replies that are given."""

    logits: Tensor  # (rows, reply, vocabulary): of the reply's tokens, aligned as they are
    states: Tensor | None  # (rows, tokens, width): of what was read; of a decoder only where asked for


class Writing(NamedTuple):
    """How a text is written."""

    max_tokens: int
    temperature: float = 0.0  # 0: the likeliest token each time
    top_p: float = 1.0  # drawn from the likeliest tokens that have this much of the probability (arXiv:1904.09751)
    seed: int = 0


Hear = Callable[[list[int]], None] | None


class Line(NamedTuple):
    """A text that was written."""

    ids: list[int]  # without the stop
    chances: list[float]  # the logarithm of each token's probability, the stop's with them
    stopped: bool  # it came to an end by itself


class _Asked:
    """Of a packed pass: the places whose logits are wanted, and the states of all places, once they are there."""

    def __init__(self, places: Tensor) -> None:
        self.places = places
        self.states: Tensor | None = None


_ASKED: ContextVar[_Asked | None] = ContextVar("asked", default=None)  # of this thread's pass, and no other's


class Writer(TextEncoder):
    """
    Args:
        model: a causal language model, or an encoder-decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self._decoder = not model.config.is_encoder_decoder  # type: ignore[union-attr]
        self.accepts = pretrained.takes(model)
        super().__init__(model)
        if self._decoder:
            self.reads.register_forward_hook(self._gather)

    def blocks(self) -> list[nn.Module]:
        if self._decoder:
            return super().blocks()
        return [*blocks(self.model.get_encoder()), *blocks(self.model.get_decoder())]  # type: ignore[operator]

    @property
    def continues(self) -> bool:
        """Whether it writes behind what it reads; else a decoder of its own writes of what an encoder read."""
        return self._decoder

    @property
    def reads(self) -> Any:
        return self.model.base_model if self._decoder else self.model.get_encoder()  # type: ignore[operator]

    def read(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """From embeds (rows, tokens, width) and mask (rows, tokens) to states (rows, tokens, width)."""
        return self._states("inputs_embeds", embeds, mask)

    def score(self, embeds: Tensor, mask: Tensor, reply: Tensor, *, states: bool) -> Scored:
        """The logits of given replies, each token from what stands before it.

        Args:
            embeds: (rows, tokens, width) of what is read, padded behind; `mask` (rows, tokens) its places.
            reply: (rows, reply) token ids, `IGNORED` in front of shorter ones.
            states: whether those of what is read are wanted.
        """
        return self._continue(embeds, mask, reply, states) if self._decoder else self._translate(embeds, mask, reply)

    def _continue(self, embeds: Tensor, mask: Tensor, reply: Tensor, states: bool) -> Scored:
        said = reply != IGNORED
        whole = torch.cat([embeds, self.embed(reply.clamp(min=0)).to(embeds.dtype)], dim=1)
        if (packed := self.pack(torch.cat([mask.bool(), said], dim=1))) is not None:
            return self._continue_packed(whole, said, packed, states)
        aligned, keep, order = aligned_at_the_end(whole, torch.cat([mask.bool(), said], dim=1))
        kept = reply.shape[1] + 1
        options: dict[str, Any] = {"logits_to_keep": kept} if "logits_to_keep" in self.accepts else {}
        out = self.model(
            inputs_embeds=aligned, attention_mask=keep.long(), output_hidden_states=states,
            **self.places(keep), **options, **self._options,
        )  # fmt: skip
        logits = out.logits[:, -kept:-1]
        if not states:
            return Scored(logits, None)
        last = out.hidden_states[-1]
        back = torch.zeros_like(last).scatter(1, order[..., None].expand_as(last), last * keep[..., None])
        return Scored(logits, back[:, : embeds.shape[1]])

    def _continue_packed(self, whole: Tensor, said: Tensor, packed: Packed, states: bool) -> Scored:
        """As `_continue`; logits are made of the reply's tokens alone, and are zeros where it has none.

        Args:
            whole: (rows, tokens + reply, width) of what is read and the reply, the kept ones as `packed` says.
            said: (rows, reply) which of the reply are tokens.
        """
        tokens = whole.shape[1] - said.shape[1]
        replied = nn.functional.pad(said, (tokens, 0))[packed.keep]  # (kept,)
        asked = _Asked(packed.slot[replied] - 1)  # the place before each
        told, before = self.given(packed), _ASKED.set(asked)
        try:
            out = self.model(inputs_embeds=packed.put(whole[packed.keep]), **told, **self._options)
        finally:
            _ASKED.reset(before)
        seen = asked.states
        assert seen is not None
        found = out.logits[0]  # (replied, vocabulary)
        logits = found.new_zeros(*said.shape, found.shape[-1]).masked_scatter(said[..., None], found)
        return Scored(logits, packed.back(seen)[:, :tokens] if states else None)

    def _gather(self, module: nn.Module, given: Any, out: Any) -> Any:
        """Hands the output layer the states (1, places, width) of the places that are asked for."""
        if (asked := _ASKED.get()) is not None:
            asked.states = out.last_hidden_state
            out.last_hidden_state = out.last_hidden_state.flatten(0, 1)[asked.places][None]
        return out

    def _translate(self, embeds: Tensor, mask: Tensor, reply: Tensor) -> Scored:
        from transformers.modeling_outputs import BaseModelOutput

        states = self.read(embeds, mask)
        # The decoder begins at its first place: replies are moved there, and their logits back.
        order = (reply == IGNORED).to(torch.uint8).argsort(dim=1, stable=True)
        labels = reply.gather(1, order)
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, labels=labels,
            **self._options,
        )  # fmt: skip
        back = order.argsort(dim=1)
        return Scored(out.logits.gather(1, back[..., None].expand_as(out.logits)), states)

    @torch.no_grad()
    def write(
        self, embeds: Tensor, mask: Tensor, *, stops: Sequence[int], pad: int, how: Writing, hear: Hear = None
    ) -> list[Line]:
        """What comes next in each row, token after token.

        Args:
            stops: ids that end a text.
            pad: id that fills shorter rows.
            hear: is given each step's token of every row as soon as it is there.
        """
        from transformers.modeling_outputs import BaseModelOutput

        if self._decoder:
            embeds, keep, _ = aligned_at_the_end(embeds, mask.bool())
            given: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": keep.long()}
        else:
            given = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=self.read(embeds, mask)), "attention_mask": mask,
            }  # fmt: skip
        return written(self.model, given, stops=stops, pad=pad, how=how, hear=hear)

    def places(self, keep: Tensor) -> dict[str, Tensor]:
        """Places counted from each row's first token; without them a model counts the padding too."""
        if "position_ids" not in self.accepts:
            return {}
        return {"position_ids": (keep.long().cumsum(1) - 1).clamp(min=0)}


def written(
    model: Any, given: Mapping[str, Any], *, stops: Sequence[int], pad: int, how: Writing, hear: Hear = None
) -> list[Line]:
    """What a Transformers model writes after what it is given: see `Writer.write`."""
    from transformers import LogitsProcessorList

    recorder = _Recorder(hear)
    drawn: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        drawn = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    with pretrained.quietly(), torch.random.fork_rng(enabled=how.temperature > 0):
        if how.temperature > 0:
            torch.manual_seed(how.seed)
        rows = model.generate(
            **given, max_new_tokens=how.max_tokens, num_beams=1, eos_token_id=list(stops), pad_token_id=pad,
            logits_processor=LogitsProcessorList([recorder]), use_cache=True, **drawn,
        )  # fmt: skip
    chances = recorder.end(rows)
    ids = rows[:, rows.shape[1] - chances.shape[1] :].tolist()
    return [_until(row, chance, stops) for row, chance in zip(ids, chances.tolist(), strict=True)]


class _Recorder:
    """Notes how probable each token was that was taken: that of a step is known at the next."""

    def __init__(self, hear: Hear) -> None:
        self._hear = hear
        self._chances: list[Tensor] = []
        self._last: Tensor | None = None  # (rows, vocabulary): of the step before

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._note(ids)
        self._last = scores.float().log_softmax(-1)
        return scores

    def end(self, ids: Tensor) -> Tensor:
        """(rows, steps): the logarithms."""
        self._note(ids)
        return torch.cat(self._chances, dim=1)

    def _note(self, ids: Tensor) -> None:
        if self._last is not None:
            self._chances.append(self._last.gather(1, ids[:, -1:]))
            if self._hear is not None:
                self._hear(ids[:, -1].tolist())


def _until(row: list[int], chances: list[float], stops: Sequence[int]) -> Line:
    end = next((index for index, token in enumerate(row) if token in stops), len(row))
    return Line(row[:end], chances[: end + 1], end < len(row))


def aligned_at_the_end(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves each row's kept places to its end, in their order. x (rows, n) or (rows, n, width), keep (rows, n) -> both
    in the new order, and the old place of each (rows, n)."""
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)
    where = order if x.ndim == 2 else order[..., None].expand_as(x)
    return x.gather(1, where), keep.gather(1, order), order


def load_writer(name: str, *, weights: bool = True, dropout: float | None = None) -> Writer:
    """A checkpoint's language model with its output layer.

    Raises:
        BackboneError: see `mmagent.pretrained.load_writing`: an encoder alone does not write.
    """
    part = pretrained.load_writing(name, key="model.backbone", weights=weights, dropout=dropout)
    writer = Writer(part.model)
    part.require(key.removeprefix("model.") for key, _ in writer.named_parameters())
    return writer
