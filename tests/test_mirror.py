"""Two mirrors of one storage in a real S3 server: what one machine writes, and what another reads."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmagent import bundle, channels, storage
from mmagent.mirror import Mirror
from mmagent.objects import Objects, ObjectsError
from mmagent.record import Record
from mmagent.shards import Dataset
from tests import s3


@pytest.fixture
def other(object_storage: str, tmp_path: Path) -> Iterator[Mirror]:
    """Another machine's mirror of the same storage."""
    made = Mirror(object_storage, tmp_path / "other")
    yield made
    made.close()


def keys(url: str) -> set[str]:
    return {each.key for each in Objects(url).list("") if not each.key.startswith(".")}


def test_what_one_machine_writes_another_reads(object_storage: str, other: Mirror) -> None:
    folder = storage.folder("runs", "first")
    storage.publish_json(folder / "config.yaml", {"seed": 1})
    storage.publish(folder / "bundle" / "weights.safetensors", b"w" * 1000)
    storage.publish(folder / ".draft" / "x", b"x")
    storage.publish(storage.root() / "cluster.json", b"{}")
    storage.send(storage.root())
    assert keys(object_storage) == {"runs/first/config.yaml", "runs/first/bundle/weights.safetensors"}
    there = other.folder / "runs" / "first"
    other.refresh(there)
    assert (there / "config.yaml").is_file()
    assert not (there / "bundle").exists()  # large files when they are wanted
    other.fetch(there)
    assert (there / "bundle" / "weights.safetensors").read_bytes() == b"w" * 1000


def test_only_what_changed_is_sent_again(object_storage: str) -> None:
    file = storage.folder("runs", "first") / "metrics.jsonl"
    storage.publish(file, b"1\n")
    storage.send(file)
    mirror = storage._mirror()
    assert mirror is not None
    assert mirror.changed(storage.root()) == []
    with open(file, "a") as lines:
        lines.write("2\n")
    assert mirror.changed(storage.root()) == [file]
    storage.send(file)
    assert Objects(object_storage).read("runs/first/metrics.jsonl") == b"1\n2\n"


def test_what_seals_a_folder_is_sent_last(object_storage: str) -> None:
    folder = storage.folder("data", "shop")
    for name in ("z.parquet", "a.parquet", "dataset.json"):
        storage.publish(folder / name, name)
        time.sleep(0.01)
    mirror = storage._mirror()
    assert mirror is not None
    assert [file.name for file in mirror.changed(folder)] == ["z.parquet", "a.parquet", "dataset.json"]


def test_newer_comes_and_what_was_not_sent_stays(object_storage: str, other: Mirror) -> None:
    file, there = storage.folder("runs", "x") / "state.json", other.folder / "runs" / "x" / "state.json"
    storage.publish(file, "1")
    storage.send(file)
    other.fetch(there)
    there.write_text("second")
    other.send(there)
    time.sleep(2.1)  # just looked at
    storage.refresh(file)
    assert file.read_text() == "second"
    storage.publish(file, "mine, not sent")
    there.write_text("third, sent")
    other.send(there)
    storage.fetched(file)
    assert file.read_text() == "mine, not sent"


def test_a_removed_folder_is_gone_for_all(object_storage: str, other: Mirror) -> None:
    folder = storage.folder("runs", "old")
    storage.publish(folder / "config.yaml", "x")
    storage.send(folder)
    storage.removed(folder)
    assert keys(object_storage) == set()
    other.fetch(other.folder / "runs")
    assert not (other.folder / "runs" / "old").exists()


def test_a_thread_sends_and_watches(object_storage: str, other: Mirror) -> None:
    file, there = storage.folder("runs", "x") / "metrics.jsonl", other.folder / "runs" / "x" / "metrics.jsonl"
    other.watch(there)
    storage.publish(file, "1\n")
    end = time.monotonic() + 60
    while not there.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert there.read_text() == "1\n"


