"""The image: what its Dockerfile promises; and its own steps, run in a clean Debian made by debootstrap."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cluster
from tests.dockerfile import Builder, Stage, assignments, read

FILE = cluster.CHECKOUT / "cluster/Dockerfile"
SUITE = "bookworm"


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return read(FILE)[1]


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((cluster.CHECKOUT / "pyproject.toml").read_text())["project"]
    return found


def ignored() -> list[str]:
    """The patterns that let something into the build."""
    lines = (cluster.CHECKOUT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "what is not named must stay at home"
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_tools_that_build_stay_out_of_what_is_shipped(stages: list[Stage]) -> None:
    names = [stage.name for stage in stages]
    assert names == ["builder", "runtime"]
    shipped = " ".join(stages[-1].all("RUN"))
    assert not re.search(r"\bpip install|python3[\d.]*-venv|\bgcc\b|\bgit\b|build-essential", shipped)
    assert all(words.startswith("--from=builder ") for words in stages[-1].all("COPY") if "/opt/" in words)


def test_nobody_is_root_and_the_home_is_theirs(stages: list[Stage]) -> None:
    last = stages[-1]
    [user] = last.all("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, which Kubernetes can tell from root"
    uid = user.partition(":")[0]
    [made] = [run for run in last.all("RUN") if "useradd" in run]
    assert f"--uid {uid}" in made
    values = assignments(last.all("ENV")[0])
    for variable in ("HOME", "MMAGENT_STORAGE"):
        assert values[variable] in made or values[variable] == "/home/mmagent", variable
    after = [step.word for step in last.steps[[step.word for step in last.steps].index("USER") :]]
    assert "RUN" not in after
    assert "COPY" not in after


def test_every_package_has_its_version(stages: list[Stage]) -> None:
    versions = dict(
        line.split("==") for line in (cluster.CHECKOUT / "constraints.txt").read_text().split() if "==" in line
    )
    runs = [run for stage in stages for run in stage.all("RUN") if "pip install" in run]
    assert runs
    for run in runs:
        for command in run.split("&&"):
            assert "pip install" not in command or "-c constraints.txt" in command, command
    for name in ("cyclonedx-bom", "torch", "ray", "setuptools"):
        assert name in versions, f"constraints.txt has no {name}"
    lines = (cluster.CHECKOUT / "cluster/vms.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", line) for line in lines if not line.startswith("#")), lines
    values = assignments(stages[0].all("ENV")[0])
    assert values["PIP_CONSTRAINT"].endswith("/constraints.txt")


def test_extras_exist(stages: list[Stage]) -> None:
    [extras] = [words.partition("=")[2] for words in stages[0].all("ARG") if words.startswith("EXTRAS=")]
    known = project()["optional-dependencies"]
    assert isinstance(known, dict)
    assert not set(extras.split(",")) - set(known)
    assert "cluster" in extras.split(",")


def test_python_is_one_that_the_project_allows(stages: list[Stage]) -> None:
    found = {version for stage in stages for run in stage.all("RUN") for version in re.findall(r"python3\.(\d+)", run)}
    assert len(found) == 1, "one Python in all stages: a venv is bound to its own"
    least, below = re.findall(r"3\.(\d+)", str(project()["requires-python"]))
    assert int(least) <= int(found.pop()) < int(below)


def test_what_is_copied_exists_and_may_be_seen(stages: list[Stage]) -> None:
    let_in = ignored()
    for stage in stages:
        for words in stage.all("COPY"):
            *sources, _ = [word for word in words.split() if not word.startswith("--")]
            if "--from=" in words:
                assert words.split()[0].removeprefix("--from=") in [each.name for each in stages]
                continue
            for source in sources:
                assert (cluster.CHECKOUT / source).exists(), source
                assert any(fnmatch.fnmatch(source, pattern) for pattern in let_in), f".dockerignore hides {source}"
    copied = " ".join(words for stage in stages for words in stage.all("COPY")).split()
    assert not set(let_in) - set(copied), "let in, and used by nobody"


def test_no_secret_is_in_it() -> None:
    text = FILE.read_text()
    assert not re.search(r"(?i)(token|password|secret|api_key)\s*=\s*['\"]?(?!token\b)\w", text)
    assert not re.search(r"AKIA|-----BEGIN|ghp_|hf_[A-Za-z]{10}", text)
    assert "MMAGENT_API_KEYS" not in text
    assert "RAY_AUTH_TOKEN" not in text


def test_signals_health_and_the_default_command(stages: list[Stage]) -> None:
    last = stages[-1]
    [entry], [command], [health] = last.all("ENTRYPOINT"), last.all("CMD"), last.all("HEALTHCHECK")
    assert json.loads(entry)[0] == "/usr/bin/tini"
    program, flag, module = json.loads(command)
    assert (program, flag) == ("python", "-m")
    assert (cluster.CHECKOUT / f"{module.replace('.', '/')}.py").is_file()
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    [(port, path)] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\S+)", health)
    assert int(port) == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    assert path in PUBLIC_EXACT_PATHS, "it would need a token"
    installed = " ".join(last.all("RUN"))
    for tool in ("tini", "wget", "rsync", "openssh-client"):
        assert tool in installed, tool


def test_no_ray_starts_without_a_token(stages: list[Stage]) -> None:
    values = assignments(stages[-1].all("ENV")[0])
    assert values["RAY_AUTH_MODE"] == "token"


# ---- its steps, run --------------------------------------------------------------------------------------------------
def missing() -> str:
    """What this machine lacks to run the steps; nothing: it can."""
    if os.geteuid() != 0:
        return "chroot wants root"
    lacks = [tool for tool in ("debootstrap", "chroot", "unshare", "ip") if shutil.which(tool) is None]
    return f"{' and '.join(lacks)} not installed (Debian, Ubuntu: apt-get install debootstrap)" if lacks else ""


def way_to_packages(place: Path) -> tuple[dict[str, str], tuple[Path, ...]]:
    """This machine's pip configuration and certificates for a chroot: variables, and folders that it must see."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    variables: dict[str, str] = {}
    mounts: set[Path] = set()
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        variable = f"PIP_{name.rpartition('.')[2].replace('-', '_').upper()}"
        value = value.strip("'\"")
        if variable in ("PIP_CERT", "PIP_CONSTRAINT"):
            continue  # the first has its place below, the second is the file's own
        variables[variable] = value
        for word in value.split():
            folder = Path(word.removeprefix("file://"))
            if folder.is_absolute() and folder.is_dir():
                # An index beside its files: both are seen.
                mounts.add(folder.parent if word.startswith("file://") else folder)
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if bundle.is_file():
        shutil.copy(bundle, place / "host-ca.crt")
        variables["PIP_CERT"] = "/host/host-ca.crt"
    return variables, tuple(sorted(mounts))


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Builder, dict[str, str]]]:
    """The image's last stage as a folder, with its environment."""
    if lacks := missing():
        pytest.skip(lacks)
    # Not below the folder of pytest: what is kept of it between sessions would be gigabytes.
    place = Path(subprocess.check_output(["mktemp", "-d", "/tmp/mmagent-image-XXXXXX"], text=True).strip())
    try:
        base = place / "base"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, str(base)],
            check=True, stdout=subprocess.DEVNULL, timeout=900,
        )  # fmt: skip
        shutil.copy("/etc/resolv.conf", base / "etc/resolv.conf")
        (base / "host").mkdir()
        variables, mounts = way_to_packages(base / "host")
        defaults, stages = read(FILE)
        assert {stage.base for stage in stages} == {"${BASE}"}
        assert SUITE in defaults["BASE"], "the base that is built on here is another one"
        builder = Builder(base, place, cluster.CHECKOUT, variables, mounts)
        arguments = {"TORCH_INDEX": os.environ.get("TORCH_INDEX", "")}
        for stage in stages:
            environment = builder.build(stage, arguments)
        yield builder, environment
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(place)], check=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_its_steps_make_a_system_that_works(built: tuple[Builder, dict[str, str]]) -> None:
    builder, environment = built
    root, where, user = builder.roots["runtime"], environment.pop("WORKDIR"), environment.pop("USER")

    def run(command: str) -> str:
        return builder.run(root, command, environment, where, user, offline=True)

    assert run("id -u && id -g").split() == user.split(":")
    found = {check["name"]: check for check in json.loads(run("python -m jobs.doctor --json || true"))}
    for name in ("python", "packages: library", "packages: cluster", "storage root"):
        assert found[name]["status"] == "ok", found[name]
    assert not [check for check in found.values() if check["status"] == "fail"], found
    loaded = run(
        "python -c 'import boto3, googleapiclient.discovery, mmagent, torch, ray, deepspeed, serve.replica; "
        "import jobs.train; from mmagent import Predictor; "
        "print(mmagent.__file__, Predictor.__name__, torch.zeros(2).sum().item())'"
    )
    assert loaded.split()[-3:] == ["/app/mmagent/__init__.py", "Predictor", "0.0"]
    assert run("touch $HOME/x $MMAGENT_STORAGE/x && (touch /app/x 2>&1 || echo refused)").strip().endswith("refused")
    # A real Ray in it: head with a token of its own, as the user; and the probe of the health check.
    answered = run(
        # Ray gives its parts 30 s to be there, which a busy machine may miss.
        "ray get-auth-token --generate >/dev/null 2>&1; for each in 1 2 3; do ray start --head --num-cpus=1 "
        "--include-dashboard=true --object-store-memory=100000000 >/tmp/ray.txt 2>&1 && break; done; "
        "for each in $(seq 60); do wget -q -T 4 -O - http://127.0.0.1:52365/api/local_raylet_healthz && break; "
        "sleep 1; done; true"
    )
    assert "success" in answered, (root / "tmp/ray.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_in_it_is_listed(built: tuple[Builder, dict[str, str]]) -> None:
    builder, _ = built
    folder = builder.roots["runtime"] / "usr/share/mmagent/sbom"
    document = json.loads((folder / "python.cdx.json").read_text())
    assert document["bomFormat"] == "CycloneDX"
    versions = {part["name"].lower(): part["version"] for part in document["components"]}
    assert versions["ray"] == "2.60.0"
    assert versions["torch"].startswith("2.13.0")
    assert "cyclonedx-bom" not in versions
    packages = {line.split()[0] for line in (folder / "debian.txt").read_text().splitlines()}
    assert {"tini", "python3.11", "rsync"} <= packages
