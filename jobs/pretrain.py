"""Teaches a language model, or towers beside it, without labels; leaves a backbone folder to start training from.

    python -m jobs.pretrain --config jobs/recipes/pretrain.yaml --name words --data shop
    python -m jobs.pretrain --config jobs/recipes/pretrain.yaml --name words --source text:manuals.txt
    python -m jobs.pretrain --config jobs/recipes/pretrain.yaml --name words --source jsonl:mail.jsonl --map text=body
    python -m jobs.train --config RECIPE --name shop data.name=shop model.backbone=runs/words/backbone

    python -m jobs.pretrain --config jobs/recipes/small.yaml --name seen --data captions pretrain.objective=align
    python -m jobs.train --config RECIPE --name shop data.name=shop model.image.start=runs/seen/towers/image

On plain text an encoder learns hidden words, a decoder the next one (`pretrain.objective`); on pairs of a picture or
sound and its words (align), towers learn the language model's states. The rows of --data (its training and validation
splits; labels are not read) or of --source (text:FILE, jsonl:FILE, csv:FILE, ... as of `jobs.prepare`) become shards in
ROOT/runs/NAME/corpus; Ray Data streams them into DeepSpeed ZeRO workers under Ray Train, as in `jobs.train`. The run's
folder ends with backbone/ (as Transformers saves it, with its tokenizer, and pretrained.json) and for pairs towers/.
The same --name given again goes on where the last checkpoint stands; Ctrl-C saves one at the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import cluster, track, watch
from jobs.lock import locked
from jobs.sources import Source, SourceError
from jobs.sources.choose import choose
from jobs.train import user_errors
from mmagent import config as configs
from mmagent import shards, storage
from mmagent.arguments import Parser, mapping
from mmagent.config import Config, ConfigError
from mmagent.shards import Dataset

if TYPE_CHECKING:  # it brings Ray, which reads its environment when it is imported
    from jobs.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return pretrain(args)
    except user_errors(SourceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return watch.EXIT_STOPPED


def pretrain(args: argparse.Namespace) -> int:
    """Makes the corpus, trains, leaves the folders; the exit status."""
    config = configs.load(args.config, [*args.overrides, f"data.name={args.data or args.name}"])
    folder = storage.folder("runs", args.name)
    track.check(config.track)
    origin = _origin(args)
    cluster.connect()
    from jobs import room

    room.check(config)
    with locked(folder):
        work = prepare(config, folder, origin, args.data or args.source)
        watch.tell(work)
        with track.following(config.track, folder) as end:
            if not work.exported and not watch.fit(work.fit, work.stop, folder, work.config.train.alarm_minutes):
                end.status = track.STOPPED
                print(f"stopped at step {work.resumed_step()}; the same command goes on from there")
                return watch.EXIT_STOPPED
        _tell_end(work, config)
    return 0


def prepare(config: Config, folder: Path, origin: Dataset | Source, name: str) -> Run:
    """Checks all that can be checked before a worker starts, and writes the run's config and its corpus.

    Args:
        origin, name: what is learned from, and how it is called.

    Raises:
        BackboneError: a checkpoint that cannot be used.
        RunError: a config that teaches nothing, a folder that holds another run, or nothing to learn from.
    """
    from jobs import run
    from jobs.alignment import Aligned
    from jobs.language import SEAL, Language
    from jobs.loop import Plan
    from mmagent import defaults, text, towers

    if not config.train.micro_batch:
        raise run.RunError("train.micro_batch=auto is found by jobs.train; without labels give a number, such as 32")
    aligned = config.pretrain.objective == "align"
    config = defaults.settle_unlabelled(run.keep_batch(config, folder), aligned=aligned)
    text.check(config.model.backbone, config.data.max_text_tokens)
    towers.check(config.model)
    parts = _check_model(config, aligned=aligned)
    run.hold(config, folder)
    dataset = _corpus(config, folder, origin, name, aligned=aligned)
    order = run.training_order(dataset, config)
    steps = run.total_steps(order, config)
    plan = Plan(
        learner=Aligned if aligned else Language,
        root=storage.variables(),
        config=config,
        tasks={},
        label_weights={},
        folder=folder,
        name=folder.name,
        bundle=folder / "backbone",
        seal=SEAL,
        data=name,
        order=order,
        total_steps=min(steps, config.train.max_steps or steps),
        max_bad_rows=int(config.data.max_bad_share * max(steps * config.global_batch, order.rows)),
        task="",
        golden_source=(),
        parts=parts,
    )
    return run.Run(folder, config, dataset, plan)


def _origin(args: argparse.Namespace) -> Dataset | Source:
    if args.data:
        if args.map:
            raise ConfigError("--map is for a source (text:FILE, jsonl:FILE, ...); a data set has its fields")
        return Dataset.open(shards.find(args.data))
    return choose(args.source, columns=args.map, asked="generate")


def _check_model(config: Config, *, aligned: bool) -> tuple[Any, ...]:
    """Builds the model without its weights: a config that makes none, or teaches nothing, is told by one process."""
    import torch

    from jobs import alignment, language
    from jobs.run import RunError
    from mmagent import freeze, text

    strategy = config.freeze.strategy
    if not aligned and not freeze.needs_backbone(strategy):
        raise RunError(
            f"freeze.strategy={strategy} trains nothing of the language model, all there is to pretrain on text: give "
            "freeze.strategy=all, top:K, bias, lora:R or gradual"
        )
    try:
        with torch.device("meta"):
            if not aligned:
                return freeze.table(language.model_of(config, weights=False))
            encoder = text.load_encoder(config.model.backbone, weights=False, dropout=config.model.backbone_dropout)
            parts = freeze.table(alignment.model_of(config, encoder, weights=False), encoder)
    except ValueError as error:
        raise RunError(str(error)) from error
    if not sum(part.trained for part in parts):
        raise RunError(
            f"freeze.strategy={strategy} trains nothing here: give connector, image_tower, audio_tower or all"
        )
    return parts


def _corpus(config: Config, folder: Path, origin: Dataset | Source, name: str, *, aligned: bool) -> Dataset:
    from jobs import corpus
    from jobs.run import RunError
    from mmagent import text

    kinds = [kind for kind in ("image", "audio") if getattr(config.model, kind) is not None] if aligned else []
    mark = {
        "of": _fingerprint(origin), "kinds": kinds, "seed": config.seed, "share": config.pretrain.validation_share,
        **({} if aligned else {"backbone": config.model.backbone, "max_text_tokens": config.data.max_text_tokens}),
    }  # fmt: skip
    found = corpus.records(origin, media=aligned, workers=os.cpu_count() or 1)
    if aligned:
        has = (
            bool(origin.rows(corpus.VALIDATION)) if isinstance(origin, Dataset) else corpus.VALIDATION in origin.splits
        )
        made: Any = corpus.pairs(found, kinds, cut=not has)
    else:
        made = corpus.passages(found, text.load_tokenizer(config.model.backbone), config.data.max_text_tokens)
    try:
        return corpus.write(
            made, folder / "corpus", name=name, share=config.pretrain.validation_share, seed=config.seed, mark=mark
        )
    except corpus.CorpusError as error:
        raise RunError(str(error)) from error


def _fingerprint(origin: Dataset | Source) -> Any:
    if isinstance(origin, Dataset):
        return {"data": storage.digest(origin.path / shards.INFO_FILE)}
    return origin.recipe()


def _tell_end(work: Run, config: Config) -> None:
    assert work.plan.bundle is not None
    made = json.loads((work.plan.bundle / work.plan.seal).read_text())
    found = ", ".join(f"{key} {value:.4g}" for key, value in made["validation"].items())
    print(f"validation at step {made['checkpoint']['step']}: {found}")
    print(f"backbone  {work.plan.bundle}: model.backbone=runs/{work.name}/backbone")
    for kind in ("image", "audio") if made["objective"] == "align" else ():
        if getattr(config.model, kind) is not None:
            print(f"tower     {work.folder / 'towers' / kind}: model.{kind}.start=runs/{work.name}/towers/{kind}")


def _parser() -> Parser:
    parser = Parser("jobs.pretrain", __doc__, keys=configs.keys())
    parser.add_argument("--config", required=True, type=Path, help="the recipe: a YAML file of sections")
    parser.add_argument("--name", required=True, help="the run's name; given again, the run goes on")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--data", help="a data set: a name under data/, or a folder")
    place.add_argument("--source", help="rows that need no label: text:FILE, jsonl:FILE, csv:FILE, parquet:PATH, ...")
    parser.add_argument("--map", type=mapping, default={}, help="FIELD=COLUMN,...: which columns of a source to read")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what the recipe says")
    return parser


if __name__ == "__main__":
    sys.exit(main())
