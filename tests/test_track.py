"""A run in MLflow and at Weights & Biases: real clients, a real server, and one that is not there."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster, run, track, train
from jobs.meter import Log
from jobs.tracker import _figures, _params
from mmagent import storage as storages
from mmagent.config import Config, ConfigError, resolve
from mmagent.record import Record
from mmagent.shards import Dataset

MLFLOW_START_S = 240  # of a server on a crowded machine


def begun(folder: Path, config: Config, steps: int = 3) -> Path:
    """A run's folder, as far as it has come."""
    storages.publish(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
    write(folder, 1, steps)
    return folder


def write(folder: Path, first: int, last: int) -> None:
    log = Log(folder, rank=0)
    for step in range(first, last + 1):
        log.write({"kind": "train", "step": step, "loss": 1 / step})
        log.write({"kind": "validation", "step": step, "main": "accuracy", "score": step / 10, "a/text+image": 0.5})


def judged(folder: Path) -> None:
    value = {"value": 0.75, "low": 0.5, "high": 1.0}
    storages.publish_json(folder / "evaluation.json", {"split": "test", "metrics": {"accuracy": value}})
    storages.publish(folder / "report.html", "<p>report</p>")
    storages.publish_json(folder / "bundle" / "manifest.json", {"name": "r"})


def client(uri: str) -> Any:
    mlflow = pytest.importorskip("mlflow.tracking")
    return mlflow.MlflowClient(uri)


def database(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


# ---- before anything is sent


def test_what_a_recipe_may_say(tiny_recipe: dict[str, Any]) -> None:
    assert track.wanted(resolve(tiny_recipe, {}).track) == []
    both = resolve(tiny_recipe, {"track.mlflow": "http://127.0.0.1:5000", "track.wandb": "p"}).track
    assert track.wanted(both) == ["mlflow", "wandb"]
    for value, words in (("http://me:secret@host", "MLFLOW_TRACKING_PASSWORD"), ("ftp://host", "http://HOST:PORT")):
        with pytest.raises(ConfigError, match=words):
            resolve(tiny_recipe, {"track.mlflow": value})


def test_a_package_that_is_not_there_is_named_before_the_run_starts(
    storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """In a Python that does not find the packages: its module search leaves them out."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    program = (
        "import importlib.machinery as m, sys\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = lambda n, *a, **k: None if n in ('mlflow', 'wandb') else find(n, *a, **k)\n"
        "from jobs import train; sys.exit(train.main(sys.argv[1:]))"
    )
    for setting in ("track.mlflow=http://127.0.0.1:1", "track.wandb=p"):
        command = [sys.executable, "-c", program, "--config", str(tmp_path / "recipe.yaml"), "--name", "r", setting]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert "pip install -c constraints.txt -e '.[track]'" in ended.stderr
    assert not (storage / "runs").exists()


def test_a_run_may_go_on_with_another_server(storage: Path, tiny_recipe: dict[str, Any]) -> None:
    folder = begun(storage / "runs" / "r", resolve(tiny_recipe, {"track.mlflow": "a"}))
    storages.publish_json(folder / "bundle" / "manifest.json", {"name": "r"})
    run.hold(resolve(tiny_recipe, {"track.mlflow": "b", "track.wandb": "p"}), folder)
    with pytest.raises(run.RunError, match="seed"):
        run.hold(resolve(tiny_recipe, {"seed": 1}), folder)


def test_what_the_files_say(storage: Path, tiny_recipe: dict[str, Any]) -> None:
    folder = begun(storage / "runs" / "r", resolve(tiny_recipe, {"track.mlflow": "a"}))
    judged(folder)
    assert _params(folder)["model.image.tokens"] == "4"
    assert not any(key.startswith("track.") for key in _params(folder))
    assert _figures(folder) == {"test/accuracy": 0.75, "test/accuracy/low": 0.5, "test/accuracy/high": 1.0}
    assert [row["step"] for row in track.unsent(folder, 0.0)] == [1, 1, 2, 2, 3, 3]
    third = track.unsent(folder, 0.0)[3]["time_s"]
    assert [row["step"] for row in track.unsent(folder, third)] == [3, 3]


# ---- a server that is not there


def test_a_server_that_is_down_stops_nothing_and_what_it_missed_is_told(
    storage: Path, tiny_recipe: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    config = resolve(tiny_recipe, {"track.mlflow": "http://127.0.0.1:9"})
    folder = begun(storage / "runs" / "r", config)
    began_s = time.monotonic()
    with track.following(config.track, folder, patience_s=0.5):
        assert time.monotonic() - began_s < 5.0
    assert time.monotonic() - began_s < 60.0
    [missed] = track.left(config.track, folder)
    assert missed.rows == 6
    assert "mlflow does not have 6 lines of figures" in capfd.readouterr().out


# ---- real servers


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_its_going_on_and_its_end_in_a_database(storage: Path, tiny_recipe: dict[str, Any]) -> None:
    place = storage / "tracked"
    config = resolve(tiny_recipe, {"track.mlflow": str(place), "track.experiment": "e"})
    folder = begun(storage / "runs" / "r", config)
    with track.following(config.track, folder, patience_s=300) as end:
        end.status = track.STOPPED
    server = client(database(place))
    [found] = server.search_runs([server.get_experiment_by_name("e").experiment_id])
    assert (found.info.run_name, found.info.status) == ("r", "KILLED")
    # It goes on: two steps behind the second, of which the third is another.
    log = Log(folder, rank=0)
    log.rewind(2)
    write(folder, 3, 5)
    judged(folder)
    with track.following(config.track, folder, patience_s=300):
        pass
    [found] = server.search_runs([server.get_experiment_by_name("e").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["seed"] == "0"
    assert found.data.metrics["train/loss"] == 0.2
    assert found.data.metrics["validation/a/text_image"] == 0.5
    assert found.data.metrics["test/accuracy"] == 0.75
    steps = [each.step for each in server.get_metric_history(found.info.run_id, "train/loss")]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5]
    assert found.data.tags["bundle.sha256"] == storages.digest(folder / "bundle" / "manifest.json")
    files = {each.path for each in server.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "report.html", "evaluation.json", "bundle"} <= files
    assert track.left(config.track, folder) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights_and_biases_offline_writes_what_it_would_send(
    storage: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = resolve(tiny_recipe, {"track.wandb": "project"})
    folder = begun(storage / "runs" / "r", config)
    judged(folder)
    with track.following(config.track, folder, patience_s=300):
        pass
    assert track.left(config.track, folder) == []
    [file] = (folder / "track" / "wandb").glob("offline-run-*/run-*.wandb")
    text = written(file)
    assert {"train/loss", "validation/score"} <= text["history"]
    assert "test/accuracy" in text["summary"]
    assert {"seed", "system", "model.image.tokens", "bundle.sha256"} <= text["config"]


def written(file: Path) -> dict[str, set[str]]:
    """The keys that a file of W&B holds: a log as LevelDB's, of blocks with pieces of records."""
    from wandb.proto import wandb_internal_pb2 as protocol

    found = {"history": set[str](), "summary": set[str](), "config": set[str]()}
    data, at, held = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # a piece's head does not fit: filled up
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = protocol.Record()  # type: ignore[attr-defined]  # made when it is imported
            record.ParseFromString(held)
            held = b""
            found["history"] |= {item.key or "/".join(item.nested_key) for item in record.history.item}
            found["summary"] |= {item.key or "/".join(item.nested_key) for item in record.summary.update}
            found["config"] |= {item.key for item in [*record.config.update, *record.run.config.update]}
    return found


_BLOCK = 32768


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """``mlflow_server()`` starts MLflow's own server on a port that stays the same, and answers its address."""
    pytest.importorskip("flask", reason="the server of MLflow wants Flask: pip install -e '.[dev]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, running = f"http://127.0.0.1:{port}", []

    def start() -> str:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "art"),
        ]  # fmt: skip
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(tmp_path / "server.log", "ab") as log:
            running.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log))
        end = time.monotonic() + MLFLOW_START_S
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    return url
            except OSError:
                assert time.monotonic() < end, (tmp_path / "server.log").read_text()
                time.sleep(0.5)

    start.url = url  # type: ignore[attr-defined]
    yield start
    for process in running:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    import psutil

    from jobs import processes

    if process.poll() is None:
        processes.end(processes.family([psutil.Process(process.pid)]))
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_that_comes_late_gets_everything_and_a_searchs_trials_are_its_children(
    mlflow_server: Callable[[], str], storage: Path, tiny_recipe: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    url: str = mlflow_server.url  # type: ignore[attr-defined]
    config = resolve(tiny_recipe, {"track.mlflow": url})
    folder = storage / "search" / "s"
    storages.publish(folder / "search.yaml", yaml.safe_dump({"recipe": {"seed": 0}, "space": {"trials": 2}}))
    with track.following(config.track, folder, patience_s=300):
        begun(folder / "trials" / "t000", config)
        end = time.monotonic() + MLFLOW_START_S
        while "takes nothing now" not in capfd.readouterr().out:  # it was tried
            assert time.monotonic() < end
            time.sleep(0.2)
        mlflow_server()
        begun(folder / "trials" / "t001", config)
        storages.publish_json(folder / "winner.json", {"score": 0.5})
    assert track.left(config.track, folder) == []
    server = client(url)
    found = server.search_runs([server.get_experiment_by_name("mmagent").experiment_id])
    parent = next(each for each in found if each.info.run_name == "s")
    children = {each.info.run_name: each for each in found if each is not parent}
    assert set(children) == {"s/t000", "s/t001"}
    for each in children.values():
        assert each.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert each.data.metrics["train/loss"] == pytest.approx(1 / 3)
        assert each.info.status == "FINISHED"
    assert parent.data.metrics["search/score"] == 0.5
    assert "search.yaml" in {each.path for each in server.list_artifacts(parent.info.run_id)}
    assert json.loads((folder / "track" / "mlflow.json").read_text())["uri"] == url


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_itself(
    ray_cluster: cluster.Cluster, storage: Path, tiny_recipe: dict[str, Any], tmp_path: Path,
    make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
) -> None:  # fmt: skip
    records = make_records(32)
    make_dataset(storage / "data" / "tiny", {"train": records, "validation": records[:8], "test": records[:8]})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    settings = ["train.max_steps=3", "zero.engine=torch", "train.micro_batch=8", f"track.mlflow={storage}/tracked"]
    assert train.main(["--config", str(tmp_path / "recipe.yaml"), "--name", "r", *settings]) == 0
    server = client(database(storage / "tracked"))
    [found] = server.search_runs([server.get_experiment_by_name("mmagent").experiment_id])
    assert found.info.status == "FINISHED"
    assert {"train/loss", "validation/score", "test/accuracy"} <= set(found.data.metrics)
    assert found.data.tags["bundle"] == "r"
