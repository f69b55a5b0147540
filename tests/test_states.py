"""States of frozen parts, computed once on a real Ray: the same as computed each time, shared, whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from jobs import cluster, run, states, stream, train
from jobs.supervised import Supervised
from mmagent import features, freeze
from mmagent.config import resolve
from mmagent.order import Position
from mmagent.record import Media, Record
from mmagent.shards import Dataset

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
Prepare = Callable[..., run.Run]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The sections of an image tower (ViT, with a class token) and an audio tower (wav2vec 2.0) of random weights."""
    torch.manual_seed(0)
    seen, heard = (tmp_path_factory.mktemp(kind) for kind in ("vit", "wav2vec2"))
    transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)).save_pretrained(seen)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(seen)
    convolutions: dict[str, Any] = {"conv_dim": (16, 16), "conv_stride": (10, 8), "conv_kernel": (20, 8)}
    transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**SMALL, **convolutions, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    ).save_pretrained(heard)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(heard)
    return {
        "image": {"width": 32, "tokens": 4, "size": 16, "checkpoint": str(seen)},
        "audio": {"width": 32, "tokens": 4, "max_s": 5.0, "checkpoint": str(heard)},
    }


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict[str, Any], towers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        **tiny_recipe,
        "model": {**tiny_recipe["model"], **towers},
        "freeze": {"strategy": "connector"},
        "train": {"micro_batch": 4, "epochs": 2, "eval_rows": 16, "eval_every_steps": 6, "cache": "disk"},
        "cluster": {"workers": 1, "max_failures": 0},
        "data": {**tiny_recipe["data"], "max_bad_share": 0.1},
    }


