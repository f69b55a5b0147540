"""What there is below the storage root: runs and searches with their best scores and what they took, channels, rounds
of refitting; and where an answer comes from. It also deletes old runs.

    python -m jobs.status                     # everything, the newest first; --json for a program
    python -m jobs.status --answer ans_01JDX3YQ2M8T5W6V7R9K0N1P4S
    python -m jobs.status --feedback fb_5f0c6e1d2a3b4c5d    # which bundles learned from it, and what they answered
    python -m jobs.status --prices prices.yaml              # what it cost: `cpu: 0.05`, `H100: 2.5` for an hour
    python -m jobs.status --quota-gb 50                     # which runs and searches would go, the oldest first
    python -m jobs.status --quota-gb 50 --delete            # they go; --delete NAME: one

A run is running while a process holds its name; done, when it has its bundle; stopped, when it was asked to end and
saved; else it failed. Hours are those of workers, by what they computed on (see `jobs.spending`). What a channel
serves or served before its last two changes stays, and so do what runs, what another run, round or channel began with,
and the newest search.

An answer's line goes from the bundle to its run, config, seed and checkpoint, to the data sets it learned from with the
hashes of their shards, and to the feedback among them. Traces are read from the service's store over its admin address
(an API key of the scope admin in MMAGENT_API_KEY), or found in the feedback that was given on them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs import promote, pruning, replay, spending
from jobs.lock import ended, held
from jobs.pruning import PruneError
from jobs.spending import lines
from mmagent import bundle as bundles
from mmagent import channels, feedback, storage
from mmagent.arguments import Parser
from mmagent.bundle import MANIFEST, BundleError
from mmagent.channels import ChannelError
from mmagent.config import ConfigError


class StatusError(RuntimeError):
    """What is asked for is not here; the message says where was looked."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.status", __doc__)
    parser.add_argument("--answer", metavar="ID", help="where this answer comes from")
    parser.add_argument("--feedback", metavar="ID", help="which bundles learned from this piece of feedback")
    parser.add_argument("--url", help="of the service; those that serve.start recorded, where not given")
    parser.add_argument("--prices", type=Path, metavar="FILE", help="YAML: the price of an hour by type of worker")
    parser.add_argument("--quota-gb", type=float, metavar="GB", help="what runs and searches may take, in 10^9 bytes")
    parser.add_argument("--delete", nargs="?", const="", metavar="NAME", help="delete one, or what --quota-gb shows")
    parser.add_argument("--json", action="store_true", help="for a program")
    args = parser.parse_args(argv)
    if args.delete == "" and args.quota_gb is None:
        parser.error("--delete wants the NAME of a run or search, or --quota-gb GB beside it")
    if args.delete and args.quota_gb is not None:
        parser.error("--delete NAME deletes one, --quota-gb GB --delete what is too much: give one of them")
    if args.quota_gb is not None and not args.quota_gb >= 0:
        parser.error(f"--quota-gb is {args.quota_gb:g}, but 0 or more is wanted")
    try:
        if args.delete is not None or args.quota_gb is not None:
            found: Any = pruned(args)
        elif args.answer:
            found = line_of(args.answer, args.url)
        elif args.feedback:
            found = learned_from(args.feedback)
        else:
            found = everything(spending.prices(args.prices) if args.prices else None)
    except (
        StatusError,
        PruneError,
        ConfigError,
        promote.PromoteError,
        BundleError,
        ChannelError,
        storage.StorageError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else "\n".join(_shown(found)))
    return 0


# -- where an answer comes from ----------------------------------------------------------------------------------------


def line_of(answer: str, url: str | None = None) -> dict[str, Any]:
    """An answer, its bundle, and all that this learned from.

    Raises:
        StatusError: there is no such answer, or its bundle is gone.
    """
    trace = _trace(answer, url)
    found = _bundle(str(trace["bundle"]))
    return {"answer": answer, "asked_ms": trace.get("created_ms"), "channel": trace.get("channel"), **_origin(found)}


def _origin(found: bundles.Bundle) -> dict[str, Any]:
    manifest = found.manifest
    there, gone = replay.sources(found)
    return {
        "bundle": {"name": found.name, "path": str(found.path), "created_ms": manifest.get("created_ms"),
                   "mmagent": manifest.get("mmagent")},
        "run": {"name": manifest.get("run"), "checkpoint": manifest.get("checkpoint"), "seed": found.config.seed,
                "config": str(found.path / "config.yaml"), "began_with": found.config.start.bundle},
        "data": [
            {"name": each.name, "source": each.info.get("source"), "feedback": len(_feedback_of(each)),
             "shards": {Path(file).relative_to(each.path).as_posix(): digest[:16]
                        for split in each.splits for file, digest in each.hashes(split).items()}}
            for each in there
        ],
        "gone": gone,
        "feedback": sorted(replay.feedback_used(found)),
    }  # fmt: skip


