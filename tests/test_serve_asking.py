"""What OpenAI's official client gets: choices, log-probabilities, structured answers, tools, embeddings, speech; and
what this service adds: conversations, evidence, traces, feedback."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
from PIL import Image

from mmagent import feedback
from mmagent.predictor import Predictor
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running

QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@pytest.fixture(scope="module")
def address(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MMAGENT_STORAGE", str(tmp_path_factory.mktemp("storage")))
    with running(Service(predictor, ServeConfig(), "production")) as found:
        yield found
    patch.undo()


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def said(client: openai.OpenAI, content: Any = QUESTION, **more: Any) -> Any:
    own = {key: more.pop(key) for key in ("conversation", "explain") if key in more}
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], extra_body=own, **more
    )


def test_answers_in_order_of_likelihood(client: openai.OpenAI) -> None:
    reply = said(client, n=3, logprobs=True, top_logprobs=2)
    answers = [choice.message.content for choice in reply.choices]
    chances = reply.mmagent["probabilities"]
    assert answers == list(chances)[:3]
    first = reply.choices[0].logprobs.content[0]
    assert first.token == answers[0]
    assert math.exp(first.logprob) == pytest.approx(chances[answers[0]], abs=1e-4)
    assert [each.token for each in first.top_logprobs] == answers[:2]
    assert reply.choices[1].logprobs.content[0].logprob < first.logprob


def test_stream_of_several_answers(client: openai.OpenAI) -> None:
    words: dict[int, str] = {}
    ends = {}
    for chunk in said(client, n=2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            words[choice.index] = words.get(choice.index, "") + (choice.delta.content or "")
            ends[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert list(words.values()) == [c.message.content for c in said(client, n=2).choices]
    assert ends == {0: "stop", 1: "stop"}
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_stop_cuts_the_answer(client: openai.OpenAI) -> None:
    whole = said(client).choices[0].message.content
    assert said(client, stop=whole[1:]).choices[0].message.content == whole[0]


def test_structured_answers(client: openai.OpenAI) -> None:
    made = json.loads(said(client, response_format={"type": "json_object"}).choices[0].message.content)
    assert made["label"] == made["answer"]
    assert 0 <= made["confidence"] <= 1
    schema = {
        "type": "object",
        "properties": {"label": {"enum": ["red", "green", "blue", "black"]}, "confidence": {"type": "number"}},
        "required": ["label", "confidence"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}
    assert set(json.loads(said(client, response_format=wanted).choices[0].message.content)) == {"label", "confidence"}
    wanted["json_schema"] = {"name": "x", "schema": {"type": "object", "required": ["nothing"]}}
    with pytest.raises(openai.UnprocessableEntityError, match="does not meet the schema"):
        said(client, response_format=wanted)
    wanted["json_schema"] = {"name": "x", "schema": {"type": "objekt"}}
    with pytest.raises(openai.UnprocessableEntityError, match="no JSON schema"):
        said(client, response_format=wanted)


@pytest.mark.parametrize("reference", ["http://127.0.0.1:9/secret", "file:///etc/hostname", "#/$defs/No", "#"])
def test_a_schema_fetches_nothing_and_ends(client: openai.OpenAI, reference: str) -> None:
    schema = {"type": "object", "properties": {"answer": {"$ref": reference}}} if reference != "#" else {"$ref": "#"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.UnprocessableEntityError, match="no JSON schema that can be used"):
        said(client, response_format=wanted)


def test_a_schemas_patterns_are_not_searched_for(client: openai.OpenAI) -> None:
    endless = "^((.?){30}){8}Z"  # would take longer than anybody waits
    schema = {
        "type": "object",
        "properties": {"label": {"type": "string", "pattern": endless}},
        "patternProperties": {endless: {"type": "number"}},
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert set(json.loads(said(client, response_format=wanted).choices[0].message.content)) == {"label"}


def test_a_classifier_calls_the_tool_of_its_labels_name(client: openai.OpenAI) -> None:
    label = said(client).choices[0].message.content
    tool = {"type": "function", "function": {"name": label, "description": "d", "parameters": {"type": "object"}}}
    other = {"type": "function", "function": {"name": "unrelated", "parameters": {"type": "object"}}}
    reply = said(client, tools=[tool, other], tool_choice="required")
    [call] = reply.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments, reply.choices[0].finish_reason) == (label, "{}", "tool_calls")
    assert reply.mmagent["outcome"] == "call"
    named = {"type": "function", "function": {"name": "unrelated"}}
    assert (
        said(client, tools=[tool, other], tool_choice=named).choices[0].message.tool_calls[0].function.name
        == "unrelated"
    )
    assert said(client, tools=[tool], tool_choice="none").choices[0].message.content == label
    with pytest.raises(openai.UnprocessableEntityError, match="none of the tools has the name"):
        said(client, tools=[other], tool_choice="required")


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["what color is the shape?", "what color is the shape?", "is there a circle?"]
    found = np.array([each.embedding for each in client.embeddings.create(model="tiny", input=texts).data])
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] @ found[2] < 0.9999
    floats = client.embeddings.create(model="tiny", input=texts[0], encoding_format="float").data[0].embedding
    assert found[0] == pytest.approx(np.array(floats), abs=1e-6)
    assert len(client.embeddings.create(model="tiny", input=texts[0], dimensions=8).data[0].embedding) == 8
    with pytest.raises(openai.UnprocessableEntityError, match="dimensions"):
        client.embeddings.create(model="tiny", input="x", dimensions=100_000)
    with pytest.raises(openai.UnprocessableEntityError, match=r"input\[1\]"):
        client.embeddings.create(model="tiny", input=["x", ""])


def test_embeddings_of_pictures(address: str, make_png: Any) -> None:
    item = {"image": base64.b64encode(make_png("red")).decode(), "text": "it"}
    answer = httpx.post(f"{address}/v1/embeddings", json={"input": [item, item]}).json()
    one, two = (np.array(each["embedding"]) for each in answer["data"])
    assert one == pytest.approx(two, abs=1e-6)
    mixed = httpx.post(f"{address}/v1/embeddings", json={"input": [item, "words"]})
    assert (mixed.status_code, "send them apart" in mixed.text) == (422, True)


@pytest.mark.parametrize("format", ["mp3", "wav", "flac", "opus", "pcm"])
def test_speech(client: openai.OpenAI, format: Any) -> None:
    pytest.importorskip("espeakng_loader")
    data = client.audio.speech.create(model="tiny", voice="alloy", input="hello there", response_format=format).content
    if format == "pcm":
        assert len(data) / 2 / 24_000 > 0.3
    else:
        sound, rate_hz = soundfile.read(io.BytesIO(data))
        assert len(sound) / rate_hz > 0.3
        assert np.abs(sound).max() > 0.05


def test_a_spoken_answer(client: openai.OpenAI) -> None:
    pytest.importorskip("espeakng_loader")
    reply = said(client, modalities=["text", "audio"], audio={"voice": "en-gb-scotland", "format": "wav"})
    message = reply.choices[0].message
    sound, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)))
    assert message.audio.transcript == message.content
    assert len(sound) / rate_hz > 0.2
    with pytest.raises(openai.UnprocessableEntityError, match="no voice"):
        said(client, modalities=["text", "audio"], audio={"voice": "xx-nowhere", "format": "wav"})


def test_a_conversation_goes_on(client: openai.OpenAI, address: str, make_png: Any) -> None:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(make_png('red'))}"}}
    first = said(client, [picture, {"type": "text", "text": QUESTION}], conversation="talk-1")
    second = said(client, "and now?", conversation="talk-1")
    assert second.usage.prompt_tokens > said(client, "and now?").usage.prompt_tokens  # what was said before is read too
    assert second.mmagent["conversation"] == "talk-1"
    kept = httpx.get(f"{address}/v1/conversations/talk-1").json()["messages"]
    assert [message["role"] for message in kept] == ["user", "assistant", "user", "assistant"]
    assert kept[1]["content"] == first.choices[0].message.content
    assert httpx.delete(f"{address}/v1/conversations/talk-1").json() == {"id": "talk-1", "deleted": True}
    assert httpx.get(f"{address}/v1/conversations/talk-1").status_code == 404
    anew = said(client, "and now?", conversation="talk-1")
    assert anew.usage.prompt_tokens < second.usage.prompt_tokens


def test_a_full_conversation_is_read_and_deleted(
    client: openai.OpenAI, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.conversations._MOST", 2)
    said(client, "one", conversation="full")
    with pytest.raises(openai.ConflictError, match="all it can have"):
        said(client, "two", conversation="full")
    assert len(httpx.get(f"{address}/v1/conversations/full").json()["messages"]) == 2
    assert httpx.delete(f"{address}/v1/conversations/full").json()["deleted"]


def test_evidence_names_words_regions_and_moments(client: openai.OpenAI, make_png: Any, make_wav: Any) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(make_png('red'))}"}},
        {"type": "input_audio", "input_audio": {"data": b64(make_wav(seconds=0.5)), "format": "wav"}},
        {"type": "text", "text": QUESTION},
    ]
    evidence = said(client, parts, explain=True).mmagent["evidence"]
    assert [QUESTION[t["start"] : t["end"]] for t in evidence["tokens"]] == [t["text"] for t in evidence["tokens"]]
    assert "shape" in [t["text"] for t in evidence["tokens"]]
    [image], [audio] = evidence["images"], evidence["audios"]
    assert np.array(image["grid"]).shape == (8, 8)
    drawn = Image.open(io.BytesIO(base64.b64decode(image["picture"].partition(",")[2])))
    assert min(drawn.size) >= 200
    assert audio["spans"][0][0] == 0
    assert audio["spans"][-1][1] == pytest.approx(0.5, abs=0.05)
    weights = [t["weight"] for t in evidence["tokens"]] + list(np.ravel(image["grid"])) + [s[2] for s in audio["spans"]]
    assert max(weights) == pytest.approx(1, abs=1e-3)
    assert min(weights) >= 0


def test_many_predictions_of_which_one_is_bad(address: str) -> None:
    inputs = [{"text": QUESTION}, {"txt": "x"}, {"text": ""}, {"text": QUESTION, "model": "other"}, 3]
    found = httpx.post(f"{address}/v1/predict", json={"inputs": inputs}).json()["data"]
    assert [each["object"] for each in found] == ["prediction", "error", "error", "error", "error"]
    assert "did you mean 'text'" in found[1]["error"]["message"]
    assert found[3]["error"]["code"] == "model_not_found"
    assert httpx.post(f"{address}/v1/predict", json={"inputs": []}).status_code == 422


def test_a_trace_and_feedback_on_it(client: openai.OpenAI, address: str) -> None:
    reply = said(client)
    trace = httpx.get(f"{address}/v1/answers/{reply.id}").json()
    assert trace["understood"]["label"] == reply.choices[0].message.content
    assert trace["bundle"] == "tiny"
    assert [step["kind"] for step in trace["steps"]] == ["model"]
    body = {"answer": reply.id, "label": "red", "comment": "it is"}
    taken = httpx.post(f"{address}/v1/feedback", json=body).json()
    again = httpx.post(f"{address}/v1/feedback", json=body).json()
    assert (taken["id"], taken["repeated"], again["repeated"]) == (again["id"], False, True)
    [line] = [json.loads(line) for file in feedback.folder().glob("*") for line in file.read_text().splitlines()]
    assert (line["says"], line["feedback"]["label"]) == ("wrong", "red")
    assert line["record"]["messages"][0]["content"] == QUESTION
    for bad in ({"answer": reply.id}, {"answer": reply.id, "verdict": "right", "label": "red"}, {"verdict": "right"},
                {"answer": reply.id, "score": 2}, {"answer": reply.id, "value": "nan"}):  # fmt: skip
        assert httpx.post(f"{address}/v1/feedback", json=bad).status_code == 422, bad
    assert httpx.post(f"{address}/v1/feedback", json={**body, "answer": "ans_no"}).status_code == 404
    assert httpx.delete(f"{address}/v1/answers/{reply.id}").status_code == 200
    assert httpx.get(f"{address}/v1/answers/{reply.id}").status_code == 404


def test_request_ids_and_deadlines(address: str) -> None:
    answer = httpx.post(f"{address}/v1/predict", json={"text": QUESTION}, headers={"x-request-id": "my-own.1"})
    assert answer.headers["x-request-id"] == "my-own.1"
    assert (
        httpx.get(f"{address}/healthz", headers={"x-request-id": "a b\tc"}).headers["x-request-id"].startswith("req_")
    )
    late = httpx.post(f"{address}/v1/predict", json={"text": QUESTION}, headers={"x-request-timeout-ms": "0.001"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert httpx.get(f"{address}/nothing").headers["x-request-id"].startswith("req_")


def test_metrics_count(client: openai.OpenAI, address: str) -> None:
    said(client)
    text = httpx.get(f"{address}/metrics").text
    assert 'mmagent_requests_total{route="/v1/chat/completions",status="200"}' in text
    for name in ("mmagent_stage_seconds", "mmagent_batch_size", "mmagent_confidence", "mmagent_waiting"):
        assert f"# TYPE {name}" in text


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
