"""What a check found, in words: the report for a terminal, and the warnings that the start of a training repeats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmagent import symptoms
from mmagent.shards import Dataset

FILE = "check.json"
_SHARE = 0.01  # of rows, sounds or pictures: below, a matter of the source; above, of the training
_CROWDED = 0.05  # of the rows with such media, in which one and the same stands
_FEWEST_MEDIA = 20  # fewer say nothing of shares
_RARE = 10  # training rows of a label below which it is hardly learned
_ONE_SIDED = 0.9  # of a task's training rows
_SHOWN = 5
_MEDIA = {"image": ("pictures", "picture"), "audio": ("sounds", "sound")}


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What matters of a check, a line each."""
    told = [line for split, about in found["splits"].items() for line in _of_split(split, about)]
    told += [line for pair in found["shared"] for line in _of_pair(pair)]
    return told + list(_of_rates(found)) + list(_of_labels(found["splits"]))


def read(dataset: Dataset) -> dict[str, Any] | None:
    """The last check of a data set; none where there was none, or of other shards than those that are there now."""
    file = dataset.path / FILE
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return found if found is not None and found["shards"] == fingerprint(dataset) else None


def known(dataset: Dataset) -> list[str]:
    """The warnings of the last check, as the start of a training tells them; nothing is decoded again."""
    if (found := read(dataset)) is not None:
        return [f"warning: {line}" for line in found["warnings"]]
    counted = {"train": {"labels": {name: _ordered(task.counts) for name, task in dataset.tasks.items()}}}
    old = f" ({FILE} is of other shards)" if (dataset.path / FILE).exists() else ""
    command = f"python -m jobs.prepare --check --name {dataset.name}"
    told = f"{dataset.name} is not checked for leaks, silent sounds and the like{old}: {command}"
    return [*(f"warning: {line}" for line in _of_labels(counted)), told]