def _feedback_of(dataset: Any) -> list[str]:
    return list(dataset.info.get("recipe", {}).get("feedback", []))


def _trace(answer: str, url: str | None) -> Mapping[str, Any]:
    for each in feedback.read(feedback.folder()).said:
        if each.content.get("answer") == answer and each.answered:
            return each.answered
    urls = [url] if url else [found for found in map(promote.service_of, _channels()) if found]
    for place in urls:
        try:
            found: Mapping[str, Any] = promote.call(place, "GET", f"/v1/answers/{answer}")
            return found
        except promote.PromoteError as error:
            if url:
                raise StatusError(f"{place} does not know the answer {answer!r}: {error}") from error
    raise StatusError(f"no service that runs here, and no feedback, knows the answer {answer!r}; name one with --url")


def _bundle(name: str) -> bundles.Bundle:
    """By its name: of a run, or of any bundle that a channel had."""
    paths = [storage.resolve(line["bundle"]) for channel in _channels() for line in channels.read(channel).lines]
    for path in (*reversed(paths), *_bundle_folders()):
        if (path / MANIFEST).is_file() and json.loads((path / MANIFEST).read_text()).get("name") == name:
            return bundles.load(path)
    raise StatusError(f"the bundle {name!r} that gave it is not here any more")


def learned_from(id: str) -> dict[str, Any]:
    """The data sets that hold a piece of feedback, the bundles that learned from it, and answers they gave.

    Raises:
        StatusError: nobody gave it.
    """
    said = feedback.read(feedback.folder()).said
    if not any(each.id == id for each in said):
        raise StatusError(f"there is no feedback {id!r} in {feedback.folder()}")
    named: list[str] = []
    for folder in _bundle_folders():
        found = bundles.load(folder)
        if id in replay.feedback_used(found):
            named.append(found.name)
    answers = [str(each.content["answer"]) for each in said if each.answered.get("bundle") in named]
    return {"feedback": id, "bundles": sorted(named), "answers_corrected": answers}


# -- everything --------------------------------------------------------------------------------------------------------


def everything(prices: Mapping[str, float] | None = None) -> dict[str, Any]:
    """
    Args:
        prices: of an hour, by what workers compute on.
    """
    for kind in ("runs", "search", "channels", "refine"):
        storage.refresh(storage.root() / kind)
    runs = [_run(folder) for folder in _newest(storage.root() / "runs")]
    searches = [_search(folder) for folder in _newest(storage.root() / "search")]
    rounds = list(_rounds({each["name"]: each["hours"] for each in runs}))
    taken: dict[str, Any] = {"hours": spending.total(each["hours"] for each in (*runs, *searches))}  # rounds are runs
    if prices is not None:
        for each in (*runs, *searches, *rounds, taken):
            each["money"] = spending.money(each["hours"], prices)
        if without := spending.unpriced(taken["hours"], prices):
            taken["without_price"] = without
    return {
        "storage": storage.variables()[storage.ROOT_VARIABLE], "runs": runs, "searches": searches,
        "channels": [_channel(name) for name in _channels()], "rounds": rounds, "total": taken,
    }  # fmt: skip


def _run(folder: Path) -> dict[str, Any]:
    rows = list(lines(folder / "metrics.jsonl"))
    validations = [row for row in rows if row.get("kind") == "validation"]
    steps = [row for row in rows if row.get("kind") == "train"]
    best = max(validations, key=lambda row: row["score"], default=None)
    state, why = _state(folder, rows)
    return {
        "name": folder.name, "state": state, **({"why": why} if why else {}),
        "best": best["score"] if best else None, "metric": best.get("main", "score") if best else None,
        "step": steps[-1]["step"] if steps else 0, "of": steps[-1]["total_steps"] if steps else None,
        "hours": spending.hours(folder),
    }  # fmt: skip


def _search(folder: Path) -> dict[str, Any]:
    file = folder / "winner.json"
    won = json.loads(file.read_text()) if file.is_file() else {}
    state, why = ("running", "") if held(folder) else ("done", "") if won else ended(folder)
    return {
        "name": folder.name, "state": _ENDS.get(state, state), **({"why": why} if why else {}),
        "best": won.get("score"), "metric": _metric(folder), "winner": won.get("trial"),
        "hours": spending.hours(folder),
    }  # fmt: skip


def _metric(search: Path) -> str:
    """What its trials are compared by."""
    file = search / "search.yaml"
    space = (yaml.safe_load(file.read_text()) or {}).get("space", {}) if file.is_file() else {}
    return str(space.get("metric") or "score")


