"""ZeRO on several ranks: any mixture of modalities on any of them, another number of them when a run goes on, what goes
over the wire, and the whole weights gathered."""

from __future__ import annotations

import functools
import gc
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from jobs import engine as engines
from jobs import supervised
from jobs.engine import Engine, TorchEngine
from mmagent import freeze, text
from mmagent.assembly import load_language
from mmagent.batch import Inputs, Sample
from mmagent.config import Config, resolve
from mmagent.model import Batch
from mmagent.record import Message, Record
from mmagent.rows import parse
from mmagent.share import Share
from mmagent.tasks.classify import cross_entropy
from tests import ranks
from tests.conftest import COLOURS, classify
from tests.test_engine import LABELS

pytestmark = pytest.mark.timeout(900)  # a minute; on a machine where much else runs, many

Given = dict[str, Any]
SGD = {"optim.name": "sgd", "optim.lr": 0.02, "optim.lr_backbone": 0.02}
LORA = {"freeze.strategy": "lora:2", "optim.lr_backbone": 0.01}


class Rows:
    """Rows as the stream hands them out: each global batch dealt to the ranks, blanks where it does not divide."""

    def __init__(self, config: Config, rows: Sequence[Sequence[Record]], share: Share, rank: int) -> None:
        tokenizer = text.load_tokenizer(config.model.backbone)
        with torch.device("meta"):  # asked how long a text may be, no more
            encoder = text.load_encoder(config.model.backbone, weights=False)
        self._inputs = Inputs(config.model, config.data, tokenizer, classify(LABELS), encoder)
        self._rows, self._share, self._rank = rows, share, rank
        self._blank = self._inputs.sample(Record("", (Message("user", ""),), task="classify", weight=0.0))

    def steps(self) -> Iterator[list[Batch]]:
        for records in self._rows:
            dealt = [self._inputs.sample(record) for record in records[self._rank :: self._share.world]]
            yield self.micros(dealt)

    def micros(self, samples: list[Sample]) -> list[Batch]:
        filled = samples + [self._blank] * (self._share.rows - len(samples))
        size = self._share.micro_batch
        return [self._inputs.batch(filled[at : at + size]) for at in range(0, len(filled), size)]


def _all_done(saved: Path, count: int) -> bool:
    return len(list(saved.glob("done_*"))) == count


def learn(engine: Engine, micros: list[Batch], share: Share, stage: int, look: Callable[[], object] = bool) -> float:
    """One optimizer step; this rank's part of the mean loss. `look` is called when the gradients are there."""
    engine.set_lr(1.0, stage)
    total = 0.0
    for index, batch in enumerate(micros):
        out = engine.forward(batch)["classify"]
        loss = cross_entropy(out, batch["classify/label"], batch["weight"], share.micro_batch) * share.factor
        engine.backward(loss)
        if index == len(micros) - 1:
            look()
        engine.step()
        total += float(loss.detach()) / (share.passes * share.world)
    return total


def built(given: Given, settings: Mapping[str, Any], kind: Callable[..., Engine]) -> tuple[Engine, Config]:
    """The model of a run, without dropout, in an engine; 8 rows make a global batch, 4 a pass."""
    still = {"model.dropout": 0.0, "model.backbone_dropout": 0.0, "optim.clip_norm": 1e6}
    config = resolve(given["raw"], {"train.micro_batch": 4, "train.global_batch": 8, **still, **settings})
    tasks = classify(LABELS)
    infos = {name: task.info for name, task in tasks.items()}
    encoder = load_language(config.model, infos, dropout=config.model.backbone_dropout)
    model = supervised.build(config, tasks, encoder)
    return kind(model, freeze.groups(model, config), config), config


def opened(engine: Engine, config: Config, step: int, steps: int) -> int:
    """The stage of a gradual run; without dropout, so that passes can be compared."""
    stage = freeze.stage(engine.model, config.freeze, step, steps)
    freeze.thaw(engine.model, config.freeze, stage)
    engine.model.eval()
    if config.train.gradient_checkpointing:
        engine.model.backbone.train()
    return stage


