"""A model that writes, in service: it calls tools as its chat template teaches it, and is told how to write."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mmagent.agent.policy import Policy
from mmagent.predictor import Predictor
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service
from tests.test_generate import configured, trained

CALL = '<tool_call>{"name": "paint", "arguments": {"a": "red"}}</tool_call>'
TEMPLATE = (
    "{% if tools %}T{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
PAINTED: list[str] = []


def paint(a: str) -> str:
    """Paints."""
    PAINTED.append(a)
    return "ok"


@pytest.fixture(scope="module")
def predictor(
    writers: dict[str, Path], tiny_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Predictor:
    folder = tmp_path_factory.mktemp("writer") / "decoder"
    shutil.copytree(writers["decoder"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = configured(
        tiny_recipe, folder,
        **{"model.image": None, "model.audio": None, "data.max_text_tokens": 128, "data.max_answer_tokens": 90},
    )  # fmt: skip
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_0", "name": "paint", "arguments": '{"a": "red"}'}],
    }
    told = {"role": "tool", "content": '"ok"', "tool_call_id": "call_0"}
    tools = {"tools": json.dumps([{"type": "function", "function": {"name": "paint"}}])}
    asked = {"role": "user", "content": "red"}
    rows: list[dict[str, Any]] = [
        {"messages": [asked], "target": {"text": CALL}, "meta": tools},
        {"messages": [asked, called, told], "target": {"text": "it is red"}, "meta": tools},
        {"messages": [{"role": "user", "content": "hi"}], "target": {"text": "the blue image"}},
    ]
    records = [parse({"task": "generate", **row}, default_id=str(n)) for n, row in enumerate(rows)]
    _, found = trained(made, records, {"generate": TaskInfo("generate", ())}, steps=250)
    assert [answer.text for answer in found.predict(records)] == [CALL, "it is red", "the blue image"]
    return found


@pytest.fixture
def client(predictor: Predictor, storage: Path) -> Iterator[TestClient]:
    yield from served(predictor, None)


def served(predictor: Predictor, policy: Policy | None) -> Iterator[TestClient]:
    service = Service(predictor, ServeConfig(), policy=policy)
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def said(client: TestClient, words: str, **more: Any) -> Any:
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": words}], **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_agents_tools_are_called_until_it_answers(predictor: Predictor, storage: Path) -> None:
    PAINTED.clear()
    policy = Policy.model_validate({"tools": [{"python": "tests.test_serve_writing:paint"}]})
    for client in served(predictor, policy):
        import tests.test_serve_writing as module

        module.PAINTED.clear()
        reply = said(client, "red")
        assert reply["choices"][0]["message"]["content"] == "it is red"
        assert module.PAINTED == ["red"]
        assert reply["mmagent"]["outcome"] == "tool"
        steps = client.get(f"/v1/answers/{reply['id']}").json()["steps"]
        assert [step["kind"] for step in steps] == ["model", "model", "tool"]


def test_a_clients_tools_are_left_to_it(client: TestClient) -> None:
    tool = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object"}}}
    reply = said(client, "red", tools=[tool])
    [call] = reply["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("paint", {"a": "red"})
    assert (reply["choices"][0]["finish_reason"], reply["choices"][0]["message"]["content"]) == ("tool_calls", None)
    messages = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '"ok"', "tool_call_id": call["id"]},
    ]
    after = client.post("/v1/chat/completions", json={"messages": messages, "tools": [tool]}).json()
    assert after["choices"][0]["message"]["content"] == "it is red"


def test_how_it_is_written(client: TestClient) -> None:
    plain = said(client, "hi", logprobs=True)
    choice = plain["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("the blue image", "stop")
    tokens = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in tokens).strip() == "the blue image"
    assert all(each["logprob"] <= 0 for each in tokens)
    assert math.exp(sum(each["logprob"] for each in tokens)) > 0.5
    assert said(client, "hi", stop="blue")["choices"][0]["message"]["content"] == "the"
    short = said(client, "hi", max_tokens=1)["choices"][0]
    assert short["finish_reason"] == "length"
    assert len(short["message"]["content"]) < len("the blue image")
    drawn = [
        said(client, "hi", temperature=2.0, seed=seed)["choices"][0]["message"]["content"] for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    several = said(client, "hi", n=3, temperature=2.0, seed=5)
    assert [each["index"] for each in several["choices"]] == [0, 1, 2]
    assert len({each["message"]["content"] for each in several["choices"]}) > 1
    assert said(client, "hi")["choices"][0]["message"]["content"] == "the blue image"
    # Without a seed each draws for itself; at temperature 0 several are the likeliest text several times.
    assert len({said(client, "hi", temperature=2.0)["choices"][0]["message"]["content"] for _ in range(6)}) > 1
    alike = said(client, "hi", n=2, temperature=0)["choices"]
    assert {each["message"]["content"] for each in alike} == {"the blue image"}


def test_an_answer_of_a_form_is_streamed_once(client: TestClient) -> None:
    given = {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "response_format": {"type": "json_object"},
    }
    lines = client.post("/v1/chat/completions", json=given).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    told = "".join(part["delta"].get("content") or "" for each in chunks for part in each["choices"])
    assert json.loads(told)["answer"] == "the blue image"


def test_who_listens_hears_a_text_grow(predictor: Predictor) -> None:
    from dataclasses import replace

    heard: list[str] = []
    sample = replace(predictor.prepare(parse({"task": "generate", "text": "hi"})), hear=heard.append)
    other = predictor.prepare(parse({"task": "generate", "text": "red"}))
    [answer, _] = predictor.answer([sample, other])
    assert "".join(heard) == answer.text
    assert len(heard) > 1


def test_words_are_streamed_as_they_are_written(client: TestClient) -> None:
    events = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], "stream": True}
    ).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    pieces = [c["choices"][0]["delta"]["content"] for c in chunks if c["choices"][0]["delta"].get("content")]
    assert "".join(pieces) == "the blue image"
    assert len(pieces) == 3
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert client.get(f"/v1/answers/{chunks[0]['id']}").status_code == 200
    wrong = client.post("/v1/chat/completions", json={"messages": [{"role": "system", "content": "x"}], "stream": True})
    assert wrong.status_code == 422  # before the first word a mistake has its own status
