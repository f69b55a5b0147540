"""The storage root, names in it, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmagent import storage as places


def test_root_is_made_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAGENT_STORAGE", str(tmp_path / "deep" / "root"))
    assert places.root() == tmp_path / "deep" / "root"
    assert places.root().is_dir()


def test_root_is_below_home_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMAGENT_STORAGE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.root() == tmp_path / "mmagent"


def test_file_url_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAGENT_STORAGE", f"file://{tmp_path}/root")
    assert places.root() == tmp_path / "root"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("wrong://bucket/x", "the storage root wrong://bucket/x cannot be used"),
        ("relative/root", "absolute path is wanted"),
    ],
)
def test_root_that_cannot_be_used_is_refused(value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAGENT_STORAGE", value)
    with pytest.raises(places.StorageError, match=says):
        places.root()


def test_root_on_a_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMAGENT_STORAGE", str(tmp_path / "file" / "root"))
    with pytest.raises(places.StorageError, match="MMAGENT_STORAGE"):
        places.root()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 101, "a b", "é"])
def test_names_that_could_leave_their_folder_are_refused(name: str, storage: Path) -> None:
    with pytest.raises(places.StorageError, match="is no name"):
        places.folder("runs", name)


def test_paths_are_relative_to_the_root_never_to_the_working_directory(storage: Path) -> None:
    assert places.folder("runs", "demo-1.2_x") == storage / "runs" / "demo-1.2_x"
    assert places.resolve("data/shop") == storage / "data" / "shop"
    assert places.resolve("/elsewhere/x") == Path("/elsewhere/x")


def test_publish_replaces_a_file_and_leaves_no_draft(storage: Path) -> None:
    file = storage / "runs" / "a.json"
    places.publish_json(file, {"ä": 1})
    places.publish_json(file, {"ä": 2})
    assert json.loads(file.read_text()) == {"ä": 2}
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


def test_numbers_that_are_none_are_no_json(storage: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        places.publish_json(storage / "a.json", {"loss": float("nan")})


def test_full_disk_leaves_the_old_file_and_no_draft(storage: Path) -> None:
    # A limit on the size of files, which a child process sets for itself, fails a write as a full disk does.
    file = storage / "a.bin"
    places.publish(file, b"good")
    code = f"""
import resource, signal, sys
from pathlib import Path
from mmagent import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    storage.publish(Path({str(file)!r}), b"x" * 100_000)
except OSError as error:
    sys.exit(error.errno)
"""
    checkout = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, env={**os.environ}, check=False)
    assert run.returncode == errno.EFBIG
    assert file.read_bytes() == b"good"
    assert [path.name for path in storage.iterdir()] == ["a.bin"]


def test_a_process_may_be_told_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAGENT_STORAGE", str(tmp_path / "one"))
    places.use({"MMAGENT_STORAGE": str(tmp_path / "two")})
    assert places.root() == tmp_path / "two"
