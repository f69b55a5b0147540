"""The measurement of a GPU's use: its steps run on a CPU as well, on a tiny decoder, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench import mfu


@pytest.mark.long
def test_a_lora_of_a_decoder_is_counted(tmp_path: Path) -> None:
    mfu.write(tmp_path / "llama", layers=2, width=128, places=64)
    program = (
        "import json; from pathlib import Path; from tests.bench import mfu; mfu.STEPS, mfu.WARM_STEPS = 2, 1; "
        f"print(json.dumps(mfu.measure(Path({str(tmp_path / 'llama')!r}), micro_batch=2, tokens=48)))"
    )  # a process group is for the life of a process
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=240)
    assert run.returncode == 0, run.stderr
    speed = mfu.Speed(*json.loads(run.stdout.splitlines()[-1]))
    assert speed.parameters > 30_000 * 128  # the words at least
    assert speed.tokens_per_s > 0
    assert speed.tflops == pytest.approx(4 * speed.parameters * speed.tokens_per_s / 1e12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mfu.main([], tmp_path) == 0
    assert "not run" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_listed_device_is_known_by_its_name() -> None:
    assert mfu.peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert mfu.peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert mfu.peak_tflops("NVIDIA L4") == 121


@pytest.mark.gpu
def test_a_gpu_measures(tmp_path: Path) -> None:
    assert mfu.main(["--layers", "4", "--width", "512", "--tokens", "512"], tmp_path) == 0
    rows = json.loads((tmp_path / "runs" / "bench" / "mfu.json").read_text())["rows"]
    assert {row["id"] for row in rows} == {"mfu.share", "mfu.tflops", "mfu.tokens_per_s"}
    assert 0 < rows[0]["value"] < 1
