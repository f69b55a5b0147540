"""The language model: its tokenizer, and its states of a text.

Any Transformers checkpoint works, be it an encoder, a decoder or the encoder of a pair: a folder, a hub id, or
``package:NAME/FOLDER`` for one that lies inside an installed Python package. Nothing here knows a model by name.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmagent import packing, pretrained
from mmagent.packing import Packed, Style
from mmagent.pretrained import BackboneError, locate
from mmagent.record import Record, segments

__all__ = [
    "BackboneError", "TextEncoder", "apart", "check", "fitted", "frame", "legible", "length",
    "load_encoder", "load_tokenizer", "locate", "parts", "shared_tokenizer", "stop_id", "stop_ids", "tokenize", "words",
]  # fmt: skip

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "tekken.json")
_KEY = "model.backbone"
_SIGNS = (
    "So",
    "Sk",
    "Sm",
    "Co",
    "Cn",
)  # Unicode categories: emoji, skin colours, mathematics, private
_JOINERS = "\u200d\ufe0f\u20e3"  # make one emoji of several


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a checkpoint, truncating on the left (the newest words are kept).

    Raises:
        BackboneError: see `locate`; also where tokenizer files are missing or there is no padding token.
    """
    from transformers import AutoTokenizer

    place = locate(name)
    if Path(place).is_dir() and not any((Path(place) / file).exists() for file in _TOKENIZER_FILES):
        raise BackboneError(
            f"the model folder {place} has no tokenizer: one of {', '.join(_TOKENIZER_FILES)} is wanted; "
            "copy it there from where the model came from (tokenizer.save_pretrained writes it)"
        )
    with pretrained.refusing(name, place, _KEY):
        tokenizer = AutoTokenizer.from_pretrained(place)
    return settled(tokenizer, name)


