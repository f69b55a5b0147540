"""Moving a channel from the command line: through the service that follows it, or by hand where none does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from jobs import promote
from jobs.export import jsonable
from mmagent import bundle, channels
from mmagent.predictor import Predictor
from mmagent.record import Record
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running


@pytest.fixture
def bundles(storage: Path, tiny_bundle: Path, make_records: Callable[..., list[Record]]) -> list[Path]:
    """Two bundles with golden examples; those of the second ask for answers that it does not give."""
    found = []
    for name in ("one", "two"):
        folder = Path(shutil.copytree(tiny_bundle, storage / "runs" / name / "bundle"))
        records = make_records(4, "validation")
        answers = Predictor.load(folder, device="cpu").predict(records)
        golden = [{"record": jsonable(record), "answer": answer.to_dict(timings=False)}
                  for record, answer in zip(records, answers, strict=True)]  # fmt: skip
        if name == "two":
            golden[0]["answer"]["label"] = "no such answer"
        bundle.add(folder, {"golden.jsonl": "".join(json.dumps(row) + "\n" for row in golden)})
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "name": name}))
        found.append(folder)
    return found


def run(*arguments: str) -> int:
    return promote.main(["--channel", "c", *arguments])


def test_without_a_service_golden_examples_are_asked_here(
    bundles: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--bundle", "one") == 0
    assert "No service follows it" in capsys.readouterr().out
    assert channels.read("c").bundle == str(bundles[0])
    assert run("--bundle", "two") == promote.EXIT_REFUSED
    assert "golden example 0 gets another answer here: label is" in capsys.readouterr().err
    assert channels.read("c").bundle == str(bundles[0])
    assert run("--show") == 0
    assert "promote" in capsys.readouterr().out


@pytest.fixture
def followed(bundles: list[Path], storage: Path) -> Iterator[str]:
    channels.append("c", bundles[0], share=1.0, act="promote", by="tests")
    with running(Service(Predictor.load(bundles[0], device="cpu"), ServeConfig(), "c")) as address:
        (storage / "serve").mkdir(exist_ok=True)
        (storage / "serve" / "services.json").write_text(json.dumps({"c": {"url": address}}))
        yield address


def test_through_a_service(
    followed: str, bundles: list[Path], storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    third = Path(shutil.copytree(bundles[0], storage / "runs" / "three" / "bundle"))
    manifest = json.loads((third / "manifest.json").read_text())
    (third / "manifest.json").write_text(json.dumps({**manifest, "name": "three"}))
    assert run("--bundle", "three", "--canary", "0.25") == 0
    assert "a canary of 25% is three; 4 golden examples within" in capsys.readouterr().out
    assert httpx.get(f"{followed}/admin/status").json()["canary"] == "three"
    assert run("--rollback") == 0
    assert "one answers again" in capsys.readouterr().out
    assert run("--bundle", "three") == 0
    assert httpx.get(f"{followed}/admin/status").json()["bundle"] == "three"
    assert run("--bundle", "two") == promote.EXIT_REFUSED
    assert "refused" in capsys.readouterr().err
    assert run("--rollback") == 0
    assert [line["act"] for line in channels.read("c").lines][-2:] == ["promote", "rollback"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--bundle B is wanted"),
        (("--bundle", "nowhere"), "there is no bundle 'nowhere'"),
        (("--bundle", "one", "--canary", "1.5"), "a share above 0 and up to 1 is wanted"),
        (("--bundle", "one", "--canary", "0.5"), "so there is no traffic to share out"),
        (("--rollback",), "there is no channel 'c'"),
        (("--show",), "there is no channel 'c'"),
        (("--bundle", "one", "--url", "http://127.0.0.1:9"), "does not answer"),
    ],
)
def test_mistakes_are_told(
    bundles: list[Path], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