@pytest.fixture(scope="module")
def root(
    ray_cluster: cluster.Cluster, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:  # fmt: skip
    """One storage root for all: 40 rows of words or sound with a picture, one of them damaged; 8 of validation. What
    one test has kept another need not compute."""
    place = tmp_path_factory.mktemp("storage")
    rows = make_records(40)
    rows[5] = replace(rows[5], images=(Media(b"no picture"),))
    make_dataset(place / "data" / "tiny", {"train": rows, "validation": make_records(8, "validation")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMAGENT_STORAGE", str(place))
        yield place


@pytest.fixture
def prepare(root: Path, recipe: dict[str, Any], tmp_path: Path) -> Prepare:
    """``prepare(overrides)``: a run."""
    return lambda overrides=None: run.prepare(resolve(recipe, overrides or {}), tmp_path / "runs" / str(overrides))


def kept(prepared: run.Run, stop: Callable[[], bool] = bool) -> tuple[features.Kept, ...]:
    return states.keep(prepared.plan, prepared.dataset, stop)


def batches(prepared: run.Run, with_states: tuple[features.Kept, ...]) -> tuple[Supervised, list[dict[str, Any]]]:
    """The learner of a run, and the micro-batches of its first steps."""
    learner = Supervised(replace(prepared.plan, features=with_states))
    learner.begin(torch.device("cpu"))
    layout = stream.layout_of(prepared.config, 1, with_states)
    steps = learner.steps(stream.tables(prepared.plan.order, layout, Position(), 8))
    return learner, [micro for step in steps for micro in step.micros]


def outputs(prepared: run.Run, with_states: tuple[features.Kept, ...]) -> list[torch.Tensor]:
    learner, micros = batches(prepared, with_states)
    learner.model.eval()
    with torch.no_grad():
        return [learner.model(micro)["classify"] for micro in micros]


@pytest.mark.parametrize("strategy", ["connector", "head", "top:1", "image_tower"])
def test_with_kept_states_a_model_says_what_it_says_without(prepare: Prepare, strategy: str) -> None:
    prepared = prepare({"freeze.strategy": strategy})
    found = kept(prepared)
    wanted = {"top:1": {"image", "audio"}, "image_tower": {"text", "audio"}}.get(strategy, {"text", "image", "audio"})
    assert {each.kind for each in found} == wanted
    for here, there in zip(outputs(prepared, found), outputs(prepared, ()), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_the_frozen_parts_do_not_run(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare()
    learner, micros = batches(prepared, kept(prepared))

    def ran(*_: Any, **__: Any) -> Any:
        raise AssertionError("a frozen part computed")

    model: Any = learner.model
    for part in (learner._encoder, model.image_tower.model, model.audio_tower.model):
        monkeypatch.setattr(part, "forward", ran)
    learner, again = batches(prepared, kept(prepared))
    assert len(again) == len(micros)
    learner.model(again[0])
    assert again[0]["images"].shape[1:] == (5, 32)  # a class token and a grid of four
    assert again[0]["audios"].shape[1:] == (4, 32)


def test_a_row_that_cannot_be_read_is_a_bad_row_as_ever(prepare: Prepare) -> None:
    prepared = prepare()
    found = {}
    for name, with_states in (("kept", kept(prepared)), ("each time", ())):
        learner = Supervised(replace(prepared.plan, features=with_states))
        learner.begin(torch.device("cpu"))
        layout = stream.layout_of(prepared.config, 1, with_states)
        steps = list(learner.steps(stream.tables(prepared.plan.order, layout, Position(), 10)))
        found[name] = (sum(step.bad_rows for step in steps), learner.last_error)
    assert found["kept"] == found["each time"]
    assert found["kept"][0] == 1
    assert "train-5" in found["kept"][1]


def test_another_run_takes_what_is_there(prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    first = kept(prepare())
    written = {file: Path(file).stat().st_mtime_ns for each in first for file in each.files.values()}
    capsys.readouterr()
    assert kept(prepare({"optim.lr": 0.01, "train.epochs": 3})) == first
    assert {file: Path(file).stat().st_mtime_ns for file in written} == written
    assert "rows" not in capsys.readouterr().err  # nothing was computed


@pytest.mark.parametrize(
    ("overrides", "apart"),
    [
        ({"data.max_text_tokens": 16}, "text"),
        ({"model.image.tokens": 1}, "image"),
        ({"model.audio.max_s": 2.0}, "audio"),
    ],
)
def test_what_is_computed_otherwise_lies_elsewhere(prepare: Prepare, overrides: dict[str, Any], apart: str) -> None:
    here, there = prepare(), prepare(overrides)
    shards = here.dataset.hashes("train")
    differ = []
    for kind in features.KINDS:
        one, other = (features.of(each.config, kind, each.plan.tasks, shards) for each in (here, there))
        differ += [kind] if one.folder != other.folder else []
    assert differ == [apart]


def test_other_weights_have_other_states(prepare: Prepare, tiny_backbone: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_backbone, other)
    here, there = prepare(), prepare({"model.backbone": str(other)})
    shards = here.dataset.hashes("train")
    same = features.of(there.config, "text", ["classify"], shards)
    assert same == features.of(here.config, "text", ["classify"], shards)
    torch.manual_seed(1)
    transformers.BertModel(transformers.BertConfig.from_pretrained(other)).save_pretrained(other)
    assert features.of(there.config, "text", ["classify"], shards).folder != same.folder


def test_a_large_file_is_read_once_while_it_stays_as_it_is(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_LARGE_BYTES", 4)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    first = features._digest(file)
    assert first == hashlib.sha256(b"weights").hexdigest()
    known = storage / "features" / "digests.json"
    known.write_text(known.read_text().replace(first, "remembered"))
    assert features._digest(file) == "remembered"
    file.write_bytes(b"others")
    assert features._digest(file) == hashlib.sha256(b"others").hexdigest()


@pytest.mark.long
def test_whoever_stops_keeps_whole_shards_alone(prepare: Prepare) -> None:
    prepared = prepare({"model.image": None, "model.audio": None, "data.max_text_tokens": 20})
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3  # the training split has three row groups, the validation split one

    with pytest.raises(states.Stopped):
        kept(prepared, stop)
    [text] = kept(prepared, bool)
    trained, validated = (Path(text.files[file]) for file in text.files)
    assert trained.stat().st_mtime_ns < validated.stat().st_mtime_ns
    assert sorted(text.folder.iterdir()) == sorted([trained, validated])

    # a file of other rows is made again
    shutil.copy(trained, validated)
    assert len(text.missing()) == 1
    kept(prepared)
    assert not text.missing()


@pytest.mark.long
def test_what_takes_too_much_room_is_not_kept(prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"train.cache_gb": 1e-5, "data.max_text_tokens": 24}
    with pytest.raises(states.StatesError, match=r"train\.cache_gb=1e-05"):
        kept(prepare(small))
    assert kept(prepare({**small, "train.cache": "auto"})) == ()
    assert "not on disk, since" in capsys.readouterr().out
    assert kept(prepare({"train.cache": "memory"})) == ()


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({}, ("text", "image", "audio")),
        ({"augment.image_flip": 0.5}, ("text", "audio")),
        ({"augment.audio_noise": 0.1}, ("text", "image")),
        ({"augment.word_drop": 0.1}, ("image", "audio")),
        ({"freeze.strategy": "all"}, ()),
        ({"freeze.strategy": "towers"}, ("image", "audio")),
        ({"freeze.strategy": "lora:2"}, ("image", "audio")),
        ({"freeze.strategy": "lora:2", "freeze.lora_parts": ["backbone", "image_tower"]}, ("audio",)),
        ({"model.join": "input"}, ("image", "audio")),
        ({"model.image.checkpoint": None}, ("text", "audio")),
    ],
)
def test_what_is_the_same_in_every_epoch(
    recipe: dict[str, Any], overrides: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    assert freeze.storable(resolve(recipe, overrides)) == wanted


@pytest.mark.parametrize(
    ("overrides", "pays"),
    [({}, True), ({"train.epochs": 1}, False), ({"model.image": None, "model.audio": None}, False)],
)
def test_auto_keeps_what_pays(prepare: Prepare, overrides: dict[str, Any], pays: bool) -> None:
    prepared = prepare(overrides)
    assert states._pays(prepared.plan, prepared.dataset, freeze.storable(prepared.config)) is pays


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_learns_the_same(
    root: Path, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    losses = {}
    for cache in ("disk", "none"):
        arguments = ["--config", str(tmp_path / "recipe.yaml"), "--name", cache, f"train.cache={cache}"]
        assert train.main([*arguments, "--no-evaluate"]) == 0
        rows = [json.loads(line) for line in (root / "runs" / cache / "metrics.jsonl").read_text().splitlines()]
        losses[cache] = [row["loss"] for row in rows if row["kind"] == "validation"]
        assert (root / "runs" / cache / "bundle" / "manifest.json").is_file()
    assert losses["disk"] == pytest.approx(losses["none"], abs=1e-3)
    assert "states of frozen parts come with the rows" in capsys.readouterr().out
