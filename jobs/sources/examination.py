"""One row of a file made a record: its media decoded once, its answer checked; or why it is set aside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from jobs.sources import BadRow, GoodRow
from jobs.sources.readers import SPLITS, RawRow
from mmagent import media, record, rows, targets

_MAX_META = 200  # characters of another column's value, kept so that an evaluation can slice by it
FIELDS = (
    *("id", "split", "task", "text", "context", "image", "audio", "label", "labels", "value", "spans"),
    *("answer", "answers", "candidates", "tokens", "tags", "messages", "images", "audios", "target", "texts"),
    *("weight", "meta", "origin", "created_ms", "schema_version"),
)
_ONE_ANSWER = frozenset({"label", "labels", "value", "answer", "target"})  # each is the whole answer of a row
_UNFIT = (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError)


@dataclass(frozen=True, slots=True)
class Shape:
    """How raw rows are read: sent to the workers."""

    columns: Mapping[str, str]  # field -> column
    group_by: str | None
    task: str | None  # of every row, as the command says
    guessed: str | None  # of a row that names none
    with_splits: bool  # the source names its splits: a row without one is bad
    limits: media.Limits
    answered: bool = True  # a row without its right answer is bad


def examine(shape: Shape, batch: Iterable[tuple[RawRow, str | None]]) -> list[GoodRow | BadRow]:
    """The record of each row, or why there is none. With each row comes its split, where its file names it."""
    batch = list(batch)
    found = [_examined(shape, row, split) for row, split in batch]
    try:
        _check_schema([row.record for row in found if isinstance(row, GoodRow)])
        return found
    except _UNFIT:  # one of them: which one?
        return [_fitting(row, raw) for row, (raw, _) in zip(found, batch, strict=True)]


def _examined(shape: Shape, row: RawRow, split: str | None) -> GoodRow | BadRow:
    if row.values is None:
        return BadRow(row.file, row.number, row.default_id, row.reason, row.message, row.raw)
    values = renamed(row.values, shape.columns)
    try:
        made = _record(shape, row, values, split or _split(shape, values))
        if shape.answered:
            targets.check(made)
        _check_media(made, shape.limits)
    except (_Refused, targets.TargetError) as error:
        reason, message = error.reason, str(error)
    except record.RecordError as error:
        field = (error.field or "row").partition("[")[0].removesuffix("s")
        reason, message = f"{field} cannot be read", str(error)
    except _UNFIT as error:
        reason, message = "does not fit the schema", str(error)
    else:
        return GoodRow(row.file, row.number, made)
    return BadRow(row.file, row.number, id_of(values, row), reason, message, dict(row.values))


def _fitting(row: GoodRow | BadRow, raw: RawRow) -> GoodRow | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        _check_schema([row.record])
        return row
    except _UNFIT as error:
        return BadRow(
            row.file, row.number, row.record.id, "does not fit the schema", str(error), dict(raw.values or {})
        )


def _check_schema(records: list[record.Record]) -> None:
    pa.Table.from_pylist([made.to_row() for made in records], record.SCHEMA)


class _Refused(ValueError):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _record(shape: Shape, row: RawRow, values: Mapping[str, Any], split: str | None) -> record.Record:
    meta = {
        name: str(value)
        for name, value in values.items()
        if name not in FIELDS and isinstance(value, (str, int, float)) and 0 < len(str(value)) <= _MAX_META
    }
    group = row.values.get(shape.group_by) if shape.group_by and row.values else None
    if group not in (None, ""):
        meta["group"] = str(group)
    present = [column for column in rows.INPUTS if column in values]
    if present and all(_blank(values[column]) for column in present):
        raise _Refused("empty text", f"the row's {' and '.join(present)}: empty, so there is nothing to answer")
    task = shape.task or values.get("task") or shape.guessed
    given = rows.parse(
        {**values, "split": split, "task": task},
        root=row.root,
        default_id=row.default_id,
        origin=row.file,
        max_media_bytes=shape.limits.max_media_bytes,
    )
    return replace(given, meta=meta | dict(given.meta))


def _split(shape: Shape, values: Mapping[str, Any]) -> str | None:
    word = str(values.get("split") or "").strip()
    if not shape.with_splits and not word:
        return None
    split = SPLITS.get(word.lower())
    if split is None:
        wanted = "train, validation or test is wanted"
        raise _Refused("unknown split", f"the split is {word!r}, but {wanted}" if word else f"no split, but {wanted}")
    return split


def _check_media(made: record.Record, limits: media.Limits) -> None:
    for kind in ("image", "audio"):
        for index, item in enumerate(made.media((kind,))):  # of the messages, then of the candidates
            data = item.bytes or b""
            try:
                if kind == "image":
                    media.decode_image(data, limits)
                else:
                    media.decode_audio(data, media.check_audio(data, limits).sample_rate_hz, limits)
            except media.MediaTooLarge as error:
                more = "a recipe with a higher data.media limit (--config RECIPE) lets it in"
                raise _Refused(f"{kind} over a limit", f"{kind}s[{index}]: {error}; {more}") from error
            except media.MediaError as error:
                raise _Refused(f"{kind} damaged", f"{kind}s[{index}]: {error}") from error


def id_of(values: Mapping[str, Any], row: RawRow) -> str:
    return row.default_id if values.get("id") in (None, "") else str(values["id"])


def _blank(value: Any) -> bool:
    return value is None or (
        isinstance(value, (str, list)) and not (value.strip() if isinstance(value, str) else value)
    )


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return dict(values)
    used = set(columns.values())
    if _ONE_ANSWER & columns.keys():  # which column is the answer was said: another that is called like one is none
        used |= _ONE_ANSWER - columns.keys()
    kept = {name: value for name, value in values.items() if name not in used}
    return kept | {field: values.get(column) for field, column in columns.items()}
