"""The data loaders that ours is measured against, as their users write them: rows of shards or tars to tensors.

Each gives the same batches as ours of the same rows: token ids and mask, and pictures or sounds decoded by the same
functions, in worker processes of a torch DataLoader, shuffled within a window.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmagent import pictures, sounds, text
from mmagent.config import Config
from mmagent.record import SCHEMA
from mmagent.shards import Dataset

COLUMNS = ["messages", "images", "audios", "target"]
_SAMPLES_A_TAR = 1024


@dataclass(frozen=True, slots=True)
class Row:
    words: str
    media: bytes
    label: str


class Collate:
    """Rows to the tensors of a batch; what it needs is made in the process that works."""

    def __init__(self, config: Config, kind: str, labels: Sequence[str]) -> None:
        self._config, self._kind = config, kind
        self._labels = {label: index for index, label in enumerate(labels)}
        self._made: tuple[Any, Any] | None = None

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        tokenizer, maker = self._made = self._made or self._make()
        limits = self._config.data.media
        found = tokenizer(
            [row.words for row in rows], padding=True, truncation=True, max_length=self._config.data.max_text_tokens,
            return_tensors="pt",
        )  # fmt: skip
        out = {"ids": found["input_ids"], "mask": found["attention_mask"]}
        out["label"] = torch.tensor([self._labels[row.label] for row in rows])
        if self._kind == "image":
            out["images"] = maker.stack([maker.pixels(row.media, limits) for row in rows])
            return out
        return out | maker.stack([maker.frames(row.media, limits) for row in rows])

    def _make(self) -> tuple[Any, Any]:
        image, audio = self._config.model.image, self._config.model.audio
        assert image is not None
        assert audio is not None
        maker = pictures.of(image) if self._kind == "image" else sounds.of(audio)
        return text.load_tokenizer(self._config.model.backbone), maker


class Shards(IterableDataset):
    """Parquet shards, a row group at a time; workers share them out."""

    def __init__(self, files: Sequence[Path], window: int, seed: int) -> None:
        self._groups = [(file, group) for file in files for group in range(pq.read_metadata(file).num_row_groups)]
        self._window, self._seed = window, seed

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        rng = np.random.default_rng(self._seed)
        groups = [self._groups[index] for index in rng.permutation(len(self._groups))]
        held: list[Row] = []
        for file, group in groups[info.id :: info.num_workers] if info else groups:
            table = pq.ParquetFile(file).read_row_group(group, columns=COLUMNS)
            held += [row_of(row) for row in table.to_pylist()]
            if len(held) >= self._window:
                yield from (held[index] for index in rng.permutation(len(held)))
                held = []
        yield from (held[index] for index in rng.permutation(len(held)))


def row_of(row: dict[str, Any]) -> Row:
    """A row of a shard."""
    found: list[dict[str, Any]] = [*(row["images"] or []), *(row["audios"] or [])]
    [message], [media] = row["messages"], found
    words = message["content"].replace("<image>", "").replace("<audio>", "").strip()
    return Row(words, media["bytes"], row["target"]["label"])


def torch_loader(dataset: Dataset, window: int, seed: int) -> Any:
    return Shards(dataset.shard_files("train"), window, seed)


def datasets_loader(dataset: Dataset, window: int, seed: int) -> Any:
    """`datasets` streams the same shards."""
    import datasets

    files = [str(file) for file in dataset.shard_files("train")]
    # Of these columns alone: it knows no maps, and ours has one.
    features = datasets.Features.from_arrow_schema(pa.schema([SCHEMA.field(column) for column in COLUMNS]))
    streamed = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, columns=COLUMNS, features=features
    )
    return streamed.shuffle(seed=seed, buffer_size=window).map(lambda row: {"row": row_of(row)}, remove_columns=COLUMNS)


def webdataset_loader(dataset: Dataset, window: int, seed: int) -> Any:
    """WebDataset reads the same rows from tars, which it wants."""
    import webdataset

    urls = [str(file) for file in sorted((dataset.path / "tars").glob("*.tar"))]
    shards = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=seed, empty_check=False)
    return shards.shuffle(window).map(_of_tar)


def _of_tar(sample: dict[str, Any]) -> Row:
    known = json.loads(sample["json"])
    return Row(known["words"], sample["media"], known["label"])


LOADERS: dict[str, Callable[[Dataset, int, int], Any]] = {
    "datasets": datasets_loader,
    "webdataset": webdataset_loader,
    "torch": torch_loader,
}


def batches(name: str, dataset: Dataset, config: Config, kind: str, window: int, workers: int) -> DataLoader:
    """The batches of one loader, made by worker processes."""
    rows = LOADERS[name](dataset, window, config.seed)
    collate = Collate(config, kind, dataset.labels)

    def unwrapped(found: list[Any]) -> dict[str, torch.Tensor]:
        return collate([each["row"] if isinstance(each, dict) else each for each in found])

    return DataLoader(rows, batch_size=config.train.micro_batch, num_workers=workers, collate_fn=unwrapped)


def write_tars(dataset: Dataset) -> None:
    """The training rows once more as tars, for WebDataset."""
    folder = dataset.path / "tars"
    folder.mkdir()
    rows = (row for table in dataset.read("train", COLUMNS) for row in table.to_pylist())
    tar: tarfile.TarFile | None = None
    for index, raw in enumerate(rows):
        if index % _SAMPLES_A_TAR == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(folder / f"{index // _SAMPLES_A_TAR:05d}.tar", "w")  # noqa: SIM115
        assert tar is not None
        row = row_of(raw)
        for end, data in (
            ("media", row.media),
            ("json", json.dumps({"words": row.words, "label": row.label}).encode()),
        ):
            member = tarfile.TarInfo(f"{index:08d}.{end}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if tar is not None:
        tar.close()
