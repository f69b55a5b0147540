"""Training that is hurt at random, and what is lost: samples, repeated samples, the trace of losses.

    make test-faults            (python -m tests.bench.faults [--rounds 100] [--ray 20] [--only KIND] [--seed 0])

A round trains a small model on words and pictures for two epochs and hurts it once or twice on the way, at a rank, step
and moment that its seed draws; then the same run goes on to its end. What it learned from, step by step, is set beside
a run that nobody hurt: ids in order and losses bit for bit, or, where it goes on with another number of workers, each
id in its step and losses up to rounding. Most rounds are two gloo ranks in processes of their own (`tests.bench.hurt`);
the others go through Ray Train and submitted jobs (`tests.bench.hurt_jobs`). ZeRO's stages, frozen parts and LoRA take
turns.

What was found is kept in the storage root, bench/faults.jsonl: the same command goes on with the rounds that are
missing, of the same code. Status 1 where anything was lost, repeated, hung or different; such a round's folder stays.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs import cluster, trace, watch
from jobs.lock import LockError, locked
from jobs.progress import Progress
from mmagent import storage
from mmagent.arguments import Parser, positive
from mmagent.measurement import Row, publish, table
from tests.bench import hurt_jobs, lab
from tests.bench.hurt import Groups, Hurt

_TIMEOUT_S = 120.0  # of a group that takes seconds
_ROUNDING = 1e-4  # of a loss computed by another number of workers
GLOO = {
    "one of two ranks killed": ("kill", (2, 2)),
    "killed while a checkpoint is written": ("save", (2, 2)),
    "newest checkpoint torn": ("kill", (2, 2)),
    "killed twice": ("kill", (2, 2, 2)),
    "SIGTERM": ("term", (2, 2)),
    "killed, on with 1 rank": ("kill", (2, 1)),
    "killed, on with 3 ranks": ("kill", (2, 3)),
    "1 rank killed, on with 2": ("kill", (1, 2)),
}  # what happens, and how many ranks run before and after
_PHASES = ("data", "forward", "backward", "collective", "step", "validation", "checkpoint")


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a round."""

    kind: str
    number: int
    seed: int
    code: str
    hurts: int  # that did happen
    lost: int
    repeated: int
    equal: bool
    hung: bool
    seconds: float
    words: str = ""  # where it went wrong


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.faults", __doc__)
    parser.add_argument("--rounds", type=positive, default=100, help="in all")
    parser.add_argument("--ray", type=int, default=20, help="of them through Ray Train and submitted jobs")
    parser.add_argument("--only", choices=[*GLOO, *hurt_jobs.KINDS], help="this kind alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    wanted = _wanted(args.rounds, args.ray, args.only)
    try:
        # Two at once would take each other's folders away.
        with locked(storage.root() / "bench" / "faults"):
            return _measured(args.seed, wanted, checkout)
    except LockError as error:
        print(f"error: {error}, or another MMAGENT_STORAGE", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


def _measured(seed: int, wanted: dict[int, str], checkout: Path) -> int:
    """Runs the rounds that are missing, and publishes all; the exit status."""
    file, code = storage.root() / "bench" / "faults.jsonl", lab.code()
    found = [Found(**line) for line in watch.whole_lines(file)]
    known = {(each.number, each.seed): each for each in found if each.code == code}
    done = [known[number, seed] for number in wanted if (number, seed) in known]
    left = {number: kind for number, kind in wanted.items() if (number, seed) not in known}
    if done:
        print(f"{len(done)} of {len(wanted)} rounds are known: {file}", flush=True)
    done += _run(left, seed, code, file)
    rows = figures(done)
    publish("faults", rows, checkout)
    print(shown(done), table(rows), sep="\n")
    return int(any(each.lost or each.repeated or each.hung or not each.equal for each in done))


def _wanted(rounds: int, ray: int, only: str | None) -> dict[int, str]:
    """The kind of each round, by number: first those without Ray."""
    if only is not None:
        return dict.fromkeys(range(rounds), only)
    kinds, plain, through = [*GLOO], rounds - min(ray, rounds), min(ray, rounds)
    first = {number: kinds[number % len(kinds)] for number in range(plain)}
    return first | {plain + index: hurt_jobs.KINDS[index % len(hurt_jobs.KINDS)] for index in range(through)}


def _run(left: dict[int, str], seed: int, code: str, file: Path) -> list[Found]:
    out: list[Found] = []
    if not left:
        return out
    machines, groups = hurt_jobs.Machines(), Groups()
    try:
        if not {*left.values()} <= {*GLOO}:
            machines.start()  # before anything imports Ray
        references = lab.References(lab.made(), groups)
        with Progress("rounds", len(left), "rounds") as progress:
            for number, kind in left.items():
                rng, began = random.Random(f"{seed}/{number}/{kind}"), time.monotonic()
                if kind in GLOO:
                    found = _round(kind, number, rng, references, groups)
                else:
                    found = _ray_round(kind, number, rng, references, machines)
                found = replace(found, seed=seed, code=code, seconds=round(time.monotonic() - began, 1))
                with open(file, "a") as lines:
                    lines.write(json.dumps(asdict(found)) + "\n")
                out.append(found)
                progress.add()
                if found.words:
                    print(f"round {number}, {kind}: {found.words}", flush=True)
    finally:
        groups.close()
        machines.close()
    return out


def _round(kind: str, number: int, rng: random.Random, references: lab.References, groups: Groups) -> Found:
    """One round without Ray."""
    what, worlds = GLOO[kind]
    setup = rng.choice([*lab.SETUPS])
    same = len(set(worlds)) == 1
    plan_file, plan = references.plan(f"round_{number}", setup, worlds[0], still=not same)
    log, hurts, hung, failed, at = plan.folder / "said", 0, False, "", 0
    for turn, world in enumerate(worlds):
        last = turn == len(worlds) - 1
        at = rng.randrange(at, max(at + 1, plan.total_steps * (turn + 1) // len(worlds)))
        phase = "checkpoint" if what == "save" else rng.choice(_PHASES)
        told = None if last else Hurt(what, rng.randrange(world), at, phase, rng.randrange(1 << 30))
        ended = groups.run(plan_file, world, told, log, _TIMEOUT_S)
        hung = hung or ended.hung
        hurts += not last and (what == "term" or any(ended.statuses))
        if last and any(ended.statuses):
            failed = f"it did not go on: {ended.statuses}, see {log}"
        if kind == "newest checkpoint torn" and not last:
            _tear(plan.folder / "checkpoints", rng)
    wanted = references.trace(setup, worlds[0], still=not same)
    return _judged(kind, number, hurts, hung, failed, plan.folder, wanted, same=same)


def _ray_round(
    kind: str, number: int, rng: random.Random, references: lab.References, machines: hurt_jobs.Machines
) -> Found:
    """One round through Ray Train."""
    setup = rng.choice([*lab.SETUPS])
    folder = storage.folder("runs", f"faults_round_{number}")
    shutil.rmtree(folder, ignore_errors=True)
    wanted = references.trace(setup, 2)
    step = rng.randrange(1, lab.STEPS - 2)
    recipe = references.config(setup, 2).model_dump(mode="json")
    hurts, hung, failed = machines.round(kind, folder.name, recipe, step, rng)
    return _judged(kind, number, hurts, hung, failed, folder, wanted, same=True)


def _judged(
    kind: str, number: int, hurts: int, hung: bool, failed: str, folder: Path, wanted: lab.Trace, *, same: bool
) -> Found:
    """A round's trace beside that of a run that nobody hurt."""
    found = trace.read(folder)
    lost, repeated = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    mine, theirs = lab.by_step(found), lab.by_step(wanted)
    for step in sorted({*mine, *theirs}):
        here, there = (Counter((step, each) for each in ids.get(step, ())) for ids in (mine, theirs))
        lost, repeated = lost + (there - here), repeated + (here - there)
    equal = found == wanted if same else _near(lab.losses(found), lab.losses(wanted))
    words = failed or ("" if equal else f"the traces part at step {lab.parted(found, wanted)}: {folder}")
    if not words and not hung and not lost and not repeated:
        shutil.rmtree(folder, ignore_errors=True)
    return Found(kind, number, 0, "", hurts, lost.total(), repeated.total(), equal and not failed, hung, 0.0, words)


def _near(found: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether losses differ by rounding alone."""
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(abs(a - b) <= _ROUNDING * max(abs(b), 0.1) for a, b in pairs)


def _tear(checkpoints: Path, rng: random.Random) -> None:
    """Cuts a file of the newest checkpoint, or takes away its marker, if there is one."""
    whole = sorted(checkpoints.glob("step_*"))
    if whole:
        file = rng.choice(sorted(file for file in whole[-1].rglob("*") if file.is_file()))
        if rng.random() < 0.3:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: rng.randrange(max(1, file.stat().st_size))])


def figures(done: Sequence[Found]) -> list[Row]:
    """The figures of all rounds, and how many of each kind there were."""
    total, each = _tally(done), _tallies(done)
    goals = {"rounds": "rounds", "lost": "samples_lost", "repeated": "samples_repeated", "hung": "hangs"}
    rows = [
        Row(f"faults.{name}", total[key], "", "of all rounds", ">= 100" if key == "rounds" else "<= 0")
        for key, name in goals.items()
    ]
    differ = total["rounds"] - total["equal"]
    rows.append(Row("faults.trace_mismatches", differ, "", "of all rounds", "<= 0"))
    for kind, found in each.items():
        told = "{}: rounds; hurt {hurt}, nothing lost or repeated {whole}, equal {equal}".format(kind, **found)
        rows.append(Row(f"faults.{re.sub(r'[^a-z0-9]+', '_', kind.lower())}", found["rounds"], "", told))
    return rows


def shown(done: Sequence[Found]) -> str:
    """The table of kinds."""
    heads = ("rounds", "hurt", "lost", "repeated", "equal", "hung", "seconds")
    lines = [f"{'fault':40s}" + "".join(f"{head:>10s}" for head in heads)]
    for kind, found in _tallies(done).items():
        cells = [f"{found[head]:10d}" for head in heads[:-1]] + [f"{found['seconds'] / found['rounds']:10.1f}"]
        lines.append(f"{kind:40s}" + "".join(cells))
    return "\n".join(lines) + "\n"


def _tallies(done: Sequence[Found]) -> dict[str, dict[str, Any]]:
    """`_tally` of each kind."""
    kinds = dict.fromkeys(each.kind for each in done)
    return {kind: _tally([each for each in done if each.kind == kind]) for kind in kinds}


def _tally(rounds: Sequence[Found]) -> dict[str, Any]:
    """What came of some rounds, added up."""
    return {
        "rounds": len(rounds),
        "hurt": sum(each.hurts > 0 for each in rounds),
        "lost": sum(each.lost for each in rounds),
        "repeated": sum(each.repeated for each in rounds),
        "whole": sum(not each.lost and not each.repeated for each in rounds),
        "equal": sum(each.equal for each in rounds),
        "hung": sum(each.hung for each in rounds),
        "seconds": sum(each.seconds for each in rounds),
    }


if __name__ == "__main__":
    sys.exit(main())