_ENDS = {"left": "stopped", "": "failed"}  # a command that ends by itself before its work is done was asked to


def _state(folder: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Of a run, and why where it failed."""
    place = _keeper(folder)
    if held(place):
        return "running", ""
    if any((folder / made).is_file() for made in ("bundle/manifest.json", *_SEALS)):
        return "done", ""
    state, why = ended(place)
    if rows and rows[-1].get("kind") == "stop":  # it was asked to, and saved
        return "stopped", ""
    return _ENDS.get(state, state), why


_SEALS = ("backbone/pretrained.json",)  # what jobs.pretrain writes last


def _keeper(folder: Path) -> Path:
    """Whose lock holds a run: its own, or that of the channel whose newest round it is."""
    channel, _, round_name = folder.name.rpartition("-")
    place = storage.root() / "refine" / channel
    newest = max((each.name for each in place.glob("r*")), default=None) if channel else None
    return place if newest is not None and newest == round_name else folder


# -- what goes ---------------------------------------------------------------------------------------------------------


def pruned(args: argparse.Namespace) -> dict[str, Any]:
    """Deletes one run or search, or shows what is over a quota, and deletes it where --delete says so.

    Raises:
        PruneError: there is none of that name, or somebody holds it.
    """
    pruning.sweep()
    if args.delete:
        each = pruning.one(args.delete)
        pruning.delete(each)
        return {"deleted": each.name, "bytes": each.size}
    there = pruning.found()
    going, gone = pruning.over(args.quota_gb * 1e9, there), []
    for each in going if args.delete is not None else ():
        try:
            pruning.delete(each)
            gone.append(each)
        except PruneError as error:  # somebody began with it since
            print(f"note: {error}", file=sys.stderr)
    total, most = sum(each.size for each in there), args.quota_gb
    left = total - sum(each.size for each in going)
    told = {
        "total_gb": round(total / 1e9, 3), "quota_gb": most,
        "deleted" if args.delete is not None else "would_go": [_kept(each) for each in (gone or going)],
        "stays": [{**_kept(each), "why": each.held} for each in there if each.held],
    }  # fmt: skip
    if left > most * 1e9:
        told["note"] = f"{left / 1e9:.3g} GB stay, more than {most:g}: what is held is not deleted"
    elif going and args.delete is None:
        told["note"] = f"python -m jobs.status --quota-gb {most:g} --delete deletes them"
    return told


def _kept(each: pruning.Kept) -> dict[str, Any]:
    return {"name": each.name, "gb": round(each.size / 1e9, 4), "used_ms": int(each.used_s * 1000)}


def _channel(name: str) -> dict[str, Any]:
    state = channels.read(name)
    return {"name": name, "bundle": state.bundle, "canary": state.canary, "share": state.share,
            "changes": len(state.lines), "service": promote.service_of(name)}  # fmt: skip


def _rounds(hours: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    for file in sorted(storage.root().glob("refine/*/r*/round.json")):
        told = json.loads(file.read_text())
        name = f"{told['channel']}-{file.parent.name}"
        yield {"name": name, "state": told["state"], "said": told["said"], "train": told["train"],
               "aside": sum(told["aside"].values()), "hours": hours.get(name, {})}  # fmt: skip


def _channels() -> list[str]:
    return sorted(file.stem for file in (storage.root() / "channels").glob("*.jsonl"))


def _bundle_folders() -> list[Path]:
    found = storage.root().glob(f"[!.]*/[!.]*/bundle/{MANIFEST}")  # not what is being deleted
    return sorted(file.parent for file in found)


def _newest(folder: Path) -> list[Path]:
    found = [each for each in folder.glob("[!.]*") if each.is_dir()]
    return sorted(found, key=lambda each: -each.stat().st_mtime)


def _shown(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A tree of what was found, for a terminal."""
    for key, value in found.items():
        if isinstance(value, Mapping) and key != "hours":
            yield f"{indent}{key}"
            yield from _shown(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}"
            for each in value:
                shown = {name: part for name, part in each.items() if name == "hours" or not isinstance(part, Mapping)}
                told = (f"{name} {_word(name, part)}" for name, part in shown.items())
                yield f"{indent}  {'  '.join(told)}"
        else:
            yield f"{indent}{key} {_word(key, value)}"


def _word(key: str, value: Any) -> str:
    if key.endswith("_ms") and isinstance(value, (int, float)):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(value / 1000))
    if isinstance(value, Mapping):
        return ", ".join(f"{kind} {part:.4g}" for kind, part in value.items()) or "none"
    if isinstance(value, list):
        more = f" and {len(value) - 5} more" if len(value) > 5 else ""
        return (", ".join(map(str, value[:5])) or "none") + more
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
