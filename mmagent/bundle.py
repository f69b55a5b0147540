"""A bundle: all that an answer needs in one folder, which loads with torch and transformers alone.

    manifest.json       format version, name, tasks, modalities, origin, sha256 of every file; written last
    config.yaml         the resolved config
    model.safetensors   towers, join and head
    backbone/           the language model and its tokenizer, as Transformers saves them
    towers/             of pretrained towers: image/ and audio/, each with the configs of its model and its processor
    tasks.json · calibration.json · metrics.json · golden.jsonl · README.md (the model card)
    memory.parquet      some rows that it learned from, for who refits it where the rest is gone (data.memory_rows)

A folder without its manifest is no bundle: writing was interrupted.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmagent import processor, storage, towers
from mmagent.assembly import Model, assemble, load_language, load_reading
from mmagent.calibration import Calibration
from mmagent.config import Config, ConfigError, resolve
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all
from mmagent.text import TextEncoder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class BundleError(ValueError):
    """A folder that is no usable bundle; says what is wrong with which file."""


@dataclass(frozen=True, slots=True)
class Bundle:
    path: Path
    manifest: Mapping[str, Any]
    config: Config
    tasks: Mapping[str, TaskInfo]
    calibration: Mapping[str, Calibration]  # by task

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def task(self) -> str:
        """The task that a request means which names none."""
        return str(self.manifest["task"])

    @property
    def labels(self) -> tuple[str, ...]:
        """Of that task."""
        return self.tasks[self.task].labels

    def golden(self) -> list[dict[str, Any]]:
        """Questions with the answers the model gave when it was exported: what a deployment must reproduce."""
        file = self.path / "golden.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def save(
    path: Path,
    *,
    name: str,
    config: Config,
    tasks: Mapping[str, TaskInfo],
    task: str,
    state: Mapping[str, Tensor],
    backbone: TextEncoder,
    tokenizer: Any,
    calibration: Mapping[str, Calibration],
    origin: Mapping[str, Any],
) -> None:
    """Writes a bundle beside its place and renames it there, replacing an older one of the same path.

    Args:
        tasks, task: what it answers, and which of them where a request names none.
        state: the model's weights without the backbone's.
        origin: run, data set, metrics of the chosen checkpoint: goes into the manifest.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        backbone.save(draft / "backbone")
        towers.save(config.model, draft / "towers")
        tokenizer.save_pretrained(draft / "backbone")
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, draft / "model.safetensors")
        (draft / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        storage.publish_json(draft / "tasks.json", {name: info.to_dict() for name, info in tasks.items()})
        fitted = {name: each.model_dump() for name, each in calibration.items()}
        storage.publish_json(draft / "calibration.json", fitted)
        storage.publish_json(draft / "metrics.json", {})
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "created_ms": int(time.time() * 1000),
            "mmagent": importlib.import_module("mmagent").__version__,
            "task": task,
            "tasks": sorted(tasks),
            "labels": list(tasks[task].labels),
            "modalities": modalities(config, tokenizer),
            **origin,
        }
        _seal(draft, manifest)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(draft, path)
        storage.send(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def add(path: Path, files: Mapping[str, str | bytes]) -> None:
    """Adds or replaces files that are known only after the export: golden examples, the evaluation, the model card.
    The manifest is sealed anew."""
    for name, content in files.items():
        storage.publish(path / name, content)
    _seal(path, json.loads((path / MANIFEST).read_text()))
    storage.send(path)


def load(path: str | Path) -> Bundle:
    """Reads and checks a bundle: a folder, or the name of a run or search whose bundle is meant.

    Raises:
        BundleError: no bundle there, another format version, a file missing or changed.
    """
    folder = storage.fetched(find(path))
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        raise BundleError(f"the bundle {folder} is damaged: {MANIFEST} cannot be read; copy it again") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"the bundle {folder} has format version {manifest.get('format_version')}, this mmagent reads "
            f"{FORMAT_VERSION}: install the mmagent that wrote it, or export the run again"
        )
    for file, digest in manifest["files"].items():
        if not (folder / file).is_file():
            raise BundleError(f"the bundle {folder} lacks {file}: copy it again, whole")
        if storage.digest(folder / file) != digest:
            raise BundleError(f"the bundle {folder} is damaged: {file} is not what its manifest says; copy it again")
    try:
        config = resolve(yaml.safe_load((folder / "config.yaml").read_text()), _towers(folder))
    except ConfigError as error:
        raise BundleError(f"the bundle {folder} holds a config that cannot be read: {error}") from error
    fitted = json.loads((folder / "calibration.json").read_text())
    calibration = {name: Calibration.model_validate(each) for name, each in fitted.items()}
    infos = json.loads((folder / "tasks.json").read_text())
    tasks = {name: TaskInfo.from_dict(name, each) for name, each in infos.items()}
    return Bundle(folder, manifest, config, tasks, calibration)


def find(path: str | Path) -> Path:
    """The bundle folder that a path or a run's name means.

    Raises:
        BundleError: there is none; says where was looked.
    """
    given = Path(os.path.expanduser(path))
    if given.is_absolute():
        places = [given, given / "bundle"]
    else:
        root = storage.root()
        kinds = ("runs", "search")
        places = [root / given, root / given / "bundle", *(root / kind / given / "bundle" for kind in kinds)]
    for place in places:
        storage.refresh(place)
        if os.path.isfile(place / MANIFEST):  # Path's own raises for a name that is too long
            return place
    tried = ", ".join(str(place) for place in places)
    raise BundleError(f"there is no bundle {str(path)!r}: no manifest.json in {tried}")


def load_model(bundle: Bundle) -> tuple[Model, TextEncoder, Any]:
    """The model (the backbone inside only where the join is at its input), the backbone and the tokenizer of a bundle.

    Raises:
        BundleError: the weights do not fit the config.
    """
    place = str(bundle.path / "backbone")
    encoder = load_language(bundle.config.model, bundle.tasks, place=place)
    tokenizer = load_reading(bundle.config.model, place=place)
    model = assemble(bundle.config.model, make_all(bundle.tasks), encoder, weights=False)
    own = model.state_dict()
    state = load_file(bundle.path / "model.safetensors")
    state = {key: value.to(own[key].dtype) if key in own else value for key, value in state.items()}
    try:
        # Assigned, not copied: the file stays mapped, and what nobody reads costs no memory. A backbone inside has its
        # weights already.
        missing, unknown = model.load_state_dict(state, strict=False, assign=True)
        missing = [key for key in missing if not key.startswith("backbone.")]
        if missing or unknown:
            raise RuntimeError(f"missing: {missing}; unknown: {unknown}")
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(f"the weights of the bundle {bundle.path} do not fit its config: {error}") from error
    return model, encoder, tokenizer


def modalities(config: Config, tokenizer: Any) -> list[str]:
    """What a model takes; of a native one its processor says it."""
    if config.model.join == "native":
        return ["text", *processor.kinds(tokenizer)]
    kinds = (("image", config.model.image), ("audio", config.model.audio))
    return ["text", *(kind for kind, tower in kinds if tower is not None)]


def _towers(folder: Path) -> dict[str, str]:
    """Where a bundle's pretrained towers are rebuilt from: its own copies, not the checkpoints it was trained from."""
    kinds = (kind for kind in ("image", "audio") if (folder / "towers" / kind).is_dir())
    return {f"model.{kind}.checkpoint": str(folder / "towers" / kind) for kind in kinds}


def _seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    hashes = {str(file.relative_to(folder)): storage.digest(file) for file in files}
    storage.publish_json(folder / MANIFEST, {**manifest, "files": hashes})