def test_a_data_set_is_read_where_it_lies(
    object_storage: str, other: Mirror, make_dataset: Callable[..., Dataset], make_records: Callable[..., list[Record]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = make_dataset(storage.folder("data", "tiny"), {"train": make_records(40)})
    storage.send(made.path)
    monkeypatch.setenv("MMAGENT_MIRROR", str(other.folder))
    found = Dataset.open(storage.folder("data", "tiny"))
    assert found.path.is_relative_to(other.folder)
    assert sum(table.num_rows for table in found.read("train")) == 40
    assert not list(found.path.rglob("*.parquet"))
    [shard] = found.shard_files("train")
    assert storage.size(shard) == made.shard_files("train")[0].stat().st_size
    Objects(object_storage).delete(shard.relative_to(other.folder).as_posix())
    other._sizes.clear()
    storage.leave()
    with pytest.raises(ValueError, match="is missing"):
        Dataset.open(storage.folder("data", "tiny"))


def test_a_bundle_and_a_channel_on_another_machine(
    object_storage: str, other: Mirror, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = storage.folder("runs", "shop") / "bundle"
    home.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(tiny_bundle), str(home)], check=True)
    storage.send(home)
    channels.append("production", bundle.find("shop"), share=1.0, act="promote", by="test")
    monkeypatch.setenv("MMAGENT_MIRROR", str(other.folder))
    state = channels.read("production")
    assert state.bundle == "runs/shop/bundle"  # no path of the machine that promoted it
    found = bundle.load(state.bundle)
    assert found.path == other.folder / "runs" / "shop" / "bundle"


def test_storage_that_is_away_at_the_end(object_storage: str, tmp_path: Path) -> None:
    """What could not be sent waits in the mirror; the next process sends it."""
    proxy = s3.Proxy(os.environ["AWS_ENDPOINT_URL"])
    script = (
        "import sys\nfrom mmagent import mirror, storage\nmirror.Mirror.send.__defaults__ = (1.0,)\n"
        "storage.publish(storage.folder('runs', 'x') / 'a.json', 'kept')\n"
        "print('written', flush=True)\nsys.stdin.readline()\n"
    )
    environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url, "MMAGENT_MIRROR": str(tmp_path / "third")}
    run = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "written\n"
    proxy.away = True
    _, said = run.communicate("\n", timeout=200)
    proxy.close()
    assert run.returncode == 1
    assert "1 files wait in" in said
    assert "the next command with this MMAGENT_STORAGE sends them" in said
    environment["AWS_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    subprocess.run([sys.executable, "-c", "from mmagent import storage; storage.root()"], env=environment, check=True)
    assert Objects(object_storage).read("runs/x/a.json") == b"kept"


@pytest.mark.parametrize(
    ("code", "says"), [("AccessDenied", "no credentials, or none with the right"), ("RequestTimeTooSkewed", "clock")]
)
def test_storage_that_refuses_is_told_at_once(
    object_storage: str, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    proxy = s3.Proxy(os.environ["AWS_ENDPOINT_URL"])
    proxy.refuse_writes = code
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    with pytest.raises(storage.StorageError, match=says):
        storage.root()
    proxy.close()


def test_a_clock_that_is_hours_off(object_storage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = time.time()
    monkeypatch.setattr("mmagent.mirror.time.time", lambda: now - 7200)
    with pytest.raises(ObjectsError, match=r"clock of this machine is 120 minutes behind"):
        Mirror(object_storage, tmp_path / "late")


def _hold(url: str, folder: str, ready: object, leave: object) -> None:
    mirror = Mirror(url, Path(folder))
    os.environ |= {"MMAGENT_STORAGE": url, "MMAGENT_MIRROR": folder}
    with storage.lease(mirror.folder / "runs" / "x"):
        ready.set()  # type: ignore[attr-defined]
        leave.wait(120)  # type: ignore[attr-defined]


def test_a_name_is_held_by_one_machine(object_storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here both are processes of one machine: of one that lives the lease holds, of one that was killed it does not."""
    monkeypatch.setattr("mmagent.lease._RENEW_S", 0.5)
    monkeypatch.setattr("mmagent.lease._LOOK_S", 1.5)
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(object_storage, str(tmp_path / "third"), ready, leave))
    process.start()
    assert ready.wait(60)
    with (
        pytest.raises(storage.StorageError, match=f"process {process.pid}"),
        storage.lease(storage.folder("runs", "x")),
    ):
        pass
    process.kill()
    process.join()
    with storage.lease(storage.folder("runs", "x")):
        held = json.loads(Objects(object_storage).read("runs/x/.lease.json"))
        assert held["pid"] == os.getpid()
    assert ".lease.json" not in {each.key.rpartition("/")[2] for each in Objects(object_storage).list("runs")}
