"""Refits a channel's bundle to what users said of its answers, without forgetting; and lets the gate judge the outcome.

    python -m jobs.refine --channel production                        # refit, and say whether the gate accepts it
    python -m jobs.refine --channel production --promote              # and move the channel, where it does
    python -m jobs.refine --channel production --promote --canary 0.1 # to a tenth of conversations first
    ray job submit --working-dir . -- python -m jobs.refine --channel production --promote [key.path=value ...]
    python -m jobs.refine --channel production --least 200 --drift 0.3 --promote    # by cron: where there is reason to

A round takes the feedback that no bundle of the channel's line has learned from yet, sets aside what is no training
row, contradicts itself or comes from a suspicious key (`jobs.cleaning`), and divides the rest by question into rows to
learn from, to validate with and to test with. The training begins with the bundle (`start.bundle`), on the new rows and
on replayed ones of what it learned from before (`jobs.replay`). What holds it near what it knew, says --hold: distil
draws answers to replayed rows to those that the bundle gave; l2_sp and ewc hold its weights; lora:R learns products of
small rank alone; none. --search N tries other learning rates around the recipe's own on the round's data, and takes
the one that is best on validation. The gate (`jobs.gate`) asks both bundles the fixed test set and the new questions,
and judges by --rules (jobs/recipes/gate.yaml).

ROOT/data/CHANNEL-rNNN is what was trained on, ROOT/runs/CHANNEL-rNNN (with --search ROOT/search/CHANNEL-rNNN) the run
with the candidate's bundle, ROOT/refine/CHANNEL/rNNN holds round.json, aside.jsonl (feedback that was set aside, and
why), gate.json and gate.html. A round that was stopped goes on with the same command. Its exit status is 3 where the
gate refuses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jobs import cluster, promote, scrubbing, track, watch
from jobs.train import user_errors
from mmagent import bundle as bundles
from mmagent import channels, feedback, gate, storage
from mmagent import config as configs
from mmagent.arguments import Parser
from mmagent.bundle import Bundle, BundleError
from mmagent.channels import ChannelError
from mmagent.config import Config, ConfigError
from mmagent.gate import Rules
from mmagent.predictions import EvaluationError
from mmagent.record import Record
from mmagent.shards import Dataset
from mmagent.succession import MisfitError

RULES = cluster.CHECKOUT / "jobs/recipes/gate.yaml"
EXIT_REFUSED = 3
_EPOCHS = 6
_BATCH = 32  # at most, of a step: few rows want many steps
_DISTIL, _STRENGTH = 1.0, 0.01


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return refine(args)
    except user_errors(ChannelError, EvaluationError, BundleError, MisfitError, promote.PromoteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return watch.EXIT_STOPPED


def refine(args: argparse.Namespace) -> int:
    """A round; the exit status."""
    rules = gate.load(args.rules)
    if args.search < 0 or args.search == 1:
        raise ConfigError(f"--search is {args.search}, but 2 trials or more are wanted: the recipe's own rate is one")
    scrub = scrubbing.load(args.scrub) if args.scrub else None
    if args.least or args.drift is not None:
        words = _waits(args)
        if words:
            print(f"{args.channel} is left as it is: {words}")
            return 0
    found = bundles.load(channels.read(args.channel).bundle)
    config = _config(found, args, f"{args.channel}-r000")  # a mistake in it is told before Ray is looked for
    track.check(config.track)
    cluster.connect()
    from jobs import forget, room, rounds
    from jobs.lock import locked
    from jobs.rounds import Settings

    room.check(config)
    with locked(storage.folder("refine", args.channel)):
        forget.forget()
        place = _round(args, found)
        name = f"{args.channel}-{place.name}"
        config = configs.override(config, {"data.name": name})
        settings = Settings(args.channel, tuple(_asked(args)), args.replay, args.grow, args.trusted, scrub)
        told = rounds.prepared(found, config, settings, place, name)
        if told is None:
            return 0
        config = _paced(config, told["train"] + told["replayed"], args)
        home = _trained(config, name, args.search)
        if home is None:
            return watch.EXIT_STOPPED
        candidate = bundles.load(home / "bundle")
        verdict = _judged(found, candidate, rules, place, home, told, config)
        storage.publish_json(place / rounds.FILE, {**told, "state": "accepted" if verdict["accepted"] else "refused"})
        print("\n".join(gate.told(verdict)))
        print(f"report  {place / 'gate.html'}")
        if not verdict["accepted"]:
            print(f"refused: {candidate.path} stays where it is, and {found.name} answers on", file=sys.stderr)
            return EXIT_REFUSED
        return _promoted(args, candidate)


def _trained(config: Config, name: str, trials: int) -> Path | None:
    """The folder of the run, or of the search, that made the candidate; none: it was stopped."""
    from jobs import rates

    if trials:
        return storage.folder("search", name) if rates.searched(config, name, trials) else None
    return storage.folder("runs", name) if watch.complete(config, storage.folder("runs", name), test=False) else None


def _waits(args: argparse.Namespace) -> str:
    """Why nothing is done yet, where --least or --drift say when; empty where one of them is reached."""
    from jobs import replay

    told = []
    if args.least:
        used = replay.feedback_used(bundles.load(channels.read(args.channel).bundle))
        said = feedback.read(feedback.folder()).said
        count = sum(each.id not in used and each.answered.get("channel") == args.channel for each in said)
        if count >= args.least:
            return ""
        told.append(f"{count} new pieces of feedback of --least {args.least}")
    if args.drift is not None:
        url = promote.service_of(args.channel)
        found = promote.call(url, "GET", "/admin/status")["drift"] if url else {}
        most = max((value for kind in found.values() for value in kind.values()), default=0.0)
        if most >= args.drift:
            return ""
        told.append(f"drift {most:.3g} of --drift {args.drift:g}" if url else "no service tells of drift")
    return ", ".join(told)


# -- before the training -----------------------------------------------------------------------------------------------


def _config(found: Bundle, args: argparse.Namespace, name: str) -> Config:
    """The bundle's own recipe, begun with the bundle."""
    base = found.config
    changed: dict[str, Any] = {
        "data.name": name, "data.share": 1.0, "data.labels_per_class": None,
        "start.bundle": storage.portable(found.path), "start.hold": "none", "start.distil": 0.0,
        "train.epochs": _EPOCHS,
        "train.global_batch": min(base.global_batch, _BATCH),
        "train.max_steps": None, "train.min_steps": 0, "train.patience": 0, "train.eval_every_epochs": None,
    }  # fmt: skip
    if args.hold == "distil":
        changed["start.distil"] = _DISTIL
    elif args.hold in ("l2_sp", "ewc"):
        changed |= {"start.hold": args.hold, "start.strength": _STRENGTH}
    elif args.hold.startswith("lora:"):
        changed["freeze.strategy"] = args.hold
    elif args.hold != "none":
        raise ConfigError(f"--hold is {args.hold!r}, but distil, l2_sp, ewc, lora:R or none is wanted")
    made = configs.override(base, changed).model_dump(mode="json")
    return configs.resolve(made, dict(configs.split(item) for item in args.overrides))


