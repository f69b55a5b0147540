"""Short texts beside long ones: written together (`serve.flowing`), and batch by batch as any server does that knows no
better. Both call the same model in the same process; it is untrained, so that no text ends before its length.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from mmagent import storage
from mmagent.answer import Answer
from mmagent.batch import Sample
from mmagent.config import resolve
from mmagent.measurement import Row
from mmagent.predictor import Predictor
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from mmagent.writer import Writing
from serve.batcher import Batcher
from serve.flowing import Flowing

_SHORT, _LONG = 8, 128  # tokens
_CLIENTS = (10, 2)  # of each
_BATCH = 16


class Engine(Protocol):
    async def submit(self, sample: Sample) -> tuple[Answer, float]: ...

    async def close(self) -> None: ...


def measure(seconds: float) -> list[Row]:
    """
    Args:
        seconds: of each of the two.
    """
    predictor = _predictor()
    sample = predictor.prepare(parse({"task": "generate", "text": "tell me of the red circle"}, default_id="0"))
    found: dict[str, list[tuple[Sequence[float], float]]] = {}
    for name in ("batch", "flow", "batch", "flow"):
        found.setdefault(name, []).append(asyncio.run(_load(name, predictor, sample, seconds / 2)))
    batch_s, flow_s = (statistics.median(s for short, _ in found[name] for s in short) for name in ("batch", "flow"))
    batch, flow = (statistics.mean(tokens for _, tokens in found[name]) for name in ("batch", "flow"))
    clients = f"{_CLIENTS[0]} clients ask for {_SHORT} tokens, {_CLIENTS[1]} for {_LONG}"
    return [
        Row("serve.writing_wait_vs_batch", batch_s / flow_s, "ratio",
            f"{clients}: a short text takes {1000 * flow_s:.0f} ms, batch by batch {1000 * batch_s:.0f}"),
        Row("serve.writing_rate_vs_batch", flow / batch, "ratio",
            f"tokens a second of all: {flow:.0f}, batch by batch {batch:.0f}"),
    ]  # fmt: skip


def _predictor() -> Predictor:
    """A decoder of 6 layers, 256 wide, on one thread."""
    import torch

    torch.set_num_threads(1)
    data = {"name": "none", "max_text_tokens": 32, "max_answer_tokens": _LONG}
    model = {"backbone": str(_checkpoint()), "join": "input", "image": None, "audio": None}
    config = resolve({"data": data, "model": model}, {})
    return Predictor.untrained(config, {"generate": TaskInfo("generate", ())}, "generate", device="cpu")


def _checkpoint() -> Path:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = storage.root() / "bench" / "decoder"
    if not (folder / "config.json").is_file():
        learner = ByteLevelBPETokenizer()
        learner.train_from_iterator(["tell me of the red circle"], 300, special_tokens=["<|end|>", "<pad>"])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=learner._tokenizer, eos_token="<|end|>", pad_token="<pad>", model_max_length=512
        )
        config = Qwen2Config(
            vocab_size=8000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, pad_token_id=1,
        )  # fmt: skip
        tokenizer.save_pretrained(folder)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


async def _load(name: str, predictor: Predictor, sample: Sample, seconds: float) -> tuple[Sequence[float], float]:
    """Seconds of each short text, and tokens a second of all."""
    engine: Any
    if name == "flow":
        flow = predictor.flow()
        assert flow is not None
        engine = Flowing(predictor, flow, _BATCH)
    else:
        engine = Batcher(predictor.answer, size=_BATCH, wait_s=0.0, on_the_way=lambda: 0)
    return await _asked(engine, sample, seconds)


async def _asked(engine: Engine, sample: Sample, seconds: float) -> tuple[Sequence[float], float]:
    short_s: list[float] = []
    tokens, began = 0, time.perf_counter()

    async def client(length: int) -> None:
        nonlocal tokens
        while time.perf_counter() - began < seconds:
            started = time.perf_counter()
            answer, _ = await engine.submit(replace(sample, writing=Writing(length)))
            tokens += len(answer.tokens)
            if length == _SHORT:
                short_s.append(time.perf_counter() - started)

    lengths = [length for length, count in zip((_SHORT, _LONG), _CLIENTS, strict=True) for _ in range(count)]
    await asyncio.gather(*map(client, lengths))
    took_s = time.perf_counter() - began
    await engine.close()
    return short_s, tokens / took_s
