"""What a submitted job is sent: packed as Ray packs it, every command runs from it, and what is too much is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jobs import parcel
from jobs.parcel import ParcelError

CHECKOUT = Path(__file__).parents[1]
COMMANDS = (
    "prepare", "pretrain", "train", "search", "evaluate", "predict", "promote", "refine", "select", "index", "forget",
    "status", "doctor", "demo",
)  # fmt: skip

# Runs each command as `python -m` does, in one process: what they import, they import once.
EACH = """
import contextlib, io, json, runpy, sys
import jobs, mmagent, serve
found = {"files": [jobs.__file__, mmagent.__file__, serve.__file__]}
for name in sys.argv[1].split(","):
    for flag in ("--help", "--no-such-flag"):
        sys.argv = [name, flag]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_module(name, run_name="__main__")
                code = None
            except SystemExit as ended:
                code = ended.code
        found[name + " " + flag] = [code, out.getvalue()[:60], err.getvalue()[:60]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of this checkout, as Ray packs it."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    file = tmp_path_factory.mktemp("parcel") / "package.zip"
    excludes = ray_constants.get_runtime_env_default_excludes()
    packaging.create_package(str(CHECKOUT), file, include_gitignore=True, excludes=excludes)
    return file


def test_a_checkout_is_sent_as_kilobytes(packed: Path) -> None:
    assert packed.stat().st_size < 2_500_000  # Ray packs without compressing: this is the source itself
    with zipfile.ZipFile(packed) as file:
        sizes = {info.filename: info.file_size for info in file.infolist()}
    assert {"jobs/train.py", "mmagent/config.py", "serve/start.py", "jobs/recipes/easy_vqa.yaml"} <= set(sizes)
    assert not [name for name in sizes if name.startswith(("tests/", ".git/", "docs/", "runs/", ".", "README"))]
    assert parcel.check(CHECKOUT) == sum(sizes.values())


def test_every_command_runs_from_what_is_sent(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as file:
        file.extractall(tmp_path)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    names = [*(f"jobs.{name}" for name in COMMANDS), "serve.start"]
    ran = subprocess.run(
        [sys.executable, "-c", EACH, ",".join(names)], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(tmp_path) for file in found.pop("files"))
    assert len(found) == 2 * len(names)
    for command, (code, out, err) in found.items():
        if command.endswith("--help"):
            assert (code, out[:7]) == (0, "usage: "), command
        else:
            assert (code, err[:7]) == (2, "error: "), command


def test_a_working_directory_of_gigabytes_is_measured_before_it_is_packed(tmp_path: Path) -> None:
    for name, size in (("data/a.bin", 3_000_000_000), ("runs/b/w.bin", 250_000_000), ("code.py", 1000)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # takes no room
    with pytest.raises(ParcelError, match=r"3\.3 GB.*data 3\.0 GB, runs 250 MB.*Write .*\.rayignore.*\(/data /runs\)"):
        parcel.check(tmp_path)
    (tmp_path / ".gitignore").write_text("/runs\n")
    with pytest.raises(ParcelError, match=r"\(/data\)"):
        parcel.check(tmp_path)
    (tmp_path / ".rayignore").write_text("/data\n")
    assert parcel.check(tmp_path) < 2000
    shutil.rmtree(tmp_path / "data")