# ---------------------------------------------------------------------------------------------- another world

STEPS, HALF = 8, 4
MOVES = ((2, 1), (1, 2), (2, 3))  # of the three that stand first; of the others the first
RESUMED: dict[str, dict[str, Any]] = {
    "stage 1": {"zero.stage": 1, **LORA},
    "stage 2": {"zero.stage": 2, **LORA},
    "stage 3": {"zero.stage": 3, **LORA},
    "stage 0": {"zero.stage": 0, "freeze.strategy": "top:1"},
    "SGD, stage 2": {"zero.stage": 2, "freeze.strategy": "top:1", **SGD},
    "gradual, stage 1": {"zero.stage": 1, "freeze.strategy": "gradual", "freeze.gradual_share": 1.0},
    "gradual, stage 3": {"zero.stage": 3, "freeze.strategy": "gradual", "freeze.gradual_share": 1.0, **SGD},
    "offload, stage 2": {"zero.stage": 2, "zero.offload": "optimizer", "freeze.strategy": "top:1"},
    "offload, stage 3": {"zero.stage": 3, "zero.offload": "parameters", "freeze.strategy": "top:1", **SGD},
}
OTHER_STAGE: dict[str, dict[str, Any]] = {  # that two workers go on at, of what one has saved
    "stage 1": {"zero.stage": 3},
    "stage 3": {"zero.stage": 0},
}


def moves_of(name: str) -> tuple[tuple[int, int], ...]:
    return MOVES if name in list(RESUMED)[:3] else MOVES[:1]


def moves(world: int) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """What a group of a size goes on with: how it is called, the case, who saved it, and the settings."""
    for name, settings in RESUMED.items():
        for before in (start for start, end in moves_of(name) if end == world):
            yield f"{name}: {before} to {world}", name, before, settings
    for name, other in OTHER_STAGE.items() if world == 2 else ():
        yield f"{name}: to {other}", name, 1, {**RESUMED[name], **other}


def resume(rank: int, world: int, given_file: Path) -> None:
    """Trains half of every case and saves it; goes on with what a group of another size has saved."""
    given = torch.load(given_file, weights_only=False)

    def train(engine: Engine, config: Config, steps: range) -> list[float]:
        share = config.share(world)
        rows = list(Rows(config, given["rows"], share, rank).steps())
        return [learn(engine, rows[at], share, opened(engine, config, at, STEPS)) for at in steps]

    for name, settings in RESUMED.items():
        if world not in (start for start, _ in moves_of(name)):
            continue
        engine, config = built(given, settings, engines.make)
        train(engine, config, range(HALF))
        saved = folder_of(given_file, name, world)
        saved.mkdir(parents=True, exist_ok=True)
        engine.save(saved)
        (saved / f"done_{rank}").touch()
    out: dict[str, list[float]] = {}
    for told, name, before, settings in moves(world):
        saved = folder_of(given_file, name, before)
        ranks.until(functools.partial(_all_done, saved, before))
        engine, config = built(given, settings, engines.make)
        engine.load(saved)
        losses = torch.tensor(train(engine, config, range(HALF, STEPS)), dtype=torch.float64)
        torch.distributed.all_reduce(losses)
        out[told] = losses.tolist()
    if rank == 0:
        torch.save(out, given_file.with_name(f"out_{world}.pt"))


@pytest.fixture
def given(tiny_recipe: dict[str, Any]) -> Given:
    return {"raw": tiny_recipe}


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_workers_at_any_stage(
    given: Given, make_records: Callable[..., list[Record]], tmp_path: Path
) -> None:
    """The losses are those of one plain process that was never interrupted."""
    records = make_records(8 * STEPS)
    given["rows"] = [records[at : at + 8] for at in range(0, len(records), 8)]
    torch.save(given, tmp_path / "given.pt")
    ranks.run("tests.test_zero:resume", tmp_path / "given.pt", (1, 2, 3), timeout_s=400)
    seen = 0
    for world in (1, 2, 3):
        found = torch.load(tmp_path / f"out_{world}.pt", weights_only=True)
        for told, name, _, _ in moves(world):
            wanted = uninterrupted(given, name)
            assert found[told] == pytest.approx(wanted[HALF:], rel=1e-5), told
            assert found[told] != pytest.approx(wanted[:HALF], rel=1e-2), told
            seen += 1
    assert seen == 3 * len(MOVES) + len(RESUMED) - 3 + len(OTHER_STAGE)


