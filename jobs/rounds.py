"""A round of refitting, before its training: what feedback it learns from, what it replays, the data set of both."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cleaning, crossfit, replay
from jobs.cleaning import Aside, Offer
from jobs.scrubbing import Scrub
from jobs.sources import GoodRow
from jobs.sources.tally import Tally
from mmagent import config as configs
from mmagent import feedback, inheritance, storage
from mmagent.bundle import Bundle
from mmagent.config import Config
from mmagent.record import SCHEMA_VERSION, Record
from mmagent.shards import FORMAT_VERSION, INFO_FILE, SPLITS, Dataset, ShardWriter
from mmagent.targets import TaskInfo

FILE = "round.json"
_SHARES = {"test": 0.15, "validation": 0.05}  # of new questions, by their digest
_FEWEST_CUT = 20  # new rows, below which all are learned from
_VALIDATED = 512  # replayed rows at most
_LEAST_REPLAYED = 64  # in an epoch of training
_REPLAYED_ROWS = 50_000  # in all, beyond which epochs have the same
_TURN = 1_000_003  # between the seeds of turns
_CROSSFIT = 0.5  # of the epochs


@dataclass(frozen=True, slots=True)
class Settings:
    """What a round was asked for."""

    channel: str
    asked: tuple[str, ...]  # all of it, to tell one round from another
    replay: float  # rows for each new one
    grow: bool
    trusted: tuple[str, ...]  # keys
    scrub: Scrub | None = None  # takes personal data out of a text


def prepared(
    found: Bundle, config: Config, settings: Settings, place: Path, name: str
) -> dict[str, Any] | None:  # fmt: skip
    """Makes a round's data set unless it is there; what became of the feedback, or none where nothing is new.

    Args:
        found: the channel's bundle.
        config: of the refit.
        place, name: the round's folder, and its data set's name.
    """
    folder = storage.folder("data", name)
    if (place / FILE).is_file() and (folder / INFO_FILE).is_file():
        told: dict[str, Any] = json.loads((place / FILE).read_text())
        return told
    log = feedback.read(feedback.folder())
    used = replay.feedback_used(found)
    fresh = [each for each in log.said if each.id not in used and each.answered.get("channel") == settings.channel]
    made, aside = cleaning.offers(fresh, settings.scrub)
    kept, more = cleaning.by_rule(made, found.tasks, grow=settings.grow, trusted=settings.trusted)
    aside += more
    bases, gone = replay.sources(found)
    memory = replay.memory(found) if gone or not bases else []
    if gone:
        print(f"gone: the data of {', '.join(gone)}; replayed is what is left, and {len(memory)} rows of the bundle")
    parts = _parted(kept)
    wanted = max(_LEAST_REPLAYED, round(settings.replay * len(parts["train"])))
    assert config.train.epochs != "auto"
    turns = max(1, min(int(config.train.epochs), _REPLAYED_ROWS // wanted))
    replayed, again = _replayed(bases, memory, wanted, turns, config.seed)
    parts, suspicious, crossfit_s = _unsuspected(settings, found, config, parts)
    aside += suspicious
    if not (parts["validation"] or replayed["validation"]):  # nothing else is left to validate with
        parts["validation"], parts["train"] = parts["train"][::10], [e for n, e in enumerate(parts["train"]) if n % 10]
    if not parts["train"]:
        print(f"nothing new for {settings.channel}: {_told_aside(len(fresh), aside, log.torn)}")
        return None
    told = {
        "state": "begun", "bundle": str(found.path), "channel": settings.channel, "asked": list(settings.asked),
        "created_ms": int(time.time() * 1000), "crossfit_s": crossfit_s, "said": len(fresh), "torn": log.torn,
        **{split: len(each) for split, each in parts.items()},
        "replayed": len(again[0]), "turns": len(again), "aside": dict(Counter(each.reason for each in aside)),
    }  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(each.to_dict(), ensure_ascii=False) + "\n" for each in aside)
    storage.publish(place / "aside.jsonl", "".join(lines))
    whole = {split: [*cleaning.records(parts[split]), *replayed.get(split, ())] for split in SPLITS}
    ids = [each.said.id for part in parts.values() for each in part] + [each.id for each in aside if each.final]
    recipe = {"bases": [each.name for each in bases] + gone, "feedback": ids}
    _write(folder, whole, again, found, recipe, config.seed)
    storage.publish_json(place / FILE, told)
    print(
        f"round {place.name} of {settings.channel}: {told['train']} rows to learn from, {told['validation']} to "
        f"validate with, {told['test']} to test with, {told['replayed']} replayed"
        f"{f', others in each of {turns} epochs' if (turns := told['turns']) > 1 else ''}; "
        f"{_told_aside(len(fresh), aside, log.torn)}"
    )
    return told


def _told_aside(count: int, aside: Sequence[Aside], torn: int) -> str:
    reasons = Counter(each.reason for each in aside)
    words = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    lines = f", {torn} lines that cannot be read" if torn else ""
    return f"{count} pieces of feedback, {len(aside)} set aside{f' ({words})' if words else ''}{lines}"


def _parted(kept: Sequence[Offer]) -> dict[str, list[Offer]]:
    """New rows by split; a question's digest decides, so that it stays where it is."""
    out: dict[str, list[Offer]] = {"train": [], "validation": [], "test": []}
    for each in kept:
        place = int.from_bytes(hashlib.blake2b(each.question, digest_size=8).digest()) / 2**64
        split = "train"
        for name, share in _SHARES.items():
            if len(kept) >= _FEWEST_CUT and place < share:
                split = name
                break
            place -= share
        out[split].append(each)
    return out


