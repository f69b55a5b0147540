"""What operators watch: the replicas of a machine speak with one voice, and the dead are silent."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from serve import logs
from serve.metrics import Metrics

COUNT = """
import sys
from pathlib import Path
from serve.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]))
metrics.requests.labels("/v1/predict", "200").inc(3)
metrics.waiting.inc(5)
metrics.drift.labels("b", "inputs", "all").set(0.7)
"""


def test_replicas_are_added_up_and_those_that_are_gone_wait_for_nobody(tmp_path: Path) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", COUNT, str(tmp_path)], check=True)
    read = "import sys; from pathlib import Path; from serve.metrics import Metrics; "
    read += "print(Metrics(Path(sys.argv[1])).text().decode())"
    done = subprocess.run([sys.executable, "-c", read, str(tmp_path)], check=True, capture_output=True, text=True)
    assert 'mmagent_requests_total{route="/v1/predict",status="200"} 6.0' in done.stdout
    assert "mmagent_waiting 0.0" in done.stdout or "mmagent_waiting 5" not in done.stdout


def test_alone_a_process_speaks_for_itself() -> None:
    metrics = Metrics()
    metrics.abstained.labels("classify", "b").inc()
    assert 'mmagent_abstained_total{bundle="b",task="classify"} 1.0' in metrics.text().decode()


def test_acts_are_on_the_disk_and_requests_in_the_log(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs.audit("deploy", "key_1", "req_1", bundle="b")
    logs.audit("rollback", "key_1", "req_2")
    lines = [json.loads(line) for line in logs.audit_file().read_text().splitlines()]
    assert [(line["act"], line["key"], line.get("bundle")) for line in lines] == [
        ("deploy", "key_1", "b"), ("rollback", "key_1", None),
    ]  # fmt: skip
    assert logs.audit_file().stat().st_mode & 0o077 == 0
    with caplog.at_level(logging.INFO, logger="mmagent.requests"):
        logs.request(route="/v1/predict", status=200)
    assert json.loads(caplog.records[-1].message)["route"] == "/v1/predict"
