"""Fine-tunes a language model with image and audio towers on a data set, and exports a bundle.

    python -m jobs.train --config jobs/recipes/easy_vqa.yaml --name demo [key.path=value ...]
    ray job submit --working-dir . -- python -m jobs.train --config jobs/recipes/easy_vqa.yaml --name demo

Ray Data streams the shards of ROOT/data/NAME into DeepSpeed ZeRO workers under Ray Train. The run's folder is
ROOT/runs/NAME: config.yaml, metrics.jsonl, tb/ (TensorBoard), checkpoints/, and at the end bundle/, evaluation.json and
report.html. The same --name given again goes on where the last checkpoint stands. Ctrl-C (or SIGTERM) saves a
checkpoint at the next step and ends; a second one ends at once.

    python -m jobs.train --config RECIPE --name few data.labels_per_class=20
    python -m jobs.train --config RECIPE --name curve "data.labels_per_class=[5,10,50]" train.seeds=3

With a few labels of each class (see `jobs.draw`); with a list of numbers a learning curve (see `jobs.curve`): a run for
each number and seed, the mean and deviation over seeds as a table, curve.json and a chart in report.html. The bundle
is that of the largest number's first seed.

--dry-run measures a few real steps without Ray, and leaves nothing behind: it tells rows, tokens, time, memory and
disk of the whole run, and what would not fit; then its status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import cluster, track, watch
from jobs.cluster import ClusterError
from jobs.lock import LockError, locked
from mmagent import config as configs
from mmagent import storage
from mmagent.arguments import Parser
from mmagent.bundle import BundleError
from mmagent.config import ConfigError
from mmagent.predictions import EvaluationError
from mmagent.shards import Dataset, DatasetError
from mmagent.text import BackboneError


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.train", __doc__, keys=configs.keys(), epilog=_all_keys())
    parser.add_argument("--config", required=True, type=Path, help="the recipe: a YAML file of sections")
    parser.add_argument("--name", required=True, help="the run's name; given again, the run goes on")
    parser.add_argument("--no-evaluate", action="store_true", help="leave out the test split and the report")
    parser.add_argument("--dry-run", action="store_true", help="measure a few steps, forecast the run, leave nothing")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what the recipe says")
    args = parser.parse_args(argv)
    try:
        return train(args)
    except user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return watch.EXIT_STOPPED


def train(args: argparse.Namespace) -> int:
    """Trains, exports, evaluates; the exit status."""
    config = configs.load(args.config, args.overrides)
    track.check(config.track)
    folder = storage.folder("runs", args.name)
    Dataset.open(storage.folder("data", config.data.name))
    if args.dry_run:
        return watch.rehearse(config, args.name)
    # A mistake in the recipe is told before Ray and torch are loaded, and Ray reads its environment when it is.
    cluster.connect()
    from jobs import room

    room.check(config)
    with locked(folder):
        if isinstance(config.data.labels_per_class, tuple):
            from jobs import curve

            done = curve.complete(config, folder, test=not args.no_evaluate)
        else:
            done = watch.complete(config, folder, test=not args.no_evaluate)
    return 0 if done else watch.EXIT_STOPPED


def _all_keys() -> str:
    lines = [f"  {key:28s}{text}" for key, text in configs.keys().items()]
    return "keys of a recipe, which key.path=value overrides:\n" + "\n".join(lines)


def user_errors(*more: type[BaseException]) -> tuple[type[BaseException], ...]:
    """What the user can mend: told in one message. Those of modules that load Ray are known once it is loaded."""
    known: list[type[BaseException]] = [
        *more, ConfigError, DatasetError, BackboneError, ClusterError, LockError, storage.StorageError,
    ]  # fmt: skip
    if "jobs.run" in sys.modules:
        from jobs.run import RunError
        from jobs.states import StatesError
        from jobs.workers import WorkersFailed

        known += [RunError, StatesError, WorkersFailed, BundleError, EvaluationError]
    if "jobs.rehearsal" in sys.modules:
        from jobs.ranks import RanksFailed
        from jobs.rehearsal import RehearsalError

        known += [RanksFailed, RehearsalError]
    return tuple(known)


if __name__ == "__main__":
    sys.exit(main())
