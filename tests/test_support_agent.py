"""The README's support agent, as it stands there: tickets, a bundle of two tasks, knowledge, rules, a tool; asked over
HTTP."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs import cluster, index, prepare, promote, train
from mmagent import channels
from mmagent.agent import policy
from mmagent.predictor import Predictor
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running

FORMS = {
    "refund": ("I want my money back for order {}", "please refund {}", "give me back what I paid for {}",
               "order {} never came, I want a refund", "refund the payment of {} please"),
    "complaint": ("the box of {} was broken and nobody cares", "this is the worst service I ever had",
                  "your driver was rude to me", "I am very angry about {}", "I complained three times already"),
    "greeting": ("hello there", "good morning", "hi", "good evening to you", "hello, is anybody there"),
}  # fmt: skip


def tickets(count: int) -> list[dict[str, Any]]:
    dice = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        label = dice.choice(list(FORMS))
        form = dice.choice(FORMS[label])
        order = f"{dice.choice('ABC')}-{dice.randint(1000, 9999)}"
        text = form.format(order)
        rows.append({"task": "classify", "text": text, "label": label})
        start = text.find(order)
        spans = [{"start": start, "end": start + len(order), "label": "ORDER"}] if start >= 0 else []
        rows.append({"task": "tag", "text": text, "spans": spans})
    return rows


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_readmes_support_agent(
    ray_cluster: cluster.Cluster, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tickets(400)))
    (tmp_path / "shop_tools.py").write_text(
        'def refund(order: str) -> dict:\n    """Pays an order back."""\n    return {"amount": 12.5, "order": order}\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("shop_tools", None)
    docs = tmp_path / "handbook"
    docs.mkdir()
    (docs / "warranty.md").write_text(
        "# Warranty\n\nThe warranty of every lamp lasts five years from the day it was bought.\n"
    )
    readme = (cluster.CHECKOUT / "README.md").read_text()
    block = re.search(r"<!-- agent -->\n```yaml\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    file = tmp_path / "agent.yaml"
    file.write_text(block[1])

    assert prepare.main(["--source", f"jsonl:{tmp_path / 'tickets.jsonl'}", "--name", "tickets"]) == 0
    recipe = str(cluster.CHECKOUT / "jobs/recipes/small.yaml")
    assert train.main(["--config", recipe, "--name", "support", "data.name=tickets", "train.min_steps=150"]) == 0
    assert index.main(["--docs", str(docs), "--name", "handbook", "--bundle", "support", "--workers", "1"]) == 0
    assert promote.main(["--bundle", "support", "--channel", "production"]) == 0

    bundle = channels.read("production").bundle
    service = Service(Predictor.load(bundle), ServeConfig(), "production", policy=policy.read(file), policy_file=file)
    with running(service) as address:

        def said(words: str, conversation: str | None = None) -> dict[str, Any]:
            body = {"messages": [{"role": "user", "content": words}], "conversation": conversation}
            found: dict[str, Any] = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            return {"words": found["choices"][0]["message"]["content"], **found["mmagent"], "id": found["id"]}

        paid = said("please refund B-7431")
        assert (paid["words"], paid["outcome"]) == ("12.5 euro for order B-7431 are on their way.", "tool")
        trace = httpx.get(f"{address}/v1/answers/{paid['id']}").json()
        assert [step["tool"] for step in trace["steps"] if step["kind"] == "tool"] == ["refund"]
        assert said("I want a refund please")["words"] == "Which order is it about?"
        assert said("hello there")["words"] == "Hello! How can I help?"
        angry = said("this is the worst service I ever had")
        assert (angry["words"], angry["outcome"]) == ("I am sorry. A colleague takes over.", "handover")
        known = said("how many years does the warranty of a lamp last?")
        if known["abstained"]:  # what the model is sure of it answers by its rule, right or wrong
            assert "five years" in known["words"]
