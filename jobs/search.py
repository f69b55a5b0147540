"""Searches learning rate, dropout, freezing strategy, or any other key of a recipe, and exports the winner.

    python -m jobs.search --config RECIPE.yaml --space SPACE.yaml --name NAME
    ray job submit --working-dir . -- python -m jobs.search --config RECIPE.yaml --space SPACE.yaml --name NAME

A trial is a training under Ray Train with some keys of the recipe replaced; Ray Tune draws them from the space, and
ASHA stops those that fall behind. The recipe's own values are always the first trial. What is written, in
ROOT/search/NAME: trials.json, winner.json, trials/ID (a run folder each) and the winner's bundle/.

A space is a YAML file:

    trials: 4                       # the recipe's own values among them
    grace_steps: 10                 # steps before a trial may be stopped
    set: {data.share: 0.1}          # for every trial
    space:
      optim.lr: {loguniform: [3.0e-4, 5.0e-3]}
      model.dropout: {uniform: [0.0, 0.3]}
      freeze.strategy: {choice: [connector, "top:2", all]}
"""

from __future__ import annotations

import difflib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs import cluster
from jobs.cluster import ClusterError
from jobs.lock import LockError, locked
from mmagent import config as configs
from mmagent import storage
from mmagent.arguments import Parser
from mmagent.config import Config, ConfigError
from mmagent.shards import Dataset, DatasetError
from mmagent.text import BackboneError

if TYPE_CHECKING:
    from jobs.trials import Trial

_LEFT_TIMEOUT_S = 30.0