def uninterrupted(given: Given, name: str) -> list[float]:
    settings = {key: value for key, value in RESUMED[name].items() if not key.startswith("zero.")}
    engine, config = built(given, {**settings, "train.micro_batch": 8}, TorchEngine)
    share = config.share(1)
    rows = Rows(config, given["rows"], share, 0).steps()
    return [learn(engine, micros, share, opened(engine, config, at, STEPS)) for at, micros in enumerate(rows)]


def folder_of(given_file: Path, name: str, world: int) -> Path:
    return given_file.parent / re.sub(r"\W", "_", f"{name} {world}")


# ---------------------------------------------------------------------------------------------- any mixture on any rank

MIXED_STEPS = 21
MIXED: dict[str, dict[str, Any]] = {
    "stage 0": {"zero.stage": 0, "freeze.strategy": "all"},
    "stage 1, LoRA": {"zero.stage": 1, "freeze.strategy": "lora:2"},
    "stage 2, again": {"zero.stage": 2, "freeze.strategy": "all", "train.gradient_checkpointing": True},
    "stage 3": {"zero.stage": 3, "freeze.strategy": "all"},
    "stage 3, towers frozen": {"zero.stage": 3, "freeze.strategy": "towers"},
    "stage 3, LoRA, again": {"zero.stage": 3, "freeze.strategy": "lora:2", "train.gradient_checkpointing": True},
    "stage 3, join at the input": {"zero.stage": 3, "freeze.strategy": "all", "model.join": "input"},
}


def mixed(png: Callable[..., bytes], wav: Callable[..., bytes]) -> list[list[Record]]:
    """Global batches whose rows one of two ranks finds without any picture or sound, in turn; sometimes one of them
    has blanks alone, or fewer rows than the other."""
    out = []
    for step in range(MIXED_STEPS):
        records = []
        for index in range({5: 1, 6: 5}.get(step % 7, 8)):
            row: dict[str, Any] = {"id": f"{step}-{index}", "text": "what color?", "label": COLOURS[(step + index) % 4]}
            if (index + step) % 2:
                shown, spoken = {"image": png(row["label"])}, {"audio": wav(300.0 + step)}
                row |= (shown, spoken, shown | spoken)[index % 3]
            records.append(parse(row))
        out.append(records)
    return out


def mix(rank: int, world: int, given_file: Path) -> None:
    """Every case over all global batches: the gradients of every step, as rank 0 sees them."""
    from deepspeed.utils import safe_get_full_grad

    given = torch.load(given_file, weights_only=False)
    out: dict[str, list[dict[str, torch.Tensor]]] = {}
    for name, settings in MIXED.items():
        engine, config = built(given, {**settings, **SGD}, engines.make)
        share, seen = config.share(world), out.setdefault(name, [])

        def look(engine: Engine = engine, seen: list[dict[str, torch.Tensor]] = seen) -> None:
            trained = [(name, each) for name, each in engine.model.named_parameters() if each.requires_grad]
            seen.append({name: safe_get_full_grad(each).clone() for name, each in trained})

        opened(engine, config, 0, 1)
        for micros in Rows(config, given["rows"], share, rank).steps():
            learn(engine, micros, share, 0, look)
    if rank == 0:
        torch.save(out, given_file.with_name("out.pt"))


