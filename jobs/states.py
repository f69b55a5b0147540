"""Computes what frozen parts make of a run's data, on Ray Data before training, and keeps it (see `mmagent.features`).

Actors with the frozen parts take the shards row group by row group; each shard's states are published when they are
whole, so that a run that was stopped meanwhile goes on with the next shard. What would take more room than
`train.cache_gb` allows is not kept, and said.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch.nn.utils.rnn import pad_sequence

from jobs import stream
from jobs.loop import Plan
from jobs.progress import Progress
from mmagent import features, freeze, pretrained, storage, targets, text, towers
from mmagent.assembly import load_language, load_reading
from mmagent.batch import Inputs, PartError, Sample
from mmagent.config import Config
from mmagent.features import Kept, Kind
from mmagent.record import Media, Record
from mmagent.shards import Dataset
from mmagent.targets import TargetError, TaskInfo
from mmagent.tasks import make_all

_SPLITS = ("train", "validation")  # what training reads
_ROWS = 64  # of one call of an actor
_TOGETHER = 32  # items of one forward pass
_IN_MEMORY_BYTES = 1 << 30  # of a text model's states: what `mmagent.frozen.FrozenStates` keeps
_WINDOW_BYTES = 1 << 30  # of states in one shuffle window, which a task that reads holds
_GROUP_BYTES = 3 << 29  # of states in one row group, which Arrow reads as one piece
_JUDGED_ROWS = 256  # computed before room is judged by them


class StatesError(RuntimeError):
    """States that could not be computed or kept; says what to do."""


class Stopped(Exception):
    """Asked to stop before all was computed."""


class _TooMuch(Exception):
    """More than there is room for: what, and what to do."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What one shard lacks."""

    shard: str
    kinds: tuple[Kind, ...]
    groups: tuple[int, ...]  # rows of each


def keep(plan: Plan, dataset: Dataset, stop: Callable[[], bool]) -> tuple[Kept, ...]:
    """The states that training gets with its rows, computed where they are not there yet; none where nothing of the
    model is frozen, or memory does as well (`train.cache`).

    Args:
        stop: asked after each row group.

    Raises:
        StatesError: an actor failed, or `train.cache=disk` asks for more than `train.cache_gb`.
        Stopped: `stop` said so.
    """
    config = plan.config
    if config.train.cache not in ("auto", "disk") or not plan.tasks:  # pretraining has none
        return ()
    kinds = freeze.storable(config)
    shards = {file: digest for split in _SPLITS for file, digest in dataset.hashes(split).items()}
    kept = tuple(features.of(config, kind, plan.tasks, shards) for kind in kinds)
    lacking = {each.kind: set(each.missing()) for each in kept}
    if any(lacking.values()):
        if config.train.cache == "auto" and not _pays(plan, dataset, kinds):
            return ()
        work = []
        for shard in shards:
            if lacks := tuple(kind for kind in kinds if shard in lacking[kind]):
                work.append(_Work(shard, lacks, tuple(rows for _, _, rows in stream.row_groups_of(shard))))
        try:
            _compute(plan, dataset, kept, work, stop)
        except _TooMuch as error:
            if config.train.cache == "disk":
                raise StatesError(f"train.cache=disk, but {error}") from error
            print(f"train.cache: not on disk, since {error}", flush=True)
            return ()
    if kept:
        places = ", ".join(f"{each.kind} {each.folder}" for each in kept)
        print(f"train.cache=disk: states of frozen parts come with the rows ({places})", flush=True)
    elif config.train.cache == "disk":
        print("train.cache=disk: nothing that is frozen computes the same in every epoch, so nothing is kept")
    return kept


def _pays(plan: Plan, dataset: Dataset, kinds: Sequence[Kind]) -> bool:
    """Whether computing once, before, saves time: not where each row comes about once, and not where a language model
    is all there is and its states stay in memory anyway."""
    config = plan.config
    passes = plan.total_steps * config.global_batch / plan.order.rows
    if not kinds or passes < 2 or config.data.share < 1:
        return False
    if set(kinds) != {"text"}:
        return True
    first = next(dataset.read("train", columns=["messages"]))
    words = [text.words(Record.from_row({"id": "", "messages": row})) for row in first["messages"].to_pylist()]
    if len(unique := sorted(set(words))) <= len(words) / 2:
        return False
    tokenizer = text.load_tokenizer(config.model.backbone)
    tokens = np.mean([len(ids) for ids in text.tokenize(tokenizer, unique, config.data.max_text_tokens)])
    width = pretrained.config_of(config.model.backbone, "model.backbone").get_text_config().hidden_size
    return bool(dataset.rows("train") * tokens * width * 4 > _IN_MEMORY_BYTES)


