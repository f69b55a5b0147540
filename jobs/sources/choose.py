"""The source that a command names: `easy_vqa`, or a kind and a place, `jsonl:FILE`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from jobs.sources import Source, SourceError
from jobs.sources.readers import Reader, files_of, find
from mmagent.media import Limits

_KINDS = {
    "jsonl": "PATH",
    "csv": "PATH",
    "parquet": "PATH",
    "folder": "PATH",
    "hf": "PATH or hf:OWNER/NAME",
    "conll": "PATH",
    "squad": "PATH",
    "parallel": "PATH,PATH",
    "webdataset": "PATH",
    "text": "PATH",
}


def choose(
    source: str,
    *,
    seed: int = 0,
    validation_share: float = 0.1,
    columns: Mapping[str, str] | None = None,
    group_by: str | None = None,
    task: str | None = None,
    asked: str | None = None,
    test: str | None = None,
    limits: Limits | None = None,
) -> Source:
    """
    Args:
        task, asked, limits: see `jobs.sources.table.Table`.

    Raises:
        SourceError: an unknown kind, nothing at the place, or an option that the kind has not.
    """
    if source == "easy_vqa":
        for flag, value in (("--map", columns), ("--group-by", group_by), ("--task", task), ("--test", test)):
            if value:
                raise SourceError(f"{flag} is not for the source easy_vqa: its columns and splits are its own")
        from jobs.sources.easy_vqa import EasyVqa

        return EasyVqa(seed=seed, validation_share=validation_share)
    kind, _, place = source.partition(":")
    if kind not in _KINDS or not place:
        near = difflib.get_close_matches(kind, ("easy_vqa", *_KINDS), n=1, cutoff=0.0)[0]
        wanted = "easy_vqa" if near == "easy_vqa" else f"{near}:{_KINDS[near]}"
        raise SourceError(
            f"--source {source!r} is unknown: did you mean {wanted}? "
            f"There are easy_vqa, {', '.join(f'{name}:{place}' for name, place in _KINDS.items())}"
        )
    from jobs.sources.table import Table

    main = _reader(kind, place, seed, "")
    # Ids that rows get of their file's name differ also where both files have one name.
    second = _reader(kind, test.removeprefix(f"{kind}:"), seed, "test-") if test else None
    return Table(main, second, columns=columns, group_by=group_by, task=task, asked=asked, limits=limits)


def _reader(kind: str, place: str, seed: int, prefix: str) -> Reader:
    """The reader of a kind; each is loaded when it is asked for, with what it needs."""
    if kind == "hf":
        from jobs.sources.hub import Hub

        return Hub(place, prefix)
    if kind == "parallel":
        from jobs.sources.parallel import Parallel

        source, comma, target = place.partition(",")
        if not comma:
            raise SourceError(f"parallel:{place} names one file, but two are wanted: parallel:SOURCE,TARGET")
        return Parallel(_file(source), _file(target), prefix)
    if kind == "webdataset":
        from jobs.sources.webdataset import WebDataset

        return WebDataset(*_tars(place), prefix)
    if kind == "jsonl":
        from jobs.sources.jsonl import JsonLines

        return JsonLines(_file(place), prefix)
    if kind == "csv":
        from jobs.sources.delimited import Delimited

        return Delimited(_file(place), prefix)
    if kind == "text":
        from jobs.sources.plain import Plain

        return Plain(find(place), prefix)
    if kind == "folder":
        from jobs.sources.folder import Folder

        return Folder(find(place), seed=seed, prefix=prefix)
    return _reader_of_files(kind, find(place), prefix)


def _reader_of_files(kind: str, place: Path, prefix: str) -> Reader:
    if kind == "parquet":
        from jobs.sources.parquet import Parquet

        return Parquet(place, prefix)
    if kind == "conll":
        from jobs.sources.conll import Conll

        return Conll(place, prefix)
    from jobs.sources.squad import Squad

    return Squad(place, prefix)


def _file(path: str) -> Path:
    place = find(path)
    if not place.is_file():
        raise SourceError(f"{place} is a folder, but a file is wanted")
    return place


def _tars(place: str) -> tuple[list[Path], Path]:
    """The tars of a file, a folder or a pattern, and the place that holds them."""
    folder, _, pattern = place.rpartition("/")
    if not any(letter in pattern for letter in "*?["):
        found = find(place)
        return files_of(found, (".tar", ".tar.gz", ".tgz")), found
    above = find(folder or ".")
    files = sorted(file for file in above.glob(pattern) if file.is_file())
    if not files:
        raise SourceError(f"no file in {above} is of the pattern {pattern}")
    return files, above
