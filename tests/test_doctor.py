"""The doctor names what is missing and the command that mends it, and runs where much is missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cluster, doctor

CHECKOUT = Path(__file__).parents[1]


def test_every_complaint_has_a_remedy(storage: Path) -> None:
    found = list(doctor.checks())
    assert {check.status for check in found} <= {"ok", "warn", "fail"}
    assert not [check for check in found if check.status != "ok" and not check.mend]
    assert {"python", "C++ compiler", "storage root", "memory", "Ray's token", "Ray"} <= {check.name for check in found}


def test_json_and_exit_status_agree(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == int(any(check["status"] == "fail" for check in found))


def test_storage_root_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMAGENT_STORAGE", str(tmp_path / "file" / "root"))
    check = doctor.storage_root()
    assert check.status == "fail"
    assert "export MMAGENT_STORAGE=" in check.mend


def test_a_full_disk_fails(tmp_path: Path) -> None:
    assert doctor.disk("disk", tmp_path, warn_gb=2e6, fail_gb=1e6).status == "fail"
    assert doctor.disk("disk", tmp_path, warn_gb=1e6, fail_gb=0).status == "warn"


def test_no_compiler_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.compiler()
    assert (check.status, check.mend) == ("warn", "apt-get install -y g++")


def test_a_port_that_others_hold_is_named(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((doctor.HOST, 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "the service"})
        (taken,) = doctor.ports()
    (free,) = doctor.ports()
    assert (taken.status, taken.name) == ("warn", f"port {port}")
    assert free.status == "ok"


def test_a_token_that_others_can_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert "none yet" in doctor.auth_token().found
    token.write_text("secret")
    token.chmod(0o644)
    check = doctor.auth_token()
    assert (check.status, check.mend) == ("warn", f"chmod 600 {token}")
    token.chmod(0o600)
    assert doctor.auth_token().status == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor.auth_token().mend == "unset RAY_AUTH_MODE"


def test_a_dead_ray_and_a_broken_record_are_told_apart(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "not running" in doctor.ray().found
    cluster.Cluster("x", "127.0.0.1:1", "http://127.0.0.1:1", 1, "/tmp/none", "2.60.0", 0, ()).save(cluster.record())
    assert doctor.ray().mend == "cluster/local.sh down"
    cluster.record().write_text("{")
    assert doctor.ray().status == "fail"


def test_it_runs_where_packages_are_missing(tmp_path: Path) -> None:
    # A Python that sees the standard library only, as right after `python3.11 -m venv`.
    code = (
        f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\nfrom jobs import doctor; sys.exit(doctor.main(['--json']))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        env={"PATH": os.environ["PATH"], "MMAGENT_STORAGE": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    library = next(check for check in json.loads(run.stdout) if check["name"] == "packages: library")
    assert library["status"] == "fail"
    assert "torch" in library["found"]
    assert library["mend"].startswith("pip install -c constraints.txt")