def _compute(
    plan: Plan, dataset: Dataset, kept: Sequence[Kept], work: Sequence[_Work], stop: Callable[[], bool]
) -> None:
    """Computes and publishes what is missing.

    Raises:
        StatesError, Stopped, _TooMuch: a shard that was begun is not published.
    """
    config = plan.config
    kinds = tuple(each.kind for each in kept if any(each.kind in piece.kinds for piece in work))
    kwargs = {"config": config, "tasks": dict(plan.tasks), "kinds": kinds, "threads": config.cluster.threads}
    groups = [(piece.shard, index) for piece in work for index in range(len(piece.groups))]
    sizes = [rows for piece in work for rows in piece.groups]
    room = _Room(config, total=sum(sizes), largest=max(sizes))
    share = config.cluster.gpu_share if config.cluster.gpu else 0.0
    try:
        with Progress(f"states of {' and '.join(kinds)}", sum(sizes), "rows") as progress:
            progress.begin()
            computed = stream.apply(
                dataset, "train", Computing, kwargs, workers=int(config.cluster.workers / (share or 1.0)),
                batch_rows=_ROWS, threads=config.cluster.threads, gpu=share, groups=groups,
            )  # fmt: skip
            tables = stream.cut(computed, sizes)
            for piece in work:
                with _Files(piece, kept) as files:
                    for _ in piece.groups:
                        table = next(tables)
                        files.write(table)
                        room.check(table, files.bytes())
                        progress.add(len(table))
                        if stop():
                            raise Stopped
                room.published(files.bytes())
    except ray.exceptions.RayError as error:
        words = str(error).strip().splitlines()[-1]
        raise StatesError(
            f"computing the states of frozen parts failed: {words}; train.cache=memory does without"
        ) from error


def held_bytes() -> int:
    """What all states that are kept take on disk. By the system's own listing: of a million files, paths alone would
    take longer than all the rest."""
    held, folders = 0, [str(storage.root() / features.FOLDER)]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for each in entries:
                if each.is_dir(follow_symlinks=False):
                    folders.append(each.path)
                elif each.name.endswith(".parquet") and each.name[0] != ".":
                    held += each.stat().st_size
    return held


class _Room:
    """Judges by what was computed whether all of it fits."""

    def __init__(self, config: Config, *, total: int, largest: int) -> None:
        self._config, self._total, self._largest = config, total, largest
        self._rows = self._bytes = self._published = 0
        self._root = storage.root() / features.FOLDER
        self._before = held_bytes()

    def published(self, size: int) -> None:
        """A shard's files of so many bytes have their places."""
        self._published += size

    def check(self, table: pa.Table, written: int) -> None:
        """
        Args:
            table: what was computed last.
            written: bytes on disk of the shard that it belongs to.

        Raises:
            _TooMuch: of the whole, judged by all tables so far.
        """
        self._rows += len(table)
        self._bytes += table.nbytes
        if self._rows < min(_JUDGED_ROWS, self._total):
            return
        row = self._bytes / self._rows
        window = max(self._config.data.window_rows, self._config.global_batch)
        if row * min(window, self._total) > _WINDOW_BYTES:
            raise _TooMuch(
                f"the states of data.window_rows={window} rows would take {row * window / 1e9:.1f} GB of memory: "
                f"data.window_rows={int(_WINDOW_BYTES / row)} would do, or train.cache=memory"
            )
        if row * self._largest > _GROUP_BYTES:
            raise _TooMuch(
                f"a row's states take {row / 1e6:.0f} MB: those of {self._largest} rows are too much at once"
            )
        whole = self._before + (self._published + written) / self._rows * self._total
        if whole > self._config.train.cache_gb * 1e9:
            raise _TooMuch(
                f"with these {self._root} would take {whole / 1e9:.1f} GB: raise "
                f"train.cache_gb={self._config.train.cache_gb:g}, or remove folders there that no run needs"
            )


class _Files:
    """The files of one shard, of each kind that it lacks: published together when whole, removed after an error."""

    def __init__(self, piece: _Work, kept: Sequence[Kept]) -> None:
        self._final = {each.kind: Path(each.files[piece.shard]) for each in kept if each.kind in piece.kinds}
        self._draft = {kind: file.with_name(f".{file.name}.{os.getpid()}.tmp") for kind, file in self._final.items()}

    def __enter__(self) -> _Files:
        for draft in self._draft.values():
            draft.parent.mkdir(parents=True, exist_ok=True)
        self._writers = {kind: features.writer(draft) for kind, draft in self._draft.items()}
        return self

    def write(self, table: pa.Table) -> None:
        for kind, writer in self._writers.items():
            writer.write_table(table.select([kind]).rename_columns([features.COLUMN]).combine_chunks())

    def bytes(self) -> int:
        """On disk, so far or in the end."""
        files = (draft if draft.exists() else self._final[kind] for kind, draft in self._draft.items())
        return sum(file.stat().st_size for file in files)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for writer in self._writers.values():
                writer.close()
            for name, draft in self._draft.items():
                if kind is None:
                    with open(draft, "rb") as file:
                        os.fsync(file.fileno())
                    os.replace(draft, self._final[name])
        finally:
            for draft in self._draft.values():
                draft.unlink(missing_ok=True)


