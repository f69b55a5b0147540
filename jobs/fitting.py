"""How many samples one forward pass holds (`train.micro_batch=auto`): found by trial, in a process of its own.

The longest rows of a quick scan are taught for a step each, 1 at a time, then 2, 4, ..., in plain torch with the
optimizer's whole state, while the process reports how much memory it has taken. It stops before a size whose memory,
foretold from the last two, is more than a worker may take; where it dies or runs out of memory all the same, the last
size that came through counts. A step keeps its samples: what one pass does not hold, accumulation adds up.
"""

from __future__ import annotations

import heapq
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs import stream
from jobs.engine import TorchEngine, moved
from jobs.loop import Learner, Plan
from jobs.vigil import free_bytes
from mmagent import freeze, measurement, storage
from mmagent.config import Config, TrainConfig, override
from mmagent.order import Order, Position
from mmagent.shards import Dataset
from mmagent.share import Share
from mmagent.targets import TaskInfo

SAMPLES = TrainConfig.model_fields["micro_batch"].default  # of a step of one worker, times the accumulation
MARGIN = 0.8  # of the free memory that training may plan with
_SCANNED_GROUPS = 64
_TIMEOUT_S = 600.0


class FitError(RuntimeError):
    """Not even one sample fits; says what was tried."""


def settle(
    config: Config, learner: Callable[[Plan], Learner], tasks: Mapping[str, TaskInfo], dataset: Dataset,
    measure: Callable[..., tuple[int, list[tuple[int, int]]]],
) -> tuple[Config, str]:  # fmt: skip
    """The config with the largest micro-batch that fits, and why it is that one.

    Args:
        measure: `trials`, here or on a machine that has what a worker asks for.

    Raises:
        FitError: not even one sample fits.
    """
    samples = SAMPLES * config.train.accumulation
    with tempfile.TemporaryDirectory(prefix=".fitting-", dir=_made(storage.root())) as place:
        file = Path(place) / "longest.parquet"
        pq.write_table(longest_rows(dataset, samples), file)
        budget, found = measure(_plan(config, learner, tasks, dataset, file), file, samples, config.cluster.workers)
    return largest(config, budget, found)