def fingerprint(dataset: Dataset) -> str:
    """Of the shards: a check of others says nothing about these."""
    shards = [shard["sha256"] for split in dataset.splits for shard in dataset.info["splits"][split]["shards"]]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def show(found: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = []
    for split, about in found["splits"].items():
        lines.append(f"{split:<11}{about['rows']:>9,} rows, {about['unusable']['rows']:,} unusable, "
                     f"{about['repeated_rows']:,} that ask what another asks")  # fmt: skip
        lines += [f"{'':<11}{line}" for line in (*_of_media(about), *_of_lengths(found, about), *_balance(about))]
    for pair in found["shared"]:
        one, other = pair["splits"]
        lines.append(
            f"{one} and {other}: the same media in {pair['media_rows']:,} of the {pair['of']:,} rows of {other} that "
            f"bring any, {pair['same_rows']:,} rows the same"
        )
    lines += [f"warning: {line}" for line in found["warnings"]]
    return "\n".join([*lines, "" if found["warnings"] else "nothing that would matter"]).rstrip()


def _of_media(about: Mapping[str, Any]) -> Iterator[str]:
    signs = about["signs"]
    for kind, names in (("image", ("blank",)), ("audio", ("silent", "clipped"))):
        held = about[kind]
        if held["count"]:
            seen = ", ".join(f"{signs.get(name, 0):,} {name}" for name in names)
            yield f"{held['count']:,} {_MEDIA[kind][0]} ({held['distinct']:,} different), {seen}"
    if about["audio"]["rates_hz"]:
        rates = ", ".join(f"{int(rate):,} Hz in {times:,}" for rate, times in about["audio"]["rates_hz"].items())
        seconds = about["audio"]["seconds"]
        yield f"sample rates: {rates}; seconds: half up to {seconds['p50']:.1f}, the longest {seconds['max']:.1f}"


def _of_lengths(found: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[str]:
    unit, length = "tokens" if found["tokenizer"] else "words", about["length"]
    if length:
        cut = f", {about['cut_rows']:,} rows over {found['max_tokens']}" if about["cut_rows"] is not None else ""
        yield (
            f"{unit} a row: half up to {length['p50']:.0f}, 99 % up to {length['p99']:.0f}, at most "
            f"{length['max']:.0f}; {length['sum']:,.0f} in all{cut}"
        )
        yield f"{unit}: " + ", ".join(f"<= {upto:,}: {rows:,}" for upto, rows in length["histogram"])


def _balance(about: Mapping[str, Any]) -> Iterator[str]:
    for task, labels in about["labels"].items():
        ordered = list(labels.items())
        shown = ", ".join(f"{name!r} {count:,}" for name, count in ordered[:_SHOWN])
        rest = ""
        if len(ordered) > _SHOWN:
            rest = f" ... {ordered[-1][0]!r} {ordered[-1][1]:,}"
        yield f"{task}: {len(ordered)} labels: {shown}{rest}"


def _of_split(split: str, about: Mapping[str, Any]) -> Iterator[str]:
    unusable, rows = about["unusable"], max(1, about["rows"])
    if unusable["rows"]:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in unusable["reasons"].items())
        yield f"{split}: {unusable['rows']:,} rows cannot be used: {reasons}; all in quarantine/check.jsonl"
    for kind, names in (("image", ("blank",)), ("audio", ("silent", "clipped"))):
        held, (many, one) = about[kind], _MEDIA[kind]
        for name in names:
            if (count := about["signs"].get(name, 0)) > _SHARE * held["count"]:
                examples = ", ".join(map(repr, about["examples"].get(name, [])))
                yield f"{split}: {count:,} of {held['count']:,} {many} are {name}, such as of {examples}"
        if held["rows"] >= _FEWEST_MEDIA and held["commonest"] > _CROWDED * held["rows"]:
            yield f"{split}: one and the same {one} stands {held['commonest']:,} times in {held['rows']:,} rows"
    if about["contradicting"]["rows"] > _SHARE * rows:
        examples = ", ".join(map(repr, about["contradicting"]["examples"]))
        yield (
            f"{split}: {about['contradicting']['rows']:,} rows ask the same as another, media with them, and are "
            f"answered otherwise ({examples}): nobody can learn both"
        )
    if (about["cut_rows"] or 0) > _SHARE * rows:
        cut = f"{about['cut_rows']:,} of {rows:,} rows are longer than data.max_text_tokens"
        yield f"{split}: {cut}: their oldest words are lost"


def _of_pair(pair: Mapping[str, Any]) -> Iterator[str]:
    one, other = pair["splits"]
    if one != "train":
        return  # validation and test may share what training has not
    if pair["same_rows"]:
        examples = ", ".join(map(repr, pair["same_examples"]))
        yield f"{pair['same_rows']:,} rows of {other} stand in {one} too, word for word ({examples}): {other} flatters"
    if pair["media_rows"] > pair["same_rows"]:
        examples = ", ".join(map(repr, pair["media_examples"]))
        yield (
            f"{pair['media_rows']:,} of {pair['of']:,} rows of {other} bring media that {one} has too ({examples}): "
            f"{other} flatters where the answer depends on them alone"
        )


def _of_rates(found: Mapping[str, Any]) -> Iterator[str]:
    rates = {split: about["audio"]["rates_hz"] for split, about in found["splits"].items()}
    for split, each in rates.items():
        for rate, count in each.items():
            share = count / max(1, sum(each.values()))
            if int(rate) not in symptoms.USUAL_RATES_HZ:
                yield f"{split}: {count:,} sounds claim {int(rate):,} samples a second: is that their rate?"
            if split != "train" and rates.get("train") and rate not in rates["train"] and share > _SHARE:
                yield f"{split}: {count:,} sounds have {int(rate):,} samples a second, none of train has"
            if (wanted := found["tower_rate_hz"]) and int(rate) < wanted and share > _SHARE:
                yield (
                    f"{split}: {count:,} sounds have {int(rate):,} samples a second, below model.audio.sample_rate_hz="
                    f"{wanted}: what is above {int(rate) // 2:,} Hz is not in them"
                )


def _of_labels(splits: Mapping[str, Any]) -> Iterator[str]:
    for task, labels in splits.get("train", {}).get("labels", {}).items():
        if not labels:
            continue
        total, (first, most) = sum(labels.values()), next(iter(labels.items()))
        if len(labels) > 1 and most > _ONE_SIDED * total:
            yield f"{task}: {most:,} of {total:,} training answers are {first!r}: see train.class_balance"
        rare = [label for label, count in labels.items() if count < _RARE]
        if rare:
            yield f"{task}: {len(rare)} of {len(labels)} labels have fewer than {_RARE} training rows: {_some(rare)}"
        for split in ("validation", "test"):
            held = splits.get(split, {}).get("labels", {}).get(task)
            if held and (lost := [label for label in labels if label not in held]):
                yield f"{task}: {len(lost)} of {len(labels)} labels never come in {split}: {_some(lost)}"


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def _some(labels: list[str]) -> str:
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return ", ".join(map(repr, labels[:_SHOWN])) + more