def _paced(config: Config, rows: int, args: argparse.Namespace) -> Config:
    """Validated four times in epochs of so many rows, unless somebody says otherwise."""
    if any(item.startswith("train.eval_every_steps") for item in args.overrides):
        return config
    assert config.train.epochs != "auto"
    steps = max(1, round(config.train.epochs * rows / config.global_batch))
    return configs.override(config, {"train.eval_every_steps": max(1, steps // 4)})


def _round(args: argparse.Namespace, found: Bundle) -> Path:
    """The folder of the round to go on with: one that was stopped, of the same bundle and settings; else a new one."""
    from jobs import rounds

    root = storage.folder("refine", args.channel)
    last = max((each for each in root.glob("r*") if (each / rounds.FILE).is_file()), default=None)
    if last is not None:
        told = json.loads((last / rounds.FILE).read_text())
        if told["state"] == "begun" and told["bundle"] == str(found.path) and told["asked"] == _asked(args):
            print(f"goes on with {last.name} of {args.channel}")
            return last
    number = int(last.name[1:]) + 1 if last is not None else 1
    return root / f"r{number:03d}"


def _asked(args: argparse.Namespace) -> list[str]:
    searched = [f"--search {args.search}"] if args.search else []
    return [
        args.hold, f"{args.replay:g}", str(args.grow), args.scrub or "", *searched, *sorted(args.trusted),
        *args.overrides,
    ]  # fmt: skip


# -- after it ----------------------------------------------------------------------------------------------------------


def _judged(
    found: Bundle, candidate: Bundle, rules: Rules, place: Path, home: Path, told: Mapping[str, Any], config: Config
) -> dict[str, Any]:
    from jobs import answers, page, replay
    from jobs import gate as gates
    from mmagent import evaluation
    from mmagent.tasks import make_all

    if (place / "gate.json").is_file() and (place / "gate.html").is_file():
        verdict: dict[str, Any] = json.loads((place / "gate.json").read_text())
        return verdict
    dataset = Dataset.open(storage.folder("data", home.name))
    trained = {answers.question(record) for record in _records(dataset, "train")}
    sets: dict[str, list[Record]] = {gate.FIXED: [], gate.EARLIER: [], gate.NEW: []}
    for record in _records(dataset, "test"):
        # What users corrected may be a question of the test set: it is no test any more.
        if answers.question(record) not in trained:
            replayed = record.meta.get("source") == replay.REPLAY
            earlier = replayed and record.origin == feedback.SOURCE
            sets[gate.EARLIER if earlier else gate.FIXED if replayed else gate.NEW].append(record)
    fixed = sets[gate.FIXED]
    if len(fixed) > rules.test_rows:
        drawn = np.random.default_rng(config.seed).permutation(len(fixed))[: rules.test_rows]
        sets[gate.FIXED] = [fixed[index] for index in sorted(drawn)]
    kept = ("said", "train", "validation", "test", "replayed", "aside")
    verdict, table = gates.judge(
        found, candidate, sets, rules, place, feedback={key: told[key] for key in kept},
        workers=config.cluster.workers, threads=config.cluster.threads, seed=config.seed,
    )  # fmt: skip
    if table.num_rows:
        result = evaluation.evaluate(
            table.drop_columns(["set"]), make_all(candidate.tasks), candidate.task, bundle=candidate.name,
            data=dataset.name, split="test", seed=config.seed,
        ) | verdict.get("audit", {})  # fmt: skip
        storage.publish_json(home / "evaluation.json", result)
        page.describe(candidate.path, dataset, result)
    return verdict


def _records(dataset: Dataset, split: str) -> list[Record]:
    return [Record.from_row(row) for part in dataset.read(split) for row in part.to_pylist()]


def _promoted(args: argparse.Namespace, candidate: Bundle) -> int:
    command = ["--bundle", str(candidate.path), "--channel", args.channel]
    if args.canary is not None:
        command += ["--canary", f"{args.canary:g}"]
    if args.promote or args.canary is not None:
        return promote.main(command)
    print(f"accepted; python -m jobs.promote {' '.join(command)}   moves the channel")
    return 0


def _parser() -> Parser:
    parser = Parser("jobs.refine", __doc__, keys=configs.keys(), epilog=_rule_keys())
    parser.add_argument("--channel", default="production", help="whose bundle is refitted (default %(default)s)")
    parser.add_argument("--hold", default="distil", help="distil, l2_sp, ewc, lora:R or none (default %(default)s)")
    parser.add_argument(
        "--replay",
        type=float,
        default=2.0,
        help="replayed rows for each new one, others in each epoch (default %(default)s)",
    )
    parser.add_argument("--grow", action="store_true", help="learn labels that the bundle does not have")
    parser.add_argument(
        "--trusted", type=_names, default=(), metavar="KEY,KEY", help="keys whose word decides, and is not doubted"
    )
    parser.add_argument(
        "--search", type=int, default=0, metavar="N", help="search the learning rate in so many trials (jobs.search)"
    )
    parser.add_argument("--rules", type=Path, default=RULES, help="the gate's (default: jobs/recipes/gate.yaml)")
    parser.add_argument("--scrub", metavar="MODULE:FUNCTION", help="takes personal data out of texts")
    parser.add_argument("--least", type=int, default=0, metavar="N", help="do nothing before so much new feedback")
    parser.add_argument("--drift", type=float, metavar="X", help="nor before /admin/status tells so much drift")
    parser.add_argument("--promote", action="store_true", help="move the channel where the gate accepts")
    parser.add_argument("--canary", type=float, metavar="SHARE", help="to a share of conversations, in place of all")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what the recipe says")
    return parser


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _rule_keys() -> str:
    told = yaml.safe_dump(Rules().model_dump(mode="json"), sort_keys=False)
    lines = [f"  {name:16s}{field.description}" for name, field in Rules.model_fields.items()]
    return "keys of the gate's rules:\n" + "\n".join(lines) + f"\n\nas they are by default:\n\n{told}"


if __name__ == "__main__":
    sys.exit(main())