def settled(tokenizer: Any, name: str) -> Any:
    """A tokenizer that can pad, and truncates on the left (the newest words are kept).

    Raises:
        BackboneError: there is no token to pad with.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise BackboneError(f"the tokenizer of {name!r} has neither a padding nor an end token: set pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "left"
    return tokenizer


def load_encoder(name: str, *, weights: bool = True, dropout: float | None = None) -> TextEncoder:
    """The language model of a checkpoint, with its pretrained weights or fresh ones; of an encoder-decoder the encoder.

    Args:
        dropout: in place of every dropout that its config has; none: as the config says.

    Raises:
        BackboneError: see `mmagent.pretrained.load`.
    """
    part = pretrained.load(name, "text", key=_KEY, weights=weights, dropout=dropout)
    encoder = TextEncoder(part.model, part.config, part.prefix)
    part.require(key.removeprefix("model.") for key, _ in encoder.named_parameters())
    return encoder


def check(name: str, max_tokens: int = 0) -> None:
    """Looks at all of a checkpoint but its weights, so that what is missing is told before a worker starts.

    Args:
        max_tokens: the longest text that the model shall take.

    Raises:
        BackboneError: see `load_tokenizer` and `load_encoder`; also where the model takes fewer tokens.
    """
    load_tokenizer(name)
    pretrained.check_weights(name)
    with torch.device("meta"):
        load_encoder(name, weights=False).check_length(max_tokens)


class TextEncoder(nn.Module):
    """A language model as a function from token ids to the states of its last layer.

    Texts of different lengths are packed where the model says the same of packed ones (see `mmagent.packing`); states
    of padding are zeros then.

    Args:
        model: the Transformers model, or the encoder of one.
        config: of the checkpoint that the model is a part of, where it is one.
        prefix: its place there.

    Attributes:
        max_tokens: the longest text the model has positions for; none: any length.
        packs: how the model is told of packed texts; none: it is not.
    """

    packs: Style | None

    def __init__(self, model: nn.Module, config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.model = model
        self._whole, self._prefix = config, prefix
        # A pooler makes one vector that nothing here reads; left in, its parameters would never get a gradient.
        for part in (model, getattr(model, "encoder", None)):  # of a pair made of two checkpoints it stands inside
            if getattr(part, "pooler", None) is not None:
                part.pooler = None  # type: ignore[union-attr]
        self.max_tokens = _max_tokens(model)
        # A decoder would keep every layer's keys and values for a next token that nobody asks for.
        self._options, self._reading = _without_cache(model), _without_cache(self.reads)
        self._first = _first_place(self.reads) if "position_ids" in pretrained.takes(self.reads) else None
        self.packs = self._ask()

    @property
    def decodes(self) -> bool:
        """Whether a token's state tells of the tokens before it alone."""
        return pretrained.decodes(self.model.config)

    @property
    def width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]

    def check_length(self, tokens: int) -> None:
        """
        Raises:
            BackboneError: the model has no positions for so many tokens.
        """
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise BackboneError(
                f"{tokens} tokens of text are asked for, but the language model takes {self.max_tokens} at most: "
                f"set data.max_text_tokens={self.max_tokens} or less"
            )

    def forward(self, ids: Tensor, mask: Tensor, *, packed: bool = True) -> Tensor:
        """ids, mask: (batch, tokens) -> states (batch, tokens, width).

        Args:
            packed: whether texts may be packed, which makes the last bits of one's states hang on the others' lengths.

        Raises:
            BackboneError: more tokens than the model has positions for.
        """
        self.check_length(ids.shape[1])
        if not packed:
            return self.reads(input_ids=ids, attention_mask=mask, **self._reading).last_hidden_state
        return self._states("input_ids", ids, mask)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids of any shape -> their embeddings (..., width)."""
        return self.model.get_input_embeddings()(ids)  # type: ignore[operator]

    def read(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """From embeds (batch, tokens, width) and mask (batch, tokens) to states (batch, tokens, width).

        Raises:
            BackboneError: more tokens than the model has positions for.
        """
        self.check_length(embeds.shape[1])
        return self._states("inputs_embeds", embeds, mask)

    @property
    def reads(self) -> Any:
        """The Transformers model whose states are read."""
        return self.model

    def pack(self, keep: Tensor) -> Packed | None:
        """keep: (batch, tokens) bool -> how its texts are packed; None where they are not."""
        return None if self.packs is None else packing.pack(keep, width=self.width, most=self.max_tokens)

    def unpacked(self) -> list[str]:
        """What is to be said where texts are not packed."""
        if self.packs is not None:
            return []
        name = type(self.model).__name__
        note = f"{name} does not take several texts in one row: they are padded, those of one length in one micro-batch"
        return [f"{note}; where lengths differ much, data.bucket_by_length=true or train.micro_tokens pads less"]

    def given(self, packed: Packed) -> dict[str, Tensor]:
        """What the model is told of packed texts beside their tokens."""
        assert self.packs is not None
        return packing.given(packed, self.packs, first=self._first, dtype=next(self.parameters()).dtype)

    def _states(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        """States (batch, tokens, width) of ids or embeds, which the model calls `name`."""
        if (packed := self.pack(mask.bool())) is None:
            return self.reads(**{name: x}, attention_mask=mask, **self._reading).last_hidden_state
        return self._packed_states(name, x, packed)

    def _packed_states(self, name: str, x: Tensor, packed: Packed) -> Tensor:
        told = self.given(packed)
        out = self.reads(**{name: packed.put(x[packed.keep])}, **told, **self._reading).last_hidden_state
        return packed.back(out)

    def _ask(self) -> Style | None:
        """How the model understands packed texts, by what it says of a few."""
        part = self.reads
        if next(part.parameters()).is_meta:
            return None
        pad, training = getattr(part.config, "pad_token_id", None), part.training
        part.eval()
        for style in packing.styles(part.config, decodes=self.decodes, first=self._first):
            self.packs = style
            if packing.holds(
                lambda ids, mask: part(input_ids=ids, attention_mask=mask, **self._reading).last_hidden_state,
                lambda ids, packed: self._packed_states("input_ids", ids, packed),
                part.get_input_embeddings().weight.shape[0],
                -1 if pad is None else pad,
            ):
                break
        else:
            self.packs = None
        part.train(training)
        return self.packs

    def blocks(self) -> list[nn.Module]:
        """The layers, first to last (see `blocks`)."""
        return blocks(self.model)

    def own(self) -> list[tuple[str, nn.Parameter]]:
        """The named parameters of the language model itself, where there is more."""
        return list(self.named_parameters())

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights of an encoder of the same kind; of tied ones each once."""
        lost = {name for name, _ in self.named_parameters()} - set(weights)
        assert not lost, f"the weights lack {sorted(lost)[:3]}"
        self.load_state_dict(weights, strict=False)

    def save(self, folder: Path) -> None:
        """Writes the checkpoint anew, as Transformers reads it. Of an encoder-decoder only the encoder is there."""
        if not self._prefix:
            self.model.save_pretrained(folder)  # type: ignore[operator]
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._whole.save_pretrained(folder)
        whole = {f"{self._prefix}.{key}": value for key, value in self.model.state_dict().items()}
        state = {key: value.detach().cpu().clone() for key, value in whole.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, first to last: its longest `nn.ModuleList` that stands in no other, which every family
    has."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return list(max((module for _, module in found), key=len, default=[]))


def words(record: Record) -> str:
    """What a record says in text: one message as it is, several as ``role: text`` lines; media leave no trace."""
    lines = []
    for message in record.messages:
        text = Record("", (message,)).segments()
        joined = " ".join("".join(part for kind, part in text if kind == "text").split())
        if joined:
            lines.append((message.role, joined))
    if len(lines) == 1:
        return lines[0][1]
    return "\n".join(f"{role}: {text}" for role, text in lines)


def parts(record: Record) -> list[tuple[str, str]]:
    """A record as (``text``, words), (``image``, "") and (``audio``, "") in their order; several messages as lines with
    their role."""
    out: list[tuple[str, str]] = []
    for number, message in enumerate(record.messages):
        if len(record.messages) > 1:
            out.append(("text", ("\n" if number else "") + f"{message.role}: "))
        out += segments(message.content)
    return out


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind every text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def stop_id(tokenizer: Any) -> int:
    """The id that ends a text.

    Raises:
        BackboneError: the tokenizer has none.
    """
    for found in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if found is not None:
            return int(found)
    raise BackboneError(f"{type(tokenizer).__name__} has no end token, which generate wants: set eos_token")


def stop_ids(tokenizer: Any, model: Any) -> list[int]:
    """All ids that end a text: the tokenizer's, and those that the checkpoint's own settings name besides."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = named if isinstance(named, list) else [named]
    return sorted({stop_id(tokenizer), *(int(each) for each in more if each is not None)})


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Token ids of each text, cut on the left: int64 arrays of (tokens,)."""
    return [ids for ids, _ in fitted(tokenizer, texts, max_tokens)]


def fitted(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[tuple[np.ndarray, int]]:
    """As `tokenize`, each with the number of tokens that were left out. What looks like a sign of the tokenizer's own
    in a text is words."""
    texts = [legible(tokenizer, words) for words in texts]
    out = tokenizer(texts, truncation=True, max_length=max_tokens, split_special_tokens=True)["input_ids"]
    # A tokenizer without special tokens gives nothing for an empty text; one token is the least a model takes.
    kept = [np.asarray(ids if len(ids) else [tokenizer.pad_token_id], dtype=np.int64) for ids in out]
    # Only what fills the room can have been cut: it is counted whole, which most texts never need.
    return [
        (ids, length(tokenizer, words) - len(ids) if len(ids) >= max_tokens else 0)
        for ids, words in zip(kept, texts, strict=True)
    ]


def legible(tokenizer: Any, words: str) -> str:
    """Words as a tokenizer can read them: `apart` where it would read some as unknown."""
    if words.isascii() or tokenizer.unk_token_id is None:
        return words
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    return apart(words)[0] if tokenizer.unk_token_id in ids else words


def apart(words: str) -> tuple[str, np.ndarray]:
    """Words with a space between letters and signs such as emoji, and for each character (and the end) the one that it
    stands for: (characters + 1,). A vocabulary of word pieces reads a word that an unknown sign touches as one unknown
    token, and the word is lost with the sign."""
    out, places, before = "", [], ""
    for index, sign in enumerate(words):
        kind = before if sign in _JOINERS and before else _kind(sign)
        if before and kind and kind != before:
            out += " "
            places.append(index)
        out += sign
        places.append(index)
        before = kind
    return out, np.array([*places, len(words)], np.int64)


def _kind(sign: str) -> str:
    """What stands together; empty for a space."""
    if sign.isspace():
        return ""
    return "sign" if ord(sign) > 127 and unicodedata.category(sign) in _SIGNS else "letter"


def length(tokenizer: Any, *words: str) -> int:
    """How many tokens a text, or a pair of them, has uncut, the tokenizer's own signs with it."""
    return len(tokenizer(*words, split_special_tokens=True, verbose=False)["input_ids"])


def _without_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in pretrained.takes(model) else {}


def _max_tokens(model: Any) -> int | None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) - _first_place(model) if limit is not None and limit > 0 else None


def _first_place(model: Any) -> int:
    """The number of a text's first place: some families begin to count behind the padding token's id, in a table that
    is larger by as much."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = (table for table in model.modules() if isinstance(table, nn.Embedding) and table is not words)
    offsets = (t.padding_idx + 1 for t in tables if t.num_embeddings == limit and t.padding_idx is not None)
    return max(offsets, default=0)


@lru_cache(maxsize=4)
def shared_tokenizer(name: str) -> Any:
    """`load_tokenizer`, once in a process: a read task should not pay for it at every window."""
    return load_tokenizer(name)