def largest(config: Config, budget: int, found: list[tuple[int, int]]) -> tuple[Config, str]:
    """The config with the largest size that came through, and why it is that one.

    Args:
        budget, found: of `trials`.

    Raises:
        FitError: none came through.
    """
    samples = SAMPLES * config.train.accumulation
    if not found:
        raise FitError(
            f"not even one sample fits into the {budget / 2**30:.1f} GiB of memory that a worker may take: lower "
            "data.max_text_tokens, freeze more (freeze.strategy), or give train.gradient_checkpointing=true"
        )
    size, taken = found[-1]
    made = {"train.micro_batch": size, "train.accumulation": samples // size}
    why = (
        f"train.micro_batch={size} train.accumulation={samples // size}: {size} of the longest rows take "
        f"{taken / 2**30:.2f} of the {budget / 2**30:.2f} GiB that a worker may"
    )
    return override(config, made), why


def trials(plan: Plan, longest: Path, samples: int, workers: int) -> tuple[int, list[tuple[int, int]]]:
    """Bytes that a worker of this machine may take, and those that a step of each size took, in a child process.

    Args:
        longest: a Parquet file of so many rows, the longest first.
        samples: the most; only powers of two that divide it are tried.
        workers: on this machine.
    """
    budget = _budget(workers)
    with tempfile.NamedTemporaryFile(suffix=".plan") as file:
        file.write(pickle.dumps((plan, longest, samples, budget)))
        file.flush()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.run(
            [sys.executable, "-m", "jobs.fitting", file.name], env=environment, capture_output=True, text=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    found = [tuple(json.loads(line)) for line in child.stdout.splitlines() if line.startswith("[")]
    if not found and child.returncode > 0:  # killed by a signal, or out of memory, is an answer; a mistake is none
        raise RuntimeError(child.stderr[-2000:])
    return budget, found


def longest_rows(dataset: Dataset, count: int) -> pa.Table:
    """So many rows of the training split with the most words and media, of row groups all over it; repeated where
    there are fewer."""
    groups = stream.row_groups(dataset, "train")
    taken = groups[:: max(1, len(groups) // _SCANNED_GROUPS)]
    heap: list[tuple[int, int, pa.Table]] = []
    serial = 0
    for file, group, _ in taken:
        table = pq.ParquetFile(storage.source(file)).read_row_group(group, columns=stream.COLUMNS)
        for index, weight in enumerate(_weights(table)):
            serial += 1
            item = (weight, serial, table.slice(index, 1))
            if len(heap) < count:
                heapq.heappush(heap, item)
            elif weight > heap[0][0]:
                heapq.heapreplace(heap, item)
    rows = [item[2] for item in sorted(heap, key=lambda item: -item[0])]
    return pa.concat_tables([rows[index % len(rows)] for index in range(count)]).combine_chunks()


def _weights(table: pa.Table) -> list[int]:
    """Of each row: the letters of its messages and candidates; a picture or sound counts more than any text."""
    media = 10**6
    found = []
    for row in table.select(["messages", "images", "audios", "candidates"]).to_pylist():
        letters = sum(len(part["content"] or "") for part in (*row["messages"], *(row["candidates"] or ())))
        found.append(letters + media * (len(row["images"] or ()) + len(row["audios"] or ())))
    return found


def _budget(workers: int) -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0] * MARGIN)
    return int(free_bytes() * MARGIN / workers)


def _plan(
    config: Config, learner: Callable[[Plan], Learner], tasks: Mapping[str, TaskInfo], dataset: Dataset, file: Path
) -> Plan:
    """A plan of one worker whose rows are those of a file."""
    rows = pq.read_metadata(storage.source(file)).num_rows
    own = {
        "train.micro_batch": rows,
        "train.accumulation": 1,
        "train.global_batch": rows,
        "cluster.workers": 1,
        "zero.engine": "torch",
    }
    return Plan(
        learner=learner, root=storage.variables(), config=override(config, own), tasks=tasks,
        label_weights={}, folder=file.parent, name="fitting", bundle=None, seal="", data=dataset.name,
        order=Order([(str(file), 0, rows)], seed=config.seed, window_rows=rows), total_steps=1, max_bad_rows=rows,
        task=dataset.task, golden_source=(), parts=(),
    )  # fmt: skip


def _try(plan: Plan, longest: Path, samples: int, budget: int) -> Iterator[tuple[int, int]]:
    """A step of each size, and the most memory that the process ever took, in bytes."""
    torch.set_num_threads(plan.config.cluster.threads)
    learner = plan.learner(plan)
    engine = TorchEngine(learner.model, freeze.groups(learner.model, plan.config), plan.config)
    learner.begin(engine.device)
    engine.set_lr(0.0)
    size, before, now = 1, 0, 0
    while samples % size == 0 and (size < 4 or now + 2 * (now - before) <= budget):
        layout = replace(stream.layout_of(plan.config, 1), share=Share(size, size, 1))
        order = Order([(str(longest), 0, size)], seed=plan.config.seed, window_rows=size)
        (step,) = learner.steps(stream.tables(order, layout, Position(), 1))
        engine.begin(len(step.micros))
        for micro in step.micros:
            batch = moved(micro, engine.device)
            engine.backward(learner.loss(engine.forward(batch), batch))
            engine.step()
        before, now = now, _taken()
        if now > budget:
            return
        yield size, now
        size *= 2


def _taken() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return measurement.resident_peak()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(file: str) -> int:
    plan, longest, samples, budget = pickle.loads(Path(file).read_bytes())
    storage.use(plan.root)
    try:
        for size, taken in _try(plan, longest, samples, budget):
            print(json.dumps([size, taken]), flush=True)
    except (torch.OutOfMemoryError, MemoryError):
        return 0
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
