"""The source that a command names: `easy_vqa`, or a kind and a place, `jsonl:FILE`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from jobs.sources import Source, SourceError
from jobs.sources.readers import Reader, find

_KINDS = ("jsonl", "csv", "folder", "parquet")


def choose(
    source: str,
    *,
    seed: int = 0,
    validation_share: float = 0.1,
    columns: Mapping[str, str] | None = None,
    group_by: str | None = None,
    test: str | None = None,
) -> Source:
    """
    Raises:
        SourceError: an unknown kind, nothing at the place, or an option that the kind has not.
    """
    if source == "easy_vqa":
        for flag, value in (("--map", columns), ("--group-by", group_by), ("--test", test)):
            if value:
                raise SourceError(f"{flag} is not for the source easy_vqa: its columns and splits are its own")
        from jobs.sources.easy_vqa import EasyVqa

        return EasyVqa(seed=seed, validation_share=validation_share)
    kind, _, place = source.partition(":")
    if kind not in _KINDS or not place:
        near = difflib.get_close_matches(kind, ("easy_vqa", *_KINDS), n=1, cutoff=0.0)[0]
        wanted = "easy_vqa" if near == "easy_vqa" else f"{near}:PATH"
        raise SourceError(
            f"--source {source!r} is unknown: did you mean {wanted}? "
            f"There are easy_vqa, {', '.join(f'{name}:PATH' for name in _KINDS)}"
        )
    from jobs.sources.table import Table

    main = _reader(kind, find(place), seed, "")
    # Ids that rows get of their file's name differ also where both files have one name.
    second = _reader(kind, find(test.removeprefix(f"{kind}:")), seed, "test-") if test else None
    return Table(main, second, columns=columns, group_by=group_by)


def _reader(kind: str, place: Path, seed: int, prefix: str) -> Reader:
    if kind in ("jsonl", "csv") and not place.is_file():
        raise SourceError(f"{place} is a folder, but a file is wanted")
    if kind == "jsonl":
        from jobs.sources.jsonl import JsonLines

        return JsonLines(place, prefix)
    if kind == "csv":
        from jobs.sources.delimited import Delimited

        return Delimited(place, prefix)
    if kind == "parquet":
        from jobs.sources.parquet import Parquet

        return Parquet(place, prefix)
    from jobs.sources.folder import Folder

    return Folder(place, seed=seed, prefix=prefix)
