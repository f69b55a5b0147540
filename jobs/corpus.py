"""What is learned from without labels, as shards in the run's folder: passages of text, or pairs of media and words.

Passages are as long as the language model is asked to read (`data.max_text_tokens`); a text that is the same twice
counts once. A pair's words are what a record says of its media: the answer of a caption or a transcript (``text``),
``meta.transcript`` of speech, else its own words. Validation is a seeded share, or for pairs the data set's own
split; a test split is never read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.progress import Progress
from jobs.sources import BadRow, Source
from mmagent import shards, storage, text
from mmagent.record import SCHEMA_VERSION, Message, Record, escape
from mmagent.shards import Dataset, ShardWriter
from mmagent.text import BackboneError

TRAIN, VALIDATION = "train", "validation"
_TEXT_COLUMNS = ["id", "messages", "candidates"]


class CorpusError(ValueError):
    """Nothing to learn from; says what is missing."""


def records(origin: Dataset | Source, *, media: bool, workers: int) -> Iterator[tuple[str | None, Record]]:
    """The records of a data set's training and validation splits, or of a source, each with its split where it has one.
    Rows of a source that cannot be read are counted and said."""
    if isinstance(origin, Dataset):
        for split in (TRAIN, VALIDATION):
            for table in origin.read(split, None if media else _TEXT_COLUMNS) if split in origin.splits else ():
                yield from ((split, Record.from_row(row)) for row in table.to_pylist())
        return
    bad: Counter[str] = Counter()
    with Progress("read", origin.total, "rows") as progress:
        for row in origin.rows(workers):
            progress.add()
            if isinstance(row, BadRow):
                bad[row.reason] += 1
            elif row.record.split != "test":
                yield row.record.split, row.record
    for reason, count in bad.items():
        print(f"set aside: {count} rows: {reason}")


def passages(
    found: Iterable[tuple[str | None, Record]], tokenizer: Any, max_tokens: int
) -> Iterator[tuple[None, Record]]:
    """Texts cut into passages of at most `max_tokens`, each once; all splits together, since many texts are in several.

    Raises:
        BackboneError: the tokenizer does not tell the characters of its tokens.
    """
    if not tokenizer.is_fast:
        raise BackboneError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for: one with tokenizer.json is "
            "wanted"
        )
    room = max(1, max_tokens - len(tokenizer("")["input_ids"]))
    seen: set[bytes] = set()
    for _, record in found:
        said = [text.words(record), *(str(each.get("content") or "") for each in record.candidates)]
        for words in said:
            for passage in _cut(tokenizer, words, room):
                key = _digest(passage)
                if key not in seen:
                    seen.add(key)
                    yield None, Record(key.hex(), (Message("user", escape(passage)),), task="generate")


def pairs(
    found: Iterable[tuple[str | None, Record]], kinds: Collection[str], *, cut: bool
) -> Iterator[tuple[str | None, Record]]:
    """Records of media and words alone, of those that have both.

    Args:
        kinds: of media: image, audio.
        cut: whether validation is to be drawn out of training.
    """
    left = 0
    for split, record in found:
        images, audios = (record.images if "image" in kinds else ()), (record.audios if "audio" in kinds else ())
        words = " ".join(_words_of(record).split())
        if not words or not (images or audios):
            left += 1
            continue
        content = "<image>" * len(images) + "<audio>" * len(audios) + escape(words)
        made = Record(record.id, (Message("user", content),), task="generate", images=images, audios=audios)
        yield None if cut else split or TRAIN, made
    if left:
        print(f"left out: {left:,} rows without words, or without {' or '.join(kinds)}")


def write(
    made: Iterable[tuple[str | None, Record]],
    folder: Path,
    *,
    name: str,
    share: float,
    seed: int,
    mark: Mapping[str, Any],
) -> Dataset:
    """The shards of a corpus; what is there of the same `mark` is taken as it is.

    Args:
        share: of the rows without a split that goes into validation, drawn by the seed.
        mark: all that the rows depend on.

    Raises:
        CorpusError: no row for training, or none to measure by.
    """
    file = folder / shards.INFO_FILE
    if file.is_file() and json.loads(file.read_text()).get("corpus") == json.loads(json.dumps(mark)):
        return Dataset.open(folder)
    shutil.rmtree(folder, ignore_errors=True)
    rows: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(folder, split)) for split in (TRAIN, VALIDATION)}
        for given, record in made:
            split = given or (VALIDATION if share_of(f"{seed}/{record.id}") < share else TRAIN)
            rows[split] += 1
            writers[split].add(replace(record, split=split))
        files = {split: writer.close() for split, writer in writers.items()}
    for split in (TRAIN, VALIDATION):
        if not rows[split]:
            raise CorpusError(
                f"{name} gives {rows[TRAIN]} texts or pairs to learn from and {rows[VALIDATION]} to measure by: more "
                "are wanted, or a larger pretrain.validation_share"
            )
    info = {
        "format_version": shards.FORMAT_VERSION, "schema_version": SCHEMA_VERSION, "name": name, "task": "generate",
        "tasks": {}, "splits": {split: {"rows": rows[split], "shards": files[split]} for split in (TRAIN, VALIDATION)},
        "corpus": mark,
    }  # fmt: skip
    storage.publish_json(file, info)
    return Dataset.open(folder)


def _words_of(record: Record) -> str:
    target = record.target
    answer = target.text or next(iter(target.texts or ()), None)
    return answer or (record.meta.get("transcript") if record.audios else None) or text.words(record)


def _cut(tokenizer: Any, words: str, room: int) -> Iterator[str]:
    if not words.strip():
        return
    offsets = tokenizer(words, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    for at in range(0, len(offsets), room):
        passage = words[offsets[at][0] : offsets[min(at + room, len(offsets)) - 1][1]].strip()
        if passage:
            yield passage


def _digest(words: str) -> bytes:
    return hashlib.blake2b(words.encode(), digest_size=16).digest()


def share_of(key: str) -> float:
    """A number from 0 to 1 that is a key's own."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
