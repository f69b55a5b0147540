"""What there is below the storage root: runs and searches with their best scores, channels, rounds of refitting; and
where an answer comes from.

    python -m jobs.status                     # everything, the newest first; --json for a program
    python -m jobs.status --answer ans_01JDX3YQ2M8T5W6V7R9K0N1P4S
    python -m jobs.status --feedback fb_5f0c6e1d2a3b4c5d    # which bundles learned from it, and what they answered

An answer's line goes from the bundle to its run, config, seed and checkpoint, to the data sets it learned from with the
hashes of their shards, and to the feedback among them. Traces are read from the service's store over its admin address
(an API key of the scope admin in MMAGENT_API_KEY), or found in the feedback that was given on them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import promote, replay
from mmagent import bundle as bundles
from mmagent import channels, feedback, storage
from mmagent.arguments import Parser
from mmagent.bundle import MANIFEST, BundleError
from mmagent.channels import ChannelError


class StatusError(RuntimeError):
    """What is asked for is not here; the message says where was looked."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.status", __doc__)
    parser.add_argument("--answer", metavar="ID", help="where this answer comes from")
    parser.add_argument("--feedback", metavar="ID", help="which bundles learned from this piece of feedback")
    parser.add_argument("--url", help="of the service; those that serve.start recorded, where not given")
    parser.add_argument("--json", action="store_true", help="for a program")
    args = parser.parse_args(argv)
    try:
        if args.answer:
            found: Any = line_of(args.answer, args.url)
        elif args.feedback:
            found = learned_from(args.feedback)
        else:
            found = everything()
    except (StatusError, promote.PromoteError, BundleError, ChannelError, storage.StorageError) as error:
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


def everything() -> dict[str, Any]:
    for kind in ("runs", "search", "channels", "refine"):
        storage.refresh(storage.root() / kind)
    return {
        "storage": storage.variables()[storage.ROOT_VARIABLE],
        "runs": [_run(folder) for folder in _newest(storage.root() / "runs")],
        "searches": [_search(folder) for folder in _newest(storage.root() / "search")],
        "channels": [_channel(name) for name in _channels()],
        "rounds": list(_rounds()),
    }


def _run(folder: Path) -> dict[str, Any]:
    rows = list(_lines(folder / "metrics.jsonl"))
    scores = [row["score"] for row in rows if row.get("kind") == "validation"]
    steps = [row for row in rows if row.get("kind") == "train"]
    state = "done" if (folder / "bundle" / MANIFEST).is_file() else "stopped" if rows else "begun"
    return {
        "name": folder.name, "state": state, "best": max(scores, default=None),
        "step": steps[-1]["step"] if steps else 0, "of": steps[-1]["total_steps"] if steps else None,
        "hours": round(sum(row["samples"] / row["samples_per_s"] for row in steps if row["samples_per_s"]) / 3600, 3),
    }  # fmt: skip


def _search(folder: Path) -> dict[str, Any]:
    file = folder / "winner.json"
    won = json.loads(file.read_text()) if file.is_file() else {}
    return {"name": folder.name, "state": "done" if won else "begun", "best": won.get("score"),
            "winner": won.get("trial")}  # fmt: skip


def _channel(name: str) -> dict[str, Any]:
    state = channels.read(name)
    return {"name": name, "bundle": state.bundle, "canary": state.canary, "share": state.share,
            "changes": len(state.lines), "service": promote.service_of(name)}  # fmt: skip


def _rounds() -> Iterator[dict[str, Any]]:
    for file in sorted(storage.root().glob("refine/*/r*/round.json")):
        told = json.loads(file.read_text())
        yield {"name": f"{told['channel']}-{file.parent.name}", "state": told["state"], "said": told["said"],
               "train": told["train"], "aside": sum(told["aside"].values())}  # fmt: skip


def _channels() -> list[str]:
    return sorted(file.stem for file in (storage.root() / "channels").glob("*.jsonl"))


def _bundle_folders() -> list[Path]:
    return sorted(file.parent for file in storage.root().glob(f"*/*/bundle/{MANIFEST}"))


def _newest(folder: Path) -> list[Path]:
    found = [each for each in folder.glob("[!.]*") if each.is_dir()]
    return sorted(found, key=lambda each: -each.stat().st_mtime)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # cut off by a kill


def _shown(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A tree of what was found, for a terminal."""
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}"
            yield from _shown(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}"
            for each in value:
                told = (f"{name} {_word(name, part)}" for name, part in each.items() if not isinstance(part, Mapping))
                yield f"{indent}  {'  '.join(told)}"
        else:
            yield f"{indent}{key} {_word(key, value)}"


def _word(key: str, value: Any) -> str:
    if key.endswith("_ms") and isinstance(value, (int, float)):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(value / 1000))
    if isinstance(value, list):
        more = f" and {len(value) - 5} more" if len(value) > 5 else ""
        return (", ".join(map(str, value[:5])) or "none") + more
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
