"""Which corrections a model contradicts that learned from everybody else's.

Keys are dealt into two halves; for each half a model begins with the bundle, learns the other half's corrections, and
answers this half's questions. So nobody's word is judged by a model that has heard it. One short training for each
half, in Ray tasks of their own; what is forgotten meanwhile does not matter.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch

from jobs import engine as engines
from jobs.cleaning import Offer
from jobs.engine import TorchEngine
from jobs.supervised import Batches, build, loss_of
from mmagent import freeze, predictions, storage
from mmagent.assembly import load_language, load_reading
from mmagent.batch import Inputs, PartError, Sample
from mmagent.config import Config
from mmagent.frozen import FrozenStates
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all

_ORDER = 11  # of the seeds that start with the run's


def contradicted(
    config: Config, infos: Mapping[str, TaskInfo], given: Sequence[Offer]
) -> tuple[dict[str, bool], float]:
    """By feedback, whether a model that did not learn from its key answers otherwise; where it cannot answer, it does
    not contradict. And the seconds of the longer one's steps.

    Args:
        config: of the refit, settled.
        infos: the tasks with all labels.
    """
    halves = deal({key: sum(each.said.key == key for each in given) for key in {each.said.key for each in given}})
    options: dict[str, Any] = {"num_cpus": config.cluster.threads, "num_gpus": 1 if config.cluster.gpu else 0}
    work = ray.remote(fit).options(**options)
    asked, waiting = [], []
    for half in halves:
        mine = [each for each in given if each.said.key in half]
        others = [each.record for each in given if each.said.key not in half]
        asked.append(mine)
        waiting.append(work.remote(storage.variables(), config, dict(infos), others, [each.record for each in mine]))
    out: dict[str, bool] = {}
    seconds = 0.0
    for mine, (right, took_s) in zip(asked, ray.get(waiting), strict=True):
        out |= {each.said.id: not fine for each, fine in zip(mine, right, strict=True)}
        seconds = max(seconds, took_s)
    return out, seconds


def deal(counts: Mapping[str, int]) -> tuple[set[str], set[str]]:
    """Two sets of keys of about as many corrections."""
    halves: tuple[set[str], set[str]] = (set(), set())
    size = [0, 0]
    for key in sorted(counts, key=lambda key: (-counts[key], key)):
        least = size.index(min(size))
        halves[least].add(key)
        size[least] += counts[key]
    return halves


def fit(
    root: Mapping[str, str],
    config: Config,
    infos: Mapping[str, TaskInfo],
    rows: Sequence[Record],
    asked: Sequence[Record],
) -> tuple[list[bool], float]:
    """Trains on rows as a refit would, in plain torch, and says of each question whether its answer is right; and the
    seconds of the training.

    Args:
        root: `storage.variables` of the command.
    """
    storage.use(root)
    torch.set_num_threads(config.cluster.threads)
    tasks = make_all(infos)
    encoder = load_language(config.model, tasks, dropout=config.model.backbone_dropout)
    tokenizer = load_reading(config.model)
    model = build(config, tasks, encoder)
    inputs = Inputs(config.model, config.data, tokenizer, tasks, encoder)
    engine = TorchEngine(model, freeze.groups(model, config), config)
    frozen = FrozenStates(encoder, device=engine.device) if model.backbone is None else None
    batches = Batches(inputs, frozen, config, {}, engine.device)
    samples = [sample for record in rows if (sample := _sample(inputs, record)) is not None]
    began = time.monotonic()
    _train(config, engine, batches, samples)
    took_s = time.monotonic() - began
    predictor = Predictor(
        name="crossfit", config=config, tasks=tasks, task=next(iter(infos)), model=model, encoder=encoder,
        tokenizer=tokenizer, device=str(engine.device),
    )  # fmt: skip
    answers = predictor.attempt(asked)
    right = [
        isinstance(answer, PartError)
        or bool(predictions.judged(tasks[record.task], tasks[record.task].gold(record), answer)["right"])
        for record, answer in zip(asked, answers, strict=True)
    ]
    return right, took_s


def _train(config: Config, engine: TorchEngine, batches: Batches, samples: Sequence[Sample]) -> None:
    assert config.train.epochs != "auto"
    share, micro = config.share(1), config.train.micro_batch
    steps = max(1, round(config.train.epochs * len(samples) / share.batch))
    rng = np.random.default_rng([config.seed, _ORDER])
    order: list[int] = []
    for step in range(steps):
        while len(order) < share.batch:
            order += rng.permutation(len(samples)).tolist()
        chosen, order = order[: share.batch], order[share.batch :]
        torch.manual_seed(int(rng.integers(1 << 31)))
        stage = freeze.stage(engine.model, config.freeze, step, steps)
        freeze.thaw(engine.model, config.freeze, stage)
        engine.set_lr(engines.schedule(step, steps, config), stage)
        passes = [chosen[at : at + micro] for at in range(0, len(chosen), micro)]
        engine.begin(len(passes))
        for part in passes:
            batch = engines.moved(batches.make([samples[index] for index in part], train=True), engine.device)
            loss = loss_of(engine.forward(batch), batch, batches.inputs.tasks, config) * share.factor
            engine.backward(loss)
            engine.step()


def _sample(inputs: Inputs, record: Record) -> Sample | None:
    try:
        return inputs.sample(record)
    except PartError:
        return None  # damaged media are set aside in the refit itself, and counted


def by_key(given: Sequence[Offer], wrong: Mapping[str, bool]) -> dict[str, list[bool]]:
    """What `jobs.cleaning.suspects` wants."""
    out: dict[str, list[bool]] = defaultdict(list)
    for each in given:
        if each.said.id in wrong:
            out[each.said.key].append(wrong[each.said.id])
    return dict(out)