@pytest.mark.long
def test_any_rank_may_hold_any_mixture_of_modalities(
    given: Given, make_png: Callable[..., bytes], make_wav: Callable[..., bytes], tmp_path: Path
) -> None:
    """The gradients are those of one process on all rows; a rank that waited for ever would fail by the time-out."""
    given["rows"] = mixed(make_png, make_wav)
    torch.save(given, tmp_path / "given.pt")
    ranks.run("tests.test_zero:mix", tmp_path / "given.pt", (2,), timeout_s=400)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, settings in MIXED.items():
        plain = {key: value for key, value in settings.items() if not key.startswith("zero.")}
        engine, config = built(given, {**plain, **SGD, "train.micro_batch": 8}, TorchEngine)
        opened(engine, config, 0, 1)
        steps = iter(found[name])

        def look(engine: Engine = engine, steps: Any = steps, name: str = name) -> None:
            theirs = next(steps)
            ours = {key: each.grad for key, each in engine.model.named_parameters() if each.requires_grad}
            assert ours.keys() == theirs.keys()
            whole = torch.stack([grad.norm() for grad in ours.values()]).norm()
            for key, grad in ours.items():
                # Alone each is held more loosely: of a part that hardly moves the answer it is mostly rounding.
                room = 1e-4 * max(float(grad.norm()), 0.01 * float(whole))
                assert float((theirs[key] - grad).norm()) <= room, f"{name}: {key}"
            apart = torch.stack([(theirs[key] - grad).norm() for key, grad in ours.items()]).norm()
            assert float(apart) <= 1e-5 * float(whole), name

        for micros in Rows(config, given["rows"], config.share(1), 0).steps():
            learn(engine, micros, config.share(1), 0, look)
        assert next(steps, None) is None


# ---------------------------------------------------------------------------------------------- what goes over the wire


def traffic(rank: int, world: int, given_file: Path) -> None:
    """Bytes of gradients that go over the wire in each pass of two steps, by stage; and how much learns."""
    from deepspeed import comm

    given = torch.load(given_file, weights_only=False)
    comm.configure(enabled=True, prof_all=True, prof_ops=[], verbose=False, debug=False)
    out: dict[str, Any] = {}
    for stage in range(4):
        settings = {
            "zero.stage": stage,
            "freeze.strategy": "connector",
            "train.cache": "none",
            "train.micro_batch": 1,
        }
        engine, config = built(given, settings, engines.make)
        share = config.share(world)
        sizes = [(getattr(each, "ds_numel", each.numel()), each.requires_grad) for each in engine.model.parameters()]
        out["trained"], out["total"] = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
        passes = [batch for micros in Rows(config, given["rows"][:2], share, rank).steps() for batch in micros]
        found = out.setdefault(f"stage {stage}", [])
        opened(engine, config, 0, 1)
        for batch in passes:
            logits = engine.forward(batch)["classify"]
            before = reduced(comm.comm.comms_logger.comms_dict)
            engine.backward(cross_entropy(logits, batch["classify/label"], batch["weight"], 1))
            found.append(reduced(comm.comm.comms_logger.comms_dict) - before)
            engine.step()
    if rank == 0:
        torch.save(out, given_file.with_name("out.pt"))


def reduced(ops: Mapping[str, Mapping[int, Sequence[Any]]]) -> int:
    """Bytes that DeepSpeed's log has of all reductions; to one rank, or scattered, is as much to send as to all."""
    return sum(size * int(each[0]) for op, sizes in ops.items() if "reduce" in op for size, each in sizes.items())


@pytest.mark.long
def test_gradients_of_what_learns_go_once_in_a_step(
    given: Given, make_records: Callable[..., list[Record]], tmp_path: Path
) -> None:
    records = make_records(16)
    given["rows"] = [records[:8], records[8:]]
    torch.save(given, tmp_path / "given.pt")
    ranks.run("tests.test_zero:traffic", tmp_path / "given.pt", (2,), timeout_s=400)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    step = 4 * out["trained"]  # bytes of fp32
    assert out["trained"] < 0.8 * out["total"]
    for stage in (0, 1):
        assert out[f"stage {stage}"] == pytest.approx([0, 0, 0, step] * 2, rel=0.01, abs=200), stage
    for stage in (2, 3):
        assert out[f"stage {stage}"] == pytest.approx([step] * 8, rel=0.01, abs=200), stage


# ---------------------------------------------------------------------------------------------- whole weights