class Computing:
    """Called with a table of record rows, gives for each kind a column of their items (`mmagent.features.ITEMS`). Of a
    row that cannot be read there are none: training says why."""

    def __init__(self, config: Config, tasks: Mapping[str, TaskInfo], kinds: Sequence[Kind], threads: int) -> None:
        torch.set_num_threads(threads)
        self._kinds, made = kinds, make_all(tasks)
        self._device = torch.device("cuda" if config.cluster.gpu else "cpu")
        reads = "text" in kinds
        with contextlib.nullcontext() if reads else torch.device("meta"):  # it tells how long a text may be, no more
            self._encoder = load_language(config.model, made, weights=reads)
        self._inputs = Inputs(config.model, config.data, load_reading(config.model), made, self._encoder)
        if reads:
            self._encoder.eval().to(self._device)
        self._towers: dict[str, Any] = {}
        if "image" in kinds:
            assert config.model.image is not None
            self._towers["image"] = towers.image_tower(config.model.image).eval().to(self._device)
        if "audio" in kinds:
            assert config.model.audio is not None
            self._towers["audio"] = towers.audio_tower(config.model.audio).eval().to(self._device)

    @torch.no_grad()
    def __call__(self, table: pa.Table) -> pa.Table:
        samples = [self._sample(row) for row in table.to_pylist()]
        columns = {}
        for kind in self._kinds:
            wanted = [dict(_texts(sample) if kind == "text" else _media(sample, kind)) for sample in samples]
            unique = {key: value for each in wanted for key, value in each.items()}
            known = self._read(unique) if kind == "text" else self._seen(kind, unique)
            columns[kind] = features.packed([{key: known[key] for key in each} for each in wanted])
        return pa.table(columns)

    def _sample(self, row: dict[str, Any]) -> Sample | None:
        record = Record.from_row(row)
        try:
            targets.check(record)
            return self._inputs.sample(record)
        except (PartError, TargetError):
            return None

    def _read(self, texts: Mapping[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
        """Token ids (tokens,) -> states (tokens, width), those of about one length together."""
        found: dict[bytes, np.ndarray] = {}
        keys = sorted(texts, key=lambda key: len(texts[key]))
        for part in _parts(keys):
            ids = [torch.from_numpy(texts[key]) for key in part]
            mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
            padded = pad_sequence(ids, batch_first=True, padding_value=self._inputs.tokenizer.pad_token_id)
            states = self._encoder(padded.to(self._device), mask.to(self._device)).float().cpu().numpy()
            found |= {key: states[index, : len(ids[index])] for index, key in enumerate(part)}
        return found

    def _seen(self, kind: str, media: Mapping[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
        """What `mmagent.pictures` or `mmagent.sounds` made -> states (states, channels)."""
        found: dict[bytes, np.ndarray] = {}
        keys = sorted(media, key=lambda key: len(media[key]))
        for part in _parts(keys):
            arrays, tower = [media[key] for key in part], self._towers[kind]
            if kind == "image":
                assert self._inputs.pictures is not None
                given: tuple[torch.Tensor, ...] = (self._inputs.pictures.stack(arrays),)
            else:
                assert self._inputs.sounds is not None
                stacked = self._inputs.sounds.stack(arrays)
                given = (stacked["audios"], stacked["audio_frames"])
            states = tower.states(*(each.to(self._device) for each in given)).float().cpu().numpy()
            found |= dict(zip(part, states, strict=True))
        return found


def _texts(sample: Sample | None) -> Iterator[tuple[bytes, np.ndarray]]:
    if sample is not None:
        for ids in (*(view.ids for view in sample.views), *([] if sample.transcript is None else [sample.transcript])):
            yield features.key("text", ids.tobytes()), ids


def _media(sample: Sample | None, kind: Kind) -> Iterator[tuple[bytes, np.ndarray]]:
    """What was decoded of a sample's pictures or sounds, those of its candidates with them, by their bytes."""
    if sample is None:
        return
    record, side = sample.record, 0 if kind == "image" else 1
    media, made = (record.images, sample.images) if kind == "image" else (record.audios, sample.audios)
    for each, array in zip(media, made, strict=True):
        yield features.key(kind, each.read()), array
    for candidate, more in zip(record.candidates if sample.more else (), sample.more, strict=True):
        if own := candidate.get(kind):
            yield features.key(kind, Media(own["bytes"], own["path"]).read()), more[side][0]


def _parts(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(keys), _TOGETHER):
        yield keys[start : start + _TOGETHER]
