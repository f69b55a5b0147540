"""Data sets of Hugging Face ``datasets``: a folder that ``save_to_disk`` made, a folder of data files in a layout that
``load_dataset`` knows (image folders with their ``metadata.jsonl``, CSV, JSON, Parquet, ...), or a hub id,
``OWNER/NAME`` or ``OWNER/NAME:CONFIG``.

A folder is streamed. A data set of the hub is fetched once, into the cache of ``datasets``, and read from there: it is
passed over more than once. Class labels become their names; pictures and sounds stay encoded; no remote code is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.sources import SourceError
from jobs.sources.parquet import named
from jobs.sources.readers import SPLITS, RawRow, outlines
from mmagent import storage

_BATCH_ROWS = 64
_HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?")
_NEEDED = "the source hf: needs the pip package datasets: pip install datasets   (or: pip install 'mmagent[hub]')"


class Hub:
    shuffled = False

    def __init__(self, place: str, prefix: str = "") -> None:
        """
        Raises:
            SourceError: nothing is there, or datasets cannot read it.
        """
        try:
            import datasets
        except ImportError as error:
            raise SourceError(_NEEDED) from error
        self._name, self._prefix = place, prefix
        folder = storage.resolve(place)
        self._folder = folder if folder.exists() else None
        self._errors: tuple[type[Exception], ...] = (
            datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, RuntimeError,
        )  # fmt: skip
        try:
            parts = _from_folder(datasets, folder) if self._folder else _from_hub(datasets, place)
        except self._errors as error:
            where = folder if self._folder else f"{place} (no folder {folder}, so a data set of the hub)"
            raise SourceError(f"{where} cannot be read by datasets: {_first_line(error)}") from error
        self._parts = _known(place, parts)

    def rows(self, light: bool = False) -> Iterator[RawRow]:
        for name, part in self._parts.items():
            split = SPLITS.get(name.lower())
            where = f"{self._name} ({name})" if name else self._name
            number = 0
            try:
                for number, values in enumerate(_values(part, light), 1):
                    if split is not None:
                        values.setdefault("split", split)
                    default_id = f"{self._prefix}{name or 'row'}-{number}"
                    yield RawRow(where, number, default_id, values, self._folder)
            except self._errors as error:
                raise SourceError(
                    f"{where}, after row {number}: datasets cannot go on: {_first_line(error)}"
                ) from error

    def fingerprint(self) -> dict[str, Any]:
        if self._folder is not None:
            files = (file for file in self._folder.rglob("*") if file.is_file())
            return outlines(files, self._folder)
        return {
            f"{self._name} {name}".strip(): {"rows": part.num_rows, "version": str(part.info.version), **_sums(part)}
            for name, part in self._parts.items()
        }


def _from_folder(datasets: Any, folder: Path) -> Mapping[str, Any]:
    if (folder / "dataset_dict.json").is_file():
        return dict(datasets.load_from_disk(str(folder)))
    if (folder / "state.json").is_file():
        return {"": datasets.load_from_disk(str(folder))}
    return dict(datasets.load_dataset(str(folder), streaming=True))


def _from_hub(datasets: Any, place: str) -> Mapping[str, Any]:
    match = _HUB_ID.fullmatch(place)
    if match is None:
        raise ValueError("a folder, OWNER/NAME or OWNER/NAME:CONFIG is wanted")
    return dict(datasets.load_dataset(match[1], match[2]))


def _known(place: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that are a split; if none is, all of them, to be cut."""
    known = {name: part for name, part in parts.items() if name.lower() in SPLITS}
    if known and len(known) < len(parts):
        print(f"note: {place} has the splits {', '.join(parts)}; only {', '.join(known)} are read")
    if set(known) == {"train"}:  # all that a folder without splits has
        return {"": known["train"]}
    return known or dict(parts)


def _values(part: Any, light: bool) -> Iterator[dict[str, Any]]:
    """Rows as Arrow keeps them: nothing is decoded."""
    features = part.features or {}
    names = {column: labels for column, feature in features.items() if (labels := _labels(feature))}
    for table in part.with_format("arrow").iter(_BATCH_ROWS):
        left_out = [field.name for field in table.schema if light and pa.types.is_nested(field.type)]
        for values in table.drop_columns(left_out).to_pylist():
            for column in names.keys() & values.keys():
                values[column] = named(values[column], names[column])
            yield values | dict.fromkeys(left_out)


def _labels(feature: Any) -> list[str]:
    """The names of a class label, or of a list of them."""
    found = getattr(feature, "names", None)
    if found is not None:
        return list(found)
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return [] if inner is None or isinstance(inner, dict) else _labels(inner)


def _sums(part: Any) -> dict[str, Any]:
    sums = part.info.download_checksums or {}
    return {"files": {Path(file).name: about.get("num_bytes") for file, about in sorted(sums.items())}}


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no reason given'}"
