"""Counts what the service does with hostile and broken requests.

    make test-abuse             (python -m tests.bench.abuse)

Sends every case of `tests.abuse` to a real server (tests/test_serve_abuse.py) and writes runs/bench/abuse.json: how
many were tried, how many got another status than their right one, how many answers or logs held content, a key, a path
or a traceback, and after how many the service did not answer any more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs import cluster
from mmagent.arguments import Parser
from mmagent.measurement import Row, publish, table
from tests.test_serve_abuse import OUT


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    Parser("tests.bench.abuse", __doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seen.json"
        command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "tests/test_serve_abuse.py"]
        done = subprocess.run(command, cwd=cluster.CHECKOUT, env={**os.environ, OUT: str(out)}, check=False)
        if not out.exists():
            return done.returncode or 1
        seen = json.loads(out.read_text())
    for case in seen:
        if not case["right"] or case["leaks"] or not case["alive"]:
            print(f"{case['name']}: {case['status']}, leaks {case['leaks']}, alive {case['alive']}")
    rows = [
        Row("abuse.tried", float(len(seen)), "count", "distinct cases", ">= 200"),
        Row("abuse.wrong_status", float(sum(not case["right"] for case in seen)), "count", "not as listed", "<= 0"),
        Row("abuse.leaks", float(sum(bool(case["leaks"]) for case in seen)), "count",
            "answers or logs with content, a key, a path or a traceback", "<= 0"),
        Row("abuse.crashes", float(sum(not case["alive"] or case["status"] >= 500 for case in seen)), "count",
            "cases after which the service was gone, or that it met with an error of its own", "<= 0"),
    ]  # fmt: skip
    publish("abuse", rows, checkout)
    print(table(rows))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
