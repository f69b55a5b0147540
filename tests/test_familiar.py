"""What validation looked like: a stream from the same place stays quiet however short it is, a shifted one is seen."""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs import export
from mmagent import bundle, familiar
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.shards import Dataset
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running


def states(count: int, seed: int, *, shift: float = 0.0, spread: float = 1.0) -> np.ndarray:
    """(n, 64): of few directions, as encoders' states are, with a long tail."""
    mixing = np.random.default_rng(0).normal(size=(8, 64))
    rng = np.random.default_rng(seed)
    inner = rng.standard_t(5, size=(count, 8))
    inner[:, 2] = spread * inner[:, 2] + shift
    return inner @ mixing + 0.1 * rng.normal(size=(count, 64))


@pytest.fixture(scope="module")
def known() -> familiar.Familiar:
    found = familiar.learned(states(400, 1), ["text"] * 400)
    assert found is not None
    return found


@pytest.mark.parametrize("count", [50, 200])
def test_a_stream_from_the_same_place_stays_quiet(known: familiar.Familiar, count: int) -> None:
    told = [known.distance(known.placed(states(count, 100 + seed))) for seed in range(40)]
    assert sum(each is not None and each > 0 for each in told) <= 1
    assert max(each or 0.0 for each in told) < 0.1


@pytest.mark.parametrize(("shift", "spread"), [(2.0, 1.0), (0.0, 4.0)])
def test_other_means_and_other_spreads_are_seen(known: familiar.Familiar, shift: float, spread: float) -> None:
    told = [known.distance(known.placed(states(150, seed, shift=shift, spread=spread))) for seed in range(200, 210)]
    assert min(each or 0.0 for each in told) > 0.3


def test_what_lies_outside_of_all_directions_is_seen(known: familiar.Familiar) -> None:
    away = np.random.default_rng(5).normal(size=64)
    assert (known.distance(known.placed(states(150, 3) + away)) or 0.0) > 0.5


def test_few_rows_say_nothing(known: familiar.Familiar) -> None:
    assert known.distance(known.placed(states(familiar.FEWEST - 1, 2, shift=9.0))) is None
    assert known.distance(known.placed(states(100, 2)), "text+image") is None  # validation had none
    assert familiar.learned(states(2 * familiar.FEWEST - 1, 1), ["text"] * 99) is None


def test_it_lies_in_a_bundle(known: familiar.Familiar, tmp_path: Path) -> None:
    (tmp_path / familiar.FILE).write_bytes(familiar.packed({"image": known}))
    [(kind, again)] = familiar.load(tmp_path).items()
    placed = known.placed(states(100, 7, shift=1.0))
    assert (kind, again.modalities) == ("image", known.modalities)
    assert again.distance(placed) == pytest.approx(known.distance(placed), abs=1e-3)
    assert familiar.load(tmp_path / "nowhere") == {}


def speckled(colour: tuple[int, int, int], seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def questions(count: int, seed: int, colours: tuple[tuple[int, int, int], ...]) -> list[Record]:
    return [
        parse({
            "id": f"{seed}-{n}", "text": "what color is the shape?", "label": "red",
            "image": speckled(colours[n % len(colours)], 1000 * seed + n),
        })
        for n in range(count)
    ]  # fmt: skip


SEEN = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def test_a_service_tells_of_shifted_pictures(
    tiny_bundle: Path, storage: Path, make_dataset: Callable[..., Dataset]
) -> None:
    """What the export keeps of validation rows, read by a service: other pictures are seen, the words stay as they
    were."""
    place = shutil.copytree(tiny_bundle, storage / "runs" / "tiny" / "bundle")
    dataset = make_dataset(storage / "data" / "seen", {"validation": questions(240, 1, SEEN)})
    predictor = Predictor.load(place, device="cpu")
    kept = export._familiar(predictor, dataset.shard_files("validation"), seed=0)
    assert set(kept) == {"text", "image"}
    bundle.add(place, {familiar.FILE: familiar.packed(kept)})
    with running(Service(Predictor.load(place, device="cpu"), ServeConfig())) as address:

        def drift(records: list[Record]) -> dict[str, float]:
            inputs = [
                {
                    "text": "what color is the shape?",
                    "image": "data:image/png;base64," + base64.b64encode(record.images[0].read()).decode(),
                }
                for record in records
            ]
            for at in range(0, len(inputs), 60):
                body = {"inputs": inputs[at : at + 60]}
                httpx.post(f"{address}/v1/predict", json=body, timeout=60).raise_for_status()
            time.sleep(0.05)
            found: dict[str, float] = httpx.get(f"{address}/admin/status").json()["drift"]["text+image"]
            return found

        quiet = drift(questions(120, 2, SEEN))
        assert (quiet["features.image"], quiet["features.text"]) == (0.0, 0.0)
        shifted = drift(questions(240, 3, ((220, 220, 220), (120, 120, 120))))
        assert shifted["features.image"] > 0.5
        assert shifted["features.text"] == 0.0
        metrics = httpx.get(f"{address}/metrics").text
        assert 'mmagent_drift{bundle="tiny",modalities="text+image",of="features.image"}' in metrics
