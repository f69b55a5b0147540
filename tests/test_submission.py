"""Commands as jobs of a real Ray, and a Ray that cannot be reached: told in one message, with nothing begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from jobs import cluster, submission
from jobs.cluster import Cluster
from jobs.parcel import ParcelError
from mmagent.shards import Dataset
from tests.test_status import VALIDATED, grown

CHECKOUT = Path(__file__).parents[1]
OTHER_VERSION = "2.59.0"


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=CHECKOUT, env={**os.environ, **env}, capture_output=True, text=True,
        check=False, timeout=280,
    )  # fmt: skip


@pytest.fixture
def recipe(storage: Path, tiny_recipe: dict[str, Any], make_dataset: Any, make_records: Any) -> Path:
    """A recipe and its data set."""
    records = make_records(8)
    made: Dataset = make_dataset(storage / "data" / "tiny", {"train": records, "validation": records[:4]})
    assert made.rows("train")
    (storage / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return storage / "recipe.yaml"


def test_a_large_working_directory_is_refused_before_it_is_packed(
    ray_cluster: Cluster, storage: Path, tmp_path: Path
) -> None:
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(2_000_000_000)
    with pytest.raises(ParcelError, match=r"large\.bin 2\.0 GB"):
        submission.run(ray_cluster.dashboard, ["python", "-V"], tmp_path)


@pytest.mark.long
def test_a_wrong_token_is_told_and_nothing_is_begun(ray_cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    wrong = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_ADDRESS": ray_cluster.address}
    ended = command("jobs.train", "--config", str(recipe), "--name", "r", **wrong)
    assert ended.returncode == 2, ended.stderr
    assert "RAY_AUTH_TOKEN_PATH" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (recipe.parent / "runs").exists()
    program = (
        "import sys; from pathlib import Path; from jobs import submission\n"
        "try: submission.run(sys.argv[1], ['python', '-V'], Path('jobs/recipes').resolve())\n"
        "except submission.NoCluster as error: print(error); sys.exit(5)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, ray_cluster.dashboard], cwd=CHECKOUT, env={**os.environ, **wrong},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 5, ended.stderr
    assert "RAY_AUTH_TOKEN_PATH" in ended.stdout


def test_more_gpus_than_there_are_is_told_and_nothing_is_begun(
    ray_cluster: Cluster, recipe: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import evaluate, predict, search, train

    asked = ["--config", str(recipe), "--name", "r", "cluster.gpu=true", "cluster.workers=4"]
    for main in (train.main, search.main):
        assert main(asked) == 2
        assert "cluster.workers=4 want 4 GPUs or more, but the cluster has 0" in capsys.readouterr().err
    assert train.main([*asked, "cluster.min_workers=2"]) == 2
    assert "cluster.min_workers=2 want 2 GPUs" in capsys.readouterr().err
    many = ["--bundle", str(tiny_bundle), "--data", "tiny", "--split", "validation", "--workers", "1000"]
    assert evaluate.main([*many, "--out", "out"]) == 2
    assert "--workers 1000 want 500 CPUs or more, but the cluster has 4" in capsys.readouterr().err
    assert predict.main([*many, "--name", "p"]) == 2
    assert "--workers 1000 want 500 CPUs or more" in capsys.readouterr().err
    assert not (recipe.parent / "runs" / "r").exists()
    assert not (recipe.parent / "search" / "r" / "search.yaml").exists()
    assert not (recipe.parent / "out").exists()


def test_rays_words_on_versions_in_ours() -> None:
    """As Ray itself says them, of what a cluster has written down."""
    from ray._private.utils import check_version_info, compute_version_info

    own_ray, own_python = compute_version_info()
    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": OTHER_VERSION, "python_version": own_python}, "node 10.0.0.1")
    told = cluster.versions(str(raised.value))
    assert f"the cluster runs Ray {OTHER_VERSION} on Python {own_python}, this command Ray {own_ray}" in told
    assert cluster.versions("something else") == ""


def versioned(folder: Path) -> str:
    """A PYTHONPATH in whose processes Ray's number is another one, where Ray itself keeps it."""
    (folder / "sitecustomize.py").write_text(
        "import sys, types\n"
        "module = types.ModuleType('ray._version')\n"
        f"module.version, module.commit = {OTHER_VERSION!r}, 'other'\n"
        "sys.modules['ray._version'] = module\n"
    )
    return os.pathsep.join([str(folder), str(CHECKOUT)])


def test_a_command_of_another_version_is_told_with_both(
    ray_cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:  # fmt: skip
    """The cluster is of the version that is installed; the command is of another."""
    ended = command("jobs.train", "--config", str(recipe), "--name", "r", PYTHONPATH=versioned(tmp_path))
    assert ended.returncode == 2, ended.stderr
    assert f"the cluster runs Ray {ray.__version__}" in ended.stderr
    assert f"this command Ray {OTHER_VERSION}" in ended.stderr
    assert f"=={ray.__version__}'" in ended.stderr
    assert not (recipe.parent / "runs").exists()


@pytest.fixture
def other_ray(tmp_path: Path) -> Iterator[Cluster]:
    """A real cluster whose processes are of another version."""
    started = cluster.start(num_cpus=2, object_store_bytes=100_000_000, env={"PYTHONPATH": versioned(tmp_path)})
    yield started
    cluster.stop(started)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_of_another_version_is_told_with_both(other_ray: Cluster, recipe: Path, tiny_bundle: Path) -> None:
    ended = command("jobs.train", "--config", str(recipe), "--name", "r", **other_ray.environment)
    assert ended.returncode == 2, ended.stderr
    assert f"the cluster runs Ray {OTHER_VERSION}" in ended.stderr
    assert f"this command Ray {ray.__version__}" in ended.stderr
    assert not (recipe.parent / "runs").exists()
    ended = command("serve.start", "--bundle", str(tiny_bundle), **other_ray.environment)
    assert ended.returncode == 2, ended.stderr
    assert OTHER_VERSION in ended.stderr
    assert ray.__version__ in ended.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_through_jobs(
    ray_cluster: Cluster, recipe: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit codes, logs and progress lines, as `python -m` gives them."""

    def job(*words: str) -> int:
        try:
            submission.run(ray_cluster.dashboard, ["python", "-m", *words], CHECKOUT)
        except submission.JobFailed as failed:
            return failed.exit_code
        return 0

    grown(recipe.parent / "runs" / "old", VALIDATED)
    assert job("jobs.status", "--json") == 0
    out = capfd.readouterr().out
    assert json.loads(out[out.index("\n{") :])["runs"][0]["name"] == "old"
    assert job("jobs.train", "--config", str(recipe), "--name", "r", "optim.lrr=1") == 2
    assert "did you mean 'optim.lr'" in capfd.readouterr().out
    rows = [{"id": str(n), "text": f"say {n}", "label": "ab"[n % 2]} for n in range(40)]
    source = recipe.parent / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert job("jobs.prepare", "--source", f"jsonl:{source}", "--name", "d", "--workers", "1") == 0
    assert "40" in capfd.readouterr().out
    settings = ["train.max_steps=2", "zero.engine=torch", "train.micro_batch=4", "train.eval_every_steps=1"]
    words = ["jobs.train", "--config", str(recipe), "--name", "r", "--no-evaluate", *settings]
    assert job(*words) == 0
    out = capfd.readouterr().out
    assert "step 2/2" in out
    assert "bundle " in out
    assert job("jobs.status", "--delete", "nobody") == 2
    assert "there is no run and no search 'nobody'" in capfd.readouterr().out
