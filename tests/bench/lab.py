"""What rounds of faults train (`tests.bench.faults`): data, a small model, the ways it trains, and runs nobody hurt."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel

from jobs import cluster, prepare, trace
from mmagent import storage
from mmagent.config import Config, resolve
from mmagent.pretrained import locate
from tests.bench import texts
from tests.bench.hurt import Groups

if TYPE_CHECKING:  # it brings Ray, which reads its environment when it is imported
    from jobs.loop import Plan

ROWS, BATCH, EPOCHS = 64, 8, 2  # every window of the order (`data.window_rows`) is whole batches
NAME = f"faults_{ROWS}"
STEPS = ROWS * EPOCHS // BATCH
_COLOURS = ("red", "green", "blue", "black")
# Dropout and augmentation are on: a run that goes on must draw what it would have drawn.
SETUPS: dict[str, dict[str, Any]] = {
    "stage 0, all": {"zero.stage": 0, "freeze.strategy": "all"},
    "stage 1, connector": {"zero.stage": 1, "freeze.strategy": "connector"},
    "stage 1, LoRA": {"zero.stage": 1, "freeze.strategy": "lora:2"},
    "stage 2, top:1": {"zero.stage": 2, "freeze.strategy": "top:1"},
    "stage 3, all": {"zero.stage": 3, "freeze.strategy": "all"},
    "stage 3, LoRA": {"zero.stage": 3, "freeze.strategy": "lora:2"},
}
Trace = Mapping[str, Sequence[Mapping[str, Any]]]  # the lines of each rank, see `jobs.trace`


def code() -> str:
    """Of what is tested: rounds of other code say nothing about it."""
    files = sorted(file for folder in ("jobs", "mmagent") for file in (cluster.CHECKOUT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def made() -> Path:
    """The data set of the rounds, and the folder of their language model, in the storage root."""
    backbone = storage.root() / "bench" / "faults_backbone"
    if not (backbone / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(locate(texts.BACKBONE))
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
        tokenizer.save_pretrained(backbone)
        model.save_pretrained(backbone)
    if not (storage.folder("data", NAME) / "dataset.json").exists():
        sizes = {"train": ROWS, "validation": BATCH, "test": BATCH}
        rows = [_row(index, split) for split, count in sizes.items() for index in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            if prepare.main(["--source", f"jsonl:{file}", "--name", NAME, "--workers", "1"]):
                raise RuntimeError("the data of the rounds could not be made")
    return backbone


def _row(index: int, split: str) -> dict[str, Any]:
    """A question of its own length; two of three bring a picture."""
    colour, out = _COLOURS[index % 4], io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    row = {"id": f"{split}-{index}", "text": "what colour is it " * (1 + index % 5), "label": colour, "split": split}
    return row | ({"image": uri} if index % 3 else {"text": f"{row['text']} {colour}"})


class References:
    """The plans of rounds, and the traces of runs that nobody hurt."""

    def __init__(self, backbone: Path, groups: Groups) -> None:
        self._backbone, self._groups = backbone, groups
        self._traces: dict[tuple[str, int, bool], Trace] = {}

    def config(self, setup: str, world: int, *, still: bool = False) -> Config:
        """The recipe of a round; a still one draws nothing that hangs on the number of workers."""
        drawn = 0.0 if still else 0.1
        settings = {
            "data.name": NAME, "data.max_text_tokens": 32, "data.window_rows": 40, "augment.word_drop": 0.1,
            "model.backbone": str(self._backbone), "model.join": "output",
            "model.width": 32, "model.layers": 1, "model.heads": 2,
            "model.dropout": drawn, "model.head_dropout": drawn, "model.backbone_dropout": drawn,
            "model.image": {"width": 32, "layers": 1, "tokens": 4, "size": 16}, "model.audio": None,
            "train.micro_batch": 2, "train.global_batch": BATCH, "train.epochs": EPOCHS, "train.eval_every_steps": 6,
            "train.eval_rows": BATCH, "train.checkpoint_every_steps": 2, "train.keep_last": 3, "train.trace": True,
            "cluster.workers": world, "cluster.threads": 1, "cluster.max_failures": 3, **SETUPS[setup],
        }  # fmt: skip
        return resolve({}, settings)

    def plan(self, name: str, setup: str, world: int, *, still: bool = False) -> tuple[Path, Plan]:
        """A run that begins anew; also as a file for `tests.bench.hurt`."""
        from jobs import run

        folder = storage.folder("runs", f"{NAME}_{name}")
        shutil.rmtree(folder, ignore_errors=True)
        plan = run.prepare(self.config(setup, world, still=still), folder, export=False).plan
        torch.save(plan, folder / "plan.pt")
        return folder / "plan.pt", plan

    def trace(self, setup: str, world: int, *, still: bool = False) -> Trace:
        """Of a run that nobody hurt.

        Raises:
            RuntimeError: it did not come to its end, or an epoch's samples are not each there once.
        """
        if (setup, world, still) not in self._traces:
            file, plan = self.plan("reference", setup, world, still=still)
            ended = self._groups.run(file, world, None, plan.folder / "said", 300.0)
            found = trace.read(plan.folder)
            if any(ended.statuses) or len(by_step(found)) != plan.total_steps:
                said = f"{setup}: nobody hurt it, and it ended with {ended.statuses}"
                raise RuntimeError(f"{said}, see {plan.folder}/said")
            _whole(found)
            self._traces[setup, world, still] = found
        return self._traces[setup, world, still]


def _whole(found: Trace) -> None:
    """
    Raises:
        RuntimeError: an epoch's samples are not each there once.
    """
    steps = by_step(found)
    for epoch in range(EPOCHS):
        seen = [each for step in range(STEPS // EPOCHS) for each in steps[1 + epoch * STEPS // EPOCHS + step]]
        if len(seen) != ROWS or len(set(seen)) != ROWS:
            raise RuntimeError(
                f"epoch {epoch} of {STEPS} steps has {len(seen)} samples, {len(set(seen))} different ones"
            )


def by_step(trace: Trace) -> dict[int, list[str]]:
    """What all ranks together learned from in each step."""
    out: dict[int, list[str]] = {}
    for lines in trace.values():
        for line in lines:
            out.setdefault(line["step"], []).extend(line["ids"])
    return out


def losses(trace: Trace) -> list[float]:
    """The mean loss of each step."""
    each: dict[int, list[float]] = {}
    for lines in trace.values():
        for line in lines:
            each.setdefault(line["step"], []).append(float.fromhex(line["loss"]))
    return [sum(each[step]) / len(each[step]) for step in sorted(each)]


def parted(one: Trace, other: Trace) -> int | None:
    """The first step at which two traces are not the same."""
    mine, theirs = (
        {(line["step"], rank): line for rank, lines in found.items() for line in lines} for found in (one, other)
    )
    return min((key[0] for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)), default=None)