class Space(BaseModel):
    """The file of a search space."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(8, gt=0, description="how many, the recipe's own values among them")
    grace_steps: int = Field(10, gt=0, description="optimizer steps before a trial may be stopped")
    concurrent: int | None = Field(None, gt=0, description="trials at a time; none: as many as the cluster's CPUs hold")
    set: dict[str, Any] = Field({}, description="dotted keys replaced in every trial")
    space: dict[str, Any] = Field(description="dotted keys to distributions")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.search", __doc__, keys=configs.keys())
    parser.add_argument("--config", required=True, type=Path, help="the recipe")
    parser.add_argument("--space", required=True, type=Path, help="the search space")
    parser.add_argument("--name", required=True, help="the search's name")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what the recipe says")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job ends as Ctrl-C does
    try:
        return search(args.config, args.space, args.name, args.overrides)
    except (ConfigError, DatasetError, BackboneError, ClusterError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing is exported; the same command searches anew", file=sys.stderr)
        return 130


def search(recipe: Path, space_file: Path, name: str, overrides: Sequence[str]) -> int:
    """Runs the search and exports the winner; the exit status."""
    config, space = configs.load(recipe, overrides), load_space(space_file)
    base = configs.override(config, space.set)
    first = {key: configs.value(base, key) for key in space.space}
    folder = storage.folder("search", name)
    Dataset.open(storage.folder("data", config.data.name))
    cluster.connect()
    from jobs import run, trials

    try:
        distributions = {key: trials.distribution(key, spec) for key, spec in space.space.items()}
        with locked(folder):
            return _search(base, space, first, distributions, folder)
    except (trials.SpaceError, run.RunError, LockError) as error:
        raise ConfigError(str(error)) from error


def _search(base: Config, space: Space, first: dict[str, Any], distributions: dict[str, Any], folder: Path) -> int:
    import ray

    from jobs import run, trials, workers

    began = time.time()
    before = _living(ray)  # the export below has its own, which end with this process
    plan = run.prepare(base, folder / "trials" / "check").plan  # what is wrong with the recipe, said once
    print(f"search {folder.name}: {space.trials} trials of up to {plan.total_steps} steps", flush=True)

    def work(sample: dict[str, Any], trial_id: str, callbacks: list[Any]) -> None:
        trial = run.prepare(configs.override(base, sample), folder / "trials" / trial_id, export=False)
        trial.fit(callbacks)

    done = trials.run(
        work,
        distributions,
        first=first,
        trials=space.trials,
        concurrent=space.concurrent or workers.room(base),
        max_steps=plan.total_steps,
        grace_steps=space.grace_steps,
        seed=base.seed,
        folder=folder,
        tell=lambda line: print(f"[{_clock(time.time() - began)}] {line}", flush=True),
    )
    workers.release()
    status = _count_left(ray, before)
    storage.publish_json(folder / "trials.json", [_as_json(trial) for trial in done])
    print(_table(done))
    scored = [trial for trial in done if trial.score is not None]
    if not scored:
        raise ConfigError(f"no trial came to its first validation; their errors are in {folder / 'trials.json'}")
    winner = max(scored, key=lambda trial: (trial.score, -trial.step))
    config = configs.override(base, winner.sample)
    finished = run.prepare(config, folder / "trials" / winner.id, bundle=folder / "bundle", name=folder.name)
    finished.at_its_end().fit()
    note = {"trial": winner.id, "sample": dict(winner.sample), "score": winner.score, "bundle": str(folder / "bundle")}
    storage.publish_json(folder / "winner.json", note)
    print(f"winner  {winner.id}: accuracy {winner.score:.2%} on validation, {trials.short(winner.sample)}")
    print(f"bundle  {folder / 'bundle'}")
    return status


def load_space(file: Path) -> Space:
    """Reads a space.

    Raises:
        ConfigError: no such file, not YAML, or an unknown key, with the nearest right one.
    """
    try:
        space = Space.model_validate(yaml.safe_load(Path(file).read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read the search space {file}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the search space {file} is not YAML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"the search space {file}: {_explain(error.errors()[0])}") from error
    known = configs.keys()
    for key in (*space.set, *space.space):
        if key not in known:
            raise ConfigError(f"the search space {file}: {configs.unknown(key)}")
    return space


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Space.model_fields, n=1, cutoff=0.0)[0]
        return f"unknown key {key!r}: did you mean {near!r}? There are {', '.join(Space.model_fields)}"
    if item["type"] == "missing":
        example = "{optim.lr: {loguniform: [1.0e-4, 1.0e-2]}}"
        return f"{key} is missing: {Space.model_fields[key].description}, e.g. {example}"
    if not key:
        return f"it holds {type(item['input']).__name__}, but a map with trials and space is wanted (see --help)"
    return f"{key}: got {item['input']!r:.80}, but {item['msg']}"


def _table(done: list[Trial]) -> str:
    from jobs.trials import short

    lines = ["", f"{'trial':14s}{'accuracy':>10s}{'steps':>7s}  sample"]
    for trial in sorted(done, key=lambda trial: -(trial.score or 0.0)):
        score = f"{trial.score:.2%}" if trial.score is not None else "-"
        lines.append(f"{trial.id:14s}{score:>10s}{trial.step:>7d}  {short(trial.sample)}  {trial.error or ''}".rstrip())
    return "\n".join(lines) + "\n"


def _as_json(trial: Trial) -> dict[str, Any]:
    return {
        "id": trial.id, "sample": dict(trial.sample), "score": trial.score, "step": trial.step, "error": trial.error,
        "metrics": dict(trial.metrics),
    }  # fmt: skip


def _living(ray: Any) -> set[str]:
    """The actors of this job that live."""
    from ray.util.state import list_actors

    context = ray.get_runtime_context()
    mine = [("state", "=", "ALIVE"), ("job_id", "=", context.get_job_id())]
    return {actor.actor_id for actor in list_actors(context.gcs_address, filters=mine, limit=1000)}


def _count_left(ray: Any, before: set[str]) -> int:
    """Waits until the trials' actors are gone; the exit status says whether any is left."""
    deadline = time.monotonic() + _LEFT_TIMEOUT_S
    while (left := _living(ray) - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    if left:
        print(f"error: {len(left)} actors of the trials are still there: {sorted(left)[:3]}", file=sys.stderr)
        return 1
    return 0


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
