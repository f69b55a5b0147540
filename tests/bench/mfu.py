"""How much of a GPU's arithmetic a LoRA fine-tune of a decoder uses (MFU), in bf16 with SDPA attention.

    make bench-mfu              (python -m tests.bench.mfu [--layers L] [--width W] [--micro-batch B] [--tokens T])

A Llama of about 1.1 billion random weights (`--layers 32 --width 4096`: of about 6.6) learns to write through what
`jobs.train` runs on each worker: the task `generate`, `freeze.strategy=lora:16`, one rank of ZeRO 1. Counted are 4 N
operations a token, N being all parameters: forward and backward through frozen layers, whose weights have no gradient;
attention is left out. So do NeMo Automodel's tables, whose 8B fine-tune of this kind stands at 0.406 of an H100 (402 of
989 TFLOP/s at 12,473 tokens a second). Without a GPU it says what was not run, and measures nothing.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from jobs import cluster
from mmagent.arguments import Parser, positive
from mmagent.config import resolve
from mmagent.measurement import Row, publish, table
from mmagent.pretrained import locate
from tests.bench import texts

STEPS, WARM_STEPS = 12, 3
_TFLOPS = {
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
}
_OPERATIONS = 4  # a token and parameter


class Speed(NamedTuple):
    """Of one worker."""

    tokens_per_s: float
    parameters: int

    @property
    def tflops(self) -> float:
        return _OPERATIONS * self.parameters * self.tokens_per_s / 1e12


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.mfu", __doc__)
    parser.add_argument("--layers", type=positive, default=16)
    parser.add_argument("--width", type=positive, default=2048)
    parser.add_argument("--micro-batch", type=positive, default=8, help="texts of a pass")
    parser.add_argument("--tokens", type=positive, default=4096, help="of a text")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU here: not run is a LoRA fine-tune of a decoder in bf16, which measures the MFU")
        return 0
    with tempfile.TemporaryDirectory(prefix="mmagent-mfu-") as place:
        write(Path(place), layers=args.layers, width=args.width, places=args.tokens)
        found = measure(Path(place), micro_batch=args.micro_batch, tokens=args.tokens)
    name = torch.cuda.get_device_name()
    peak = peak_tflops(name)
    what = f"LoRA of {found.parameters / 1e9:.1f}B parameters, {args.micro_batch} texts of {args.tokens} tokens, {name}"
    rows = [
        Row("mfu.share", found.tflops / peak, "fraction", f"{what}: of {peak:,.0f} TFLOP/s", ">= 0.45"),
        Row("mfu.tflops", found.tflops, "TFLOP/s", f"{what}: 4 operations a token and parameter"),
        Row("mfu.tokens_per_s", found.tokens_per_s, "tokens/s", what),
    ]
    publish("mfu", rows, checkout)
    print(table(rows))
    return 0


def peak_tflops(name: str) -> float:
    """What a device is sold as, bf16 without sparsity; of one that is not listed, what one large product reaches."""
    words = name.replace("-", " ").split()
    if known := [peak for model, peak in _TFLOPS.items() if model in words]:
        return float(known[0])
    size, seconds = 8192, []
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        x @ x
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e12


def write(folder: Path, *, layers: int, width: int, places: int) -> None:
    """A Llama of random weights, its layers in the proportions of Llama 3, and MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(locate(texts.BACKBONE))
    heads = max(2, width // 64)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), max_position_embeddings=places,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(backbone: Path, *, micro_batch: int, tokens: int) -> Speed:
    """Tokens a second of training steps, after the first ones; on a CPU as well, to try it."""
    from jobs import engine as engines
    from jobs import supervised
    from mmagent import freeze
    from mmagent.assembly import load_language
    from mmagent.batch import Inputs
    from mmagent.rows import parse
    from mmagent.targets import TaskInfo
    from mmagent.tasks import make_all

    answer = max(2, tokens // 8)
    config = resolve(
        {
            "data": {"name": "texts", "max_text_tokens": tokens - answer, "max_answer_tokens": answer},
            "model": {"backbone": str(backbone), "join": "input", "dropout": 0.0, "backbone_dropout": 0.0},
            "freeze": {"strategy": "lora:16"}, "train": {"micro_batch": micro_batch}, "zero": {"stage": 1},
            "cluster": {"workers": 1},
        },
        {},
    )  # fmt: skip
    tasks = make_all({"generate": TaskInfo("generate")})
    encoder = load_language(config.model, tasks, dropout=0.0)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = supervised.build(config, tasks, encoder)
    _alone()
    engine = engines.make(model, freeze.groups(model, config), config)
    inputs = Inputs(config.model, config.data, tokenizer, tasks, encoder)
    seconds, counted = [], 0
    for step in range(STEPS):
        rows = _rows(micro_batch, tokens - answer, answer, tokenizer, seed=step)
        batch = engines.moved(inputs.batch([inputs.sample(parse(row)) for row in rows]), engine.device)
        counted = int(batch["mask"].sum())
        _done(engine.device)
        began = time.perf_counter()
        engine.set_lr(1.0)
        engine.backward(supervised.loss_of(engine.forward(batch), batch, tasks, config))
        engine.step()
        _done(engine.device)
        seconds.append(time.perf_counter() - began)
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters())
    return Speed(counted / statistics.median(seconds[WARM_STEPS:]), parameters)


def _rows(count: int, asked: int, answered: int, tokenizer: Any, seed: int) -> list[dict[str, Any]]:
    """Questions and answers of words that are a token each, a few over what there is room for: they are cut."""
    rng = np.random.default_rng(seed)
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 3)
    return [
        {
            "task": "generate",
            "text": " ".join(rng.choice(words, asked)),
            "answer": " ".join(rng.choice(words, answered)),
        }
        for _ in range(count)
    ]


def _alone() -> None:
    """The group of one that ZeRO asks for."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(group)


def _done(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