def _replayed(
    bases: Sequence[Dataset], memory: Sequence[Record], count: int, turns: int, seed: int
) -> tuple[dict[str, list[Record]], list[list[Record]]]:
    """What was learned before, to validate and to test with, and to learn from: so many rows for each of so many
    epochs, others in each as far as there are others. Of the shards; where some are gone also of the bundle's memory,
    a quarter of which validates."""
    held = set(np.random.default_rng(seed).permutation(len(memory))[: len(memory) // 4].tolist())
    kept = [each for index, each in enumerate(memory) if index not in held]
    parts = {
        "validation": [*(memory[index] for index in sorted(held)), *replay.draw(bases, "validation", _VALIDATED, seed)],
        "test": replay.draw(bases, "test", 10**9, seed),
    }
    drawn = replay.draws(bases, "train", max(0, count - len(kept)), [seed + _TURN * turn for turn in range(turns)])
    if all({each.id for each in turn} == {each.id for each in drawn[0]} for turn in drawn):
        drawn = drawn[:1]  # there are no others
    again = [replay.again([*kept, *turn], "train") for turn in drawn]
    return {split: replay.again(records, split) for split, records in parts.items()}, again


def _unsuspected(
    settings: Settings, found: Bundle, config: Config, parts: dict[str, list[Offer]]
) -> tuple[dict[str, list[Offer]], list[Aside], float]:
    """The rows of keys that are not suspicious; those of keys that are; and how many seconds of steps that took."""
    given = [each for part in parts.values() for each in part if each.said.key not in settings.trusted]
    keys = Counter(each.said.key for each in given)
    if sum(count >= cleaning.JUDGED for count in keys.values()) < 2:
        return parts, [], 0.0
    print(f"asking of {len(given)} corrections by {len(keys)} keys whether the others' contradict them", flush=True)
    infos = inheritance.described(_infos(cleaning.records(given), found), found)
    assert config.train.epochs != "auto"
    short = configs.override(config, {"train.epochs": config.train.epochs * _CROSSFIT, "start.distil": 0.0})
    wrong, took_s = crossfit.contradicted(inheritance.settle(short), infos, given)
    suspects = cleaning.suspects(crossfit.by_key(given, wrong))
    for key, words in suspects.items():
        print(f"suspicious: {key}: {words}", flush=True)
    out: dict[str, list[Offer]] = {}
    aside: list[Aside] = []
    for split, part in parts.items():
        out[split], more = cleaning.without(part, wrong, suspects)
        aside += more
    return out, aside, round(took_s, 1)


def _infos(records: Sequence[Record], found: Bundle) -> dict[str, TaskInfo]:
    tally = Tally()
    for number, record in enumerate(records, 1):
        tally.add(GoodRow("feedback", number, record))
    made = {name: each.info(name, {"train": each.rows}) for name, each in tally.tasks.items()}
    return made or dict(found.tasks)


def _write(
    folder: Path, rows: Mapping[str, Sequence[Record]], again: Sequence[Sequence[Record]], found: Bundle,
    recipe: Mapping[str, Any], seed: int,
) -> None:  # fmt: skip
    """The data set of a round; appears whole or not at all. Of `again` each epoch of training has one part."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    splits: dict[str, Any] = {}
    tallies: dict[str, Tally] = {}
    for split, records in rows.items():
        tallies[split] = Tally()
        with ShardWriter(draft, split) as writer:
            for turn, part in enumerate([records, *(again if split == "train" else ())], -1):
                for number, index in enumerate(np.random.default_rng([seed, len(part)]).permutation(len(part)), 1):
                    record = replace(part[index], split=split)
                    tallies[split].add(GoodRow("feedback", number, record))
                    writer.add(record)
                writer.cut(turn if turn >= 0 else None)
            splits[split] = tallies[split].to_dict() | {"shards": writer.close()}
    counted = {split: tally.tasks for split, tally in tallies.items()}
    infos = {
        name: each.info(name, {split: found[name].rows if name in found else 0 for split, found in counted.items()})
        for name, each in tallies["train"].tasks.items()
    }
    tasks = inheritance.described(infos, found)
    info = {
        "format_version": FORMAT_VERSION, "schema_version": SCHEMA_VERSION, "name": folder.name, "source": "feedback",
        "created_ms": int(time.time() * 1000), "seed": seed, "task": found.task,
        "tasks": {name: tasks[name].to_dict() for name in infos}, "splits": splits, "quarantine": {"rows": 0},
        "recipe": dict(recipe),
    }  # fmt: skip
    storage.publish_json(draft / INFO_FILE, info)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft.rename(folder)
