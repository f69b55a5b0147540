"""Knowledge, from documents to an agent that answers from it where it is unsure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from jobs import cluster, index
from mmagent.agent.policy import Policy
from mmagent.embedder import Embedder
from mmagent.knowledge import KnowledgeBase, KnowledgeError
from mmagent.predictor import Predictor
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "terms.md").write_text(
        "# Refunds\nyour money comes back in a week\n\n# Colours\nthe shape is red or blue\n"
    )
    (folder / "past.jsonl").write_text(json.dumps({"question": "is there a circle?", "answer": "There is one."}) + "\n")
    (folder / "bad.pdf").write_bytes(b"nothing")
    return folder


@pytest.mark.long
def test_documents_are_found_and_quoted(
    ray_cluster: cluster.Cluster, storage: Path, docs: Path, tiny_backbone: Path, tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["--docs", str(docs), "--name", "handbook", "--backbone", str(tiny_backbone), "--workers", "1"]
    assert index.main(arguments) == 0
    shown = capsys.readouterr()
    assert "3 passages of 2 files (3 new)" in shown.out
    assert "left out: bad.pdf" in shown.err
    known = KnowledgeBase.open("handbook")
    best = known.search("is there a circle?", 2)
    assert (best[0].answer, best[0].source) == ("There is one.", "past.jsonl#line=1")
    assert best[0].score == pytest.approx(1, abs=1e-4)
    assert known.search("money", 1)[0].source == "terms.md"  # by its words
    assert known.search("???", 1)

    (docs / "terms.md").write_text("# Refunds\nyour money comes back in a week\n\n# New\nnobody knows\n")
    assert index.main(arguments) == 0
    assert "3 passages of 2 files (1 new)" in capsys.readouterr().out
    assert index.main(["--name", "handbook", "--ask", "nobody"]) == 0
    assert "nobody knows" in capsys.readouterr().out
    assert len(list((storage / "kb" / "handbook").glob("lance-*"))) == 1

    policy = Policy.model_validate(
        {"threshold": 1.0, "unsure": ["retrieve", "handover"], "knowledge": {"name": "handbook", "at_least": 0.99}}
    )
    service = Service(Predictor.load(tiny_bundle), ServeConfig(), policy=policy)
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        body = {"messages": [{"role": "user", "content": "is there a circle?"}]}
        reply = client.post("/v1/chat/completions", json=body).json()
        assert reply["choices"][0]["message"]["content"].startswith("There is one.")
        assert reply["mmagent"]["outcome"] == "retrieved"
        assert reply["mmagent"]["sources"][0]["source"] == "past.jsonl#line=1"
        body["messages"][0]["content"] = "zzz 99 ?!"
        handed = client.post("/v1/chat/completions", json=body).json()
        assert handed["mmagent"]["outcome"] == "handover"
        waiting = client.get("/admin/handovers").json()["data"]
        assert waiting[0]["asked"] == "zzz 99 ?!"
        assert client.post("/admin/handovers/done", json={"id": waiting[0]["id"]}).status_code == 200
        assert client.get("/admin/handovers").json()["data"] == []


def test_mistakes_are_told(
    storage: Path, docs: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, says in (
        (["--name", "x"], "--docs FOLDER is wanted"),
        (["--name", "x", "--docs", str(docs)], "--bundle B"),
        (["--name", "x", "--docs", str(docs / "none"), "--backbone", str(tiny_backbone)], "is no folder"),
        (["--name", "x", "--docs", str(empty), "--backbone", str(tiny_backbone)], "nothing to index"),
        (["--name", "x", "--docs", str(docs), "--bundle", "none"], "there is no bundle"),
        (["--name", "x", "--ask", "y"], "there is no knowledge"),
        (["--name", "../x", "--ask", "y"], "is no name"),
    ):
        assert index.main(arguments) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(KnowledgeError):
        KnowledgeBase.open("x")


def test_vectors_hang_on_the_text_alone(tiny_backbone: Path) -> None:
    embed = Embedder(tiny_backbone)
    texts = ["what color is the shape?", "red", "", "is there a circle in the image? " * 20]
    together, alone = embed(texts), [embed([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert (together**2).sum(1) == pytest.approx(1, abs=1e-5)