def gather(rank: int, world: int, given_file: Path) -> None:
    """Saves, loads and gathers a model that is large beside all else: how many bytes of memory each takes more than was
    held before, and the weights."""
    given = torch.load(given_file, weights_only=False)
    folder = given_file.parent / "saved"
    folder.mkdir(exist_ok=True)
    engine, config = built(given, {"zero.stage": 3, "freeze.strategy": "all", **SGD}, engines.make)
    share = config.share(world)
    for micros in Rows(config, given["rows"], share, rank).steps():
        learn(engine, micros, share, opened(engine, config, 0, 1))
    taken = {"save": more(lambda: engine.save(folder))}
    torch.distributed.barrier()
    taken["load"] = more(lambda: engine.load(folder))
    weights: dict[str, torch.Tensor] = {}
    taken["state"] = more(lambda: weights.update(engine.state(given_file.parent)))
    held = sum(parameter.ds_numel * 4 for parameter in engine.model.parameters())
    torch.save({"taken": taken, "held": held, "weights": weights}, given_file.with_name(f"out_{rank}.pt"))


def more(action: Callable[[], object]) -> int:
    """Bytes of memory that is no file's, at its peak while an action runs, above what there was before."""
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    before = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return peak[0] - before


def anonymous() -> int:
    return int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


@pytest.mark.long
def test_the_whole_weights_are_gathered_without_a_second_copy(
    given: Given, make_records: Callable[..., list[Record]], tiny_backbone: Path, tmp_path: Path
) -> None:
    """At stage 3 no rank holds more than a part beside its share; the weights are what plain torch makes of the same
    checkpoint, bit for bit."""
    large = BertConfig.from_pretrained(tiny_backbone, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    torch.manual_seed(0)
    BertModel(large).save_pretrained(tmp_path / "large")
    for file in tiny_backbone.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "large")
    given["raw"] = {**given["raw"], "model": {**given["raw"]["model"], "backbone": str(tmp_path / "large")}}
    given["rows"] = [make_records(8)]
    torch.save(given, tmp_path / "given.pt")
    ranks.run("tests.test_zero:gather", tmp_path / "given.pt", (2,), timeout_s=400)
    for rank in range(2):
        found = torch.load(tmp_path / f"out_{rank}.pt", weights_only=True)
        assert found["held"] > 70 << 20
        for name, taken in found["taken"].items():
            assert taken < 0.25 * found["held"], (rank, name)
        assert bool(found["weights"]) == (rank == 0)
    weights = torch.load(tmp_path / "out_0.pt", weights_only=True)["weights"]
    plain, _ = built(given, {"freeze.strategy": "all", **SGD}, TorchEngine)
    first = {name: value.clone() for name, value in plain.state(tmp_path).items()}
    plain.load(tmp_path / "saved")
    wanted = plain.state(tmp_path)
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())
    assert not all(torch.equal(first[name], value) for name, value in wanted.items())


# ---------------------------------------------------------------------------------------------- one after the other


def let_go(rank: int, world: int, given_file: Path) -> None:
    """Trains at one stage after the other, and says of which the model is there still when its engine was closed."""
    given = torch.load(given_file, weights_only=False)
    there = {}
    for stage in range(4):
        engine, config = built(given, {"zero.stage": stage, "freeze.strategy": "top:1"}, engines.make)
        share = config.share(world)
        for micros in Rows(config, given["rows"], share, rank).steps():
            learn(engine, micros, share, opened(engine, config, 0, 1))
        model = weakref.ref(engine.model)
        engine.close()
        del engine
        gc.collect()
        there[stage] = model() is not None
    torch.save(there, given_file.with_name(f"out_{rank}.pt"))


@pytest.mark.long
def test_a_closed_engine_holds_no_memory(
    given: Given, make_records: Callable[..., list[Record]], tmp_path: Path
) -> None:
    """A process that trains one model after the other, as those of a search do, holds one at a time."""
    given["rows"] = [make_records(8)]
    torch.save(given, tmp_path / "given.pt")
    ranks.run("tests.test_zero:let_go", tmp_path / "given.pt", (2,), timeout_s=200)
    for rank in range(2):
        assert torch.load(tmp_path / f"out_{rank}.pt") == dict.fromkeys(range(4), False)
