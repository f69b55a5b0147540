"""The measurement of data loaders: all sides give the same tensors of the same rows, and the rate is of the middle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import cluster, stream
from jobs.supervised import Batches
from mmagent.assembly import load_reading
from mmagent.batch import Inputs
from mmagent.config import Config
from mmagent.order import Position
from mmagent.shards import Dataset
from mmagent.tasks import make_all
from tests.bench import data, loaders

ROWS = 256


@pytest.fixture
def recipe(storage: Path, tmp_path: Path, tiny_recipe: dict[str, Any]) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe))
    return file


def rows_of(batches: Any, keys: tuple[str, ...]) -> Counter[bytes]:
    """Each row's tensors, the padding of its text left out."""
    out: Counter[bytes] = Counter()
    for batch in batches:
        for index, mask in enumerate(batch["mask"].bool()):
            parts = [batch["ids"][index][mask], *(batch[key][index] for key in keys)]
            out[b"".join(part.numpy().tobytes() for part in parts)] += 1
    return out


def ours(config: Config, dataset: Dataset) -> Any:
    """Our rows without Ray, by the functions that a worker calls."""
    order = stream.order_of(dataset, "train", seed=0, window_rows=64)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 1})})
    tables = stream.tables(order, stream.layout_of(config, 1), Position(), ROWS // 32)
    inputs = Inputs(config.model, config.data, load_reading(config.model), make_all(dataset.tasks))
    for step in Batches(inputs, None, config, {}, torch.device("cpu")).steps(tables):
        yield from step.micros


@pytest.mark.parametrize(("kind", "keys"), [("image", ("images",)), ("sound", ("audios", "audio_frames"))])
def test_all_sides_give_the_same_tensors(storage: Path, recipe: Path, kind: str, keys: tuple[str, ...]) -> None:
    dataset = data.write(kind, storage / "data" / f"bench_data_{kind}", ROWS)
    config = data.settings(recipe, kind)
    wanted = rows_of(ours(config, dataset), keys)
    assert wanted.total() == ROWS
    for name in loaders.LOADERS:
        assert rows_of(loaders.batches(name, dataset, config, kind, window=64, workers=0), keys) == wanted, name


def test_workers_share_the_rows_out(storage: Path, recipe: Path) -> None:
    data.write("image", storage / "data" / "bench_data_image", ROWS)
    for name in loaders.LOADERS:
        [trace] = data.theirs(name, recipe, "image")
        assert sum(rows for _, rows in trace) == ROWS, name


def test_a_rate_is_of_the_middle_of_all_consumers() -> None:
    """Two consumers, 10 rows a second each; what stands still before and after does not count."""
    one = [(100.0 + index, 10) for index in range(20)]
    other = [(100.5 + index, 10) for index in range(20)]
    assert data._rate([one, other]) == pytest.approx(20.0)
    assert data._rate([[(0.0, 1), *one], [*other, (500.0, 1)]]) == pytest.approx(20.0)


@pytest.mark.slow  # half a minute on a quiet machine: workers of Ray Train start
def test_ours_gives_every_row(ray_cluster: cluster.Cluster, storage: Path, recipe: Path) -> None:
    data.write("image", storage / "data" / "bench_data_image", ROWS)
    traces = data.ours(recipe, "image")
    assert [sum(rows for _, rows in trace) for trace in traces] == [ROWS / 2] * 2
