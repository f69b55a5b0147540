"""Continuous batching: texts that a decoder writes together, though they begin and end at different times.

A pass over a fixed batch lasts as long as its longest text, and who comes meanwhile waits for its end. Here each step
writes one token of every text that is under way; a new one joins between two steps, and one that is done leaves.

The rows of a step are aligned at their ends: each has its own places, and sees nothing of the others or of the filling
in front of shorter ones. So a text does not hang on its company, but for the last bits of its numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmagent.writer import Line, Writer, Writing, aligned_at_the_end

# What a checkpoint may say of how it writes without another reason to leave a text to Transformers' own loop.
_KNOWN = frozenset(
    {
        "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens",
        "do_sample", "temperature", "top_k", "top_p", "transformers_version", "repetition_penalty", "use_cache",
        "_from_model_config", "num_beams",
    }
)  # fmt: skip


@dataclass(eq=False)
class Text:
    """One that is under way.

    Args:
        tell: is told each token as soon as it is there.
    """

    how: Writing
    tell: Callable[[int], None] | None = None
    ids: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    since_s: float = field(default_factory=time.perf_counter)
    generator: torch.Generator | None = None

    def line(self, stops: Sequence[int]) -> Line:
        stopped = bool(self.ids) and self.ids[-1] in stops
        return Line(self.ids[:-1] if stopped else self.ids, self.chances, stopped)


def flows(writer: Any) -> bool:
    """Whether a language model's texts can be written so: a decoder of ours, which keeps plain keys and values, and
    whose checkpoint asks for nothing that we would have to imitate."""
    if not isinstance(writer, Writer) or not writer.continues:
        return False
    asked: Any = getattr(writer.model, "generation_config", None)
    told = asked.to_diff_dict() if asked is not None else {}
    if any(value for key, value in told.items() if key not in _KNOWN):
        return False
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config: Any = writer.model.config
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, ValueError):
        return False
    return all(type(layer) is DynamicLayer for layer in layers)


class Flow:
    """Belongs to one thread at a time.

    Args:
        writer: see `flows`.
        stops: ids that end a text.
    """

    def __init__(self, writer: Writer, stops: Sequence[int]) -> None:
        self._writer, self._stops = writer, set(stops)
        asked: Any = getattr(writer.model, "generation_config", None)
        self._penalty = float(getattr(asked, "repetition_penalty", None) or 1.0)
        self.texts: list[Text] = []
        self._cache: Any = None
        self._keep = torch.zeros(0, 0, dtype=torch.bool)  # (texts, places): which of the cache are the text's own
        self._logits = torch.zeros(0, 0)  # (texts, vocabulary): of each text's next token

    @torch.inference_mode()
    def admit(self, embeds: Tensor, mask: Tensor, texts: Sequence[Text]) -> None:
        """Reads what stands before texts, which then are under way.

        Args:
            embeds, mask: (texts, tokens, width), (texts, tokens): as of `Writer.write`.

        Raises:
            ValueError: as many rows as texts are wanted.
        """
        if len(embeds) != len(texts):
            raise ValueError(f"there are {len(embeds)} rows to read for {len(texts)} texts")
        embeds, keep, _ = aligned_at_the_end(embeds, mask.bool())
        more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._writer.accepts else {}
        out = self._writer.model(
            inputs_embeds=embeds, attention_mask=keep.long(), use_cache=True, **self._writer.places(keep), **more
        )
        logits = out.logits[:, -1].float()
        if not self.texts:
            self._cache, self._keep, self._logits = out.past_key_values, keep, logits
        else:
            wide = max(self._keep.shape[1], keep.shape[1])
            for mine, new in zip(self._cache.layers, out.past_key_values.layers, strict=True):
                mine.keys = torch.cat([_filled(mine.keys, wide), _filled(new.keys, wide)])
                mine.values = torch.cat([_filled(mine.values, wide), _filled(new.values, wide)])
            places = [torch.nn.functional.pad(each, (wide - each.shape[1], 0)) for each in (self._keep, keep)]
            self._keep, self._logits = torch.cat(places), torch.cat([self._logits, logits])
        for text in texts:
            if text.how.temperature > 0:
                text.generator = torch.Generator(self._logits.device).manual_seed(text.how.seed)
        self.texts += texts

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """Writes a token of each text; those that came to their end, which have left."""
        tokens = self._next()
        chances = self._logits.log_softmax(1).gather(1, torch.tensor(tokens, device=self._logits.device)[:, None])
        for text, token, chance in zip(self.texts, tokens, chances[:, 0].tolist(), strict=True):
            text.ids.append(token)
            text.chances.append(chance)
            if text.tell is not None:
                text.tell(token)
        done = [each for each in self.texts if each.ids[-1] in self._stops or len(each.ids) >= each.how.max_tokens]
        self.leave(done)
        if self.texts:
            device = self._logits.device
            last = torch.tensor([[text.ids[-1]] for text in self.texts], device=device)
            places = self._keep.sum(1, keepdim=True)
            self._keep = torch.cat([self._keep, self._keep.new_ones(len(last), 1)], dim=1)
            more = {"position_ids": places} if "position_ids" in self._writer.accepts else {}
            out = self._writer.model(
                input_ids=last, attention_mask=self._keep.long(), past_key_values=self._cache, use_cache=True, **more
            )
            self._cache, self._logits = out.past_key_values, out.logits[:, -1].float()
        return done

    def leave(self, gone: Sequence[Text]) -> None:
        """Takes texts out, wherever they are."""
        left = [n for n, each in enumerate(self.texts) if each not in gone]
        if len(left) == len(self.texts):
            return
        self.texts = [self.texts[n] for n in left]
        if not left:
            self._cache = None
            return
        rows = torch.tensor(left, device=self._keep.device)
        self._keep, self._logits = self._keep[rows], self._logits[rows]
        begin = int(self._keep.any(0).to(torch.uint8).argmax())  # what no text that is left needs
        self._keep = self._keep[:, begin:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[rows, :, begin:], layer.values[rows, :, begin:]

    def _next(self) -> list[int]:
        """Each text's likeliest token, or one that is drawn from the likeliest that have `top_p` of the probability."""
        if self._penalty != 1.0:  # arXiv:1909.05858, as Transformers has it: of what was written
            for text, logits in zip(self.texts, self._logits, strict=True):
                said = torch.tensor(text.ids, dtype=torch.long, device=logits.device).unique()
                logits[said] = torch.where(logits[said] > 0, logits[said] / self._penalty, logits[said] * self._penalty)
        tokens: list[int] = self._logits.argmax(1).tolist()  # of all rows at once: a GPU is waited for once
        for row, text in enumerate(self.texts):
            if text.how.temperature > 0:
                chances, order = (self._logits[row] / text.how.temperature).softmax(0).sort(descending=True)
                chances = torch.where(chances.cumsum(0) - chances < text.how.top_p, chances, 0.0)
                tokens[row] = int(order[torch.multinomial(chances, 1, generator=text.generator)])
        return tokens


def _filled(cached: Tensor, places: int) -> Tensor:
    """(texts, heads, n, channels) -> (texts, heads, places, channels), filled up in front."""
    return torch.nn.functional.pad(cached, (0, 0, places - cached.shape[2], 0))
