"""What packing gains on texts of 10 to 200 tokens, against padding all to the longest: an encoder and a decoder.

Part of `make bench-train`. One process, two threads, plain PyTorch; both sides train their own copy of one model on the
same samples, in turn, step by step, without dropout, and their losses are compared: the mean over samples is the same
number, so that only time differs. The encoder is MiniLM with a head on its states, all of it learning; the decoder has
random weights and learns the next word, its padded side being Transformers' own model as it stands.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmagent.config import resolve
from mmagent.language import LanguageModel, loss
from mmagent.masking import following
from mmagent.tasks.task import IGNORED
from tests.bench import texts
from tests.bench.texts import LONGEST, SHORTEST

SMALL = os.environ.get("SCALE") == "small"
SAMPLES, STEPS, WARM_STEPS = (8, 3, 1) if SMALL else (32, 12, 2)
_SAME = 1e-3  # of the loss, after steps of rounding
Batch = dict[str, Tensor]


def measure() -> dict[str, float]:
    """How many times the samples a second of padding, by kind of model."""
    torch.set_num_threads(2)
    return {"encoder": _compare(*_encoders()), "decoder": _compare(*_decoders())}


def _compare(
    models: tuple[nn.Module, nn.Module], losses: tuple[Callable[[Batch], Tensor], ...], batch: Callable[[int], Batch]
) -> float:
    """Packed and padded steps in turn: the median of the ratios of their times.

    Raises:
        AssertionError: the two do not learn the same.
    """
    optimizers = [torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True) for model in models]
    ratios = []
    for step in range(STEPS):
        given, found, seconds = batch(step), [], []
        for loss_of, optimizer in zip(losses, optimizers, strict=True):
            began = time.perf_counter()
            value = loss_of(given)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
            found.append(float(value.detach()))
        assert abs(found[0] - found[1]) <= _SAME * abs(found[1]), f"step {step}: packed {found[0]}, padded {found[1]}"
        if step >= WARM_STEPS:
            ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def _encoders() -> tuple[Any, Any, Callable[[int], Batch]]:
    from jobs import supervised
    from mmagent import text
    from mmagent.batch import Inputs
    from mmagent.rows import parse
    from mmagent.targets import TaskInfo
    from mmagent.tasks import make_all

    config = resolve(
        {
            "data": {"name": "texts", "max_text_tokens": LONGEST},
            "model": {"backbone": texts.BACKBONE, "join": "input", "dropout": 0.0, "backbone_dropout": 0.0},
            "freeze": {"strategy": "all"}, "train": {"micro_batch": SAMPLES},
        },
        {},
    )  # fmt: skip
    tasks = make_all({"classify": TaskInfo("classify", texts.LABELS)})
    tokenizer = text.load_tokenizer(texts.BACKBONE)
    packed, padded = (supervised.build(config, tasks, text.load_encoder(texts.BACKBONE, dropout=0.0)) for _ in range(2))
    padded.backbone.packs = None  # type: ignore[union-attr]
    inputs = Inputs(config.model, config.data, tokenizer, tasks, packed.backbone)

    def batch(step: int) -> Batch:
        made = texts.rows(SAMPLES, tokenizer, SHORTEST, LONGEST, seed=step)
        return inputs.batch([inputs.sample(parse({**row, "task": "classify"})) for row in made])

    def fixed(given: Batch) -> Tensor:
        more = LONGEST - given["ids"].shape[1]
        wide = {key: F.pad(given[key], (0, more)) for key in ("ids", "mask", "keep")}
        return supervised.loss_of(padded(given | wide), given, tasks, config)

    losses = (lambda given: supervised.loss_of(packed(given), given, tasks, config), fixed)
    return (packed, padded), losses, batch


def _decoders() -> tuple[Any, Any, Callable[[int], Batch]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = Qwen2Config(
        vocab_size=4096, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = Qwen2ForCausalLM(sizes)
    packed = LanguageModel(Qwen2ForCausalLM(sizes))
    packed._whole[0].load_state_dict(plain.state_dict())

    def batch(step: int) -> Batch:
        rng = np.random.default_rng(step)
        made = [rng.integers(5, sizes.vocab_size, int(rng.integers(SHORTEST, LONGEST + 1))) for _ in range(SAMPLES)]
        out = {key: torch.zeros(SAMPLES, LONGEST, dtype=torch.int64) for key in ("ids", "mask")}
        out["targets"] = torch.full((SAMPLES, LONGEST), IGNORED)
        for row, ids in enumerate(made):
            out["ids"][row, : len(ids)], out["mask"][row, : len(ids)] = torch.from_numpy(ids), 1
            out["targets"][row, : len(ids)] = torch.from_numpy(following(ids))
        return out | {"weight": torch.ones(SAMPLES)}

    def fixed(given: Batch) -> Tensor:
        logits = plain(input_ids=given["ids"], attention_mask=given["mask"], use_cache=False).logits
        return loss(logits[given["targets"] != IGNORED], given, SAMPLES)

    return (packed, plain), (lambda given: loss(packed(given)["logits"], given, SAMPLES), fixed), batch


if __name__ == "__main__":
    print(measure())
