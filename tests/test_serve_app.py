"""The HTTP application around a real predictor, without Ray: every form of request, and what bad input gets."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mmagent.predictor import Predictor
from serve.app import build
from serve.config import ServeConfig
from serve.ids import new_id
from serve.service import Service

QUESTION = "what color is the shape?"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


HUGE_PNG = (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", struct.pack(">II5B", 50_000, 50_000, 8, 2, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress(bytes(64)))
)


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    yield from _client(predictor, ServeConfig(max_body_bytes=2_000_000))


def _client(predictor: Predictor, config: ServeConfig) -> Iterator[TestClient]:
    yield from _client_of(Service(predictor, config, "production"))


def _client_of(service: Service) -> Iterator[TestClient]:
    with TestClient(build(service), raise_server_exceptions=True) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(data)}"}}


def audio(data: bytes, format: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": b64(data), "format": format}}


def words(text: str = QUESTION) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(client: TestClient, *parts: Any, **more: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": list(parts)}], **more})


def assert_error(answer: Any, status: int, param: str | None, *says: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    for text in says:
        assert text in error["message"], error
    return error


# ---- what is asked ---------------------------------------------------------------------------------------------------
def test_chat_answers_as_the_library_does(client: TestClient, predictor: Predictor, make_png: Any) -> None:
    body = ask(client, image(make_png("red")), words(), model="tiny").json()
    [expected] = predictor.predict([{"text": QUESTION, "image": make_png("red")}])
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("ans_")
    assert body["model"] == "tiny"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": expected.label, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 1
    extension = body["mmagent"]
    assert extension["probabilities"] == pytest.approx(dict(expected.probabilities), abs=1e-4)
    assert extension["confidence"] == pytest.approx(expected.confidence, abs=1e-4)
    assert (extension["task"], extension["bundle"], extension["channel"]) == ("classify", "tiny", "production")
    assert set(extension["timings_ms"]) >= {"decode", "queue", "forward", "total"}


def test_predict_gives_the_same_answer_in_both_forms(client: TestClient, make_png: Any, make_wav: Any) -> None:
    short = client.post("/v1/predict", json={"image": b64(make_png()), "audio": b64(make_wav()), "text": "it?"}).json()
    parts = [image(make_png()), audio(make_wav()), words("it?")]
    long = client.post("/v1/predict", json={"messages": [{"role": "user", "content": parts}]}).json()
    assert short["object"] == "prediction"
    assert short["mmagent"]["label"] == long["mmagent"]["label"]
    assert short["mmagent"]["probabilities"] == pytest.approx(long["mmagent"]["probabilities"], abs=1e-5)


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
def test_sound_of_every_format(client: TestClient, make_wav: Callable[..., bytes], format: str) -> None:
    assert ask(client, audio(make_wav(format=format.upper()), format)).status_code == 200


def test_several_messages_and_roles(client: TestClient, make_png: Any) -> None:
    messages = [
        {"role": "developer", "content": "Answer shortly."},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}],
        },
        {"role": "tool", "content": "blue", "tool_call_id": "c"},
        {"role": "user", "content": [words(), image(make_png())], "name": "ann"},
    ]
    assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200


def test_stream_speaks_openais_chunks(client: TestClient) -> None:
    answer = ask(client, words(), stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[1]["choices"][0]["delta"]["content"] == chunks[2]["mmagent"]["label"]
    assert chunks[2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[3]["choices"] == []
    assert chunks[3]["usage"]["completion_tokens"] == 1
    assert "usage" not in ask(client, words(), stream=True).text


def test_parameters_of_openai_clients_are_ignored(client: TestClient) -> None:
    more = {"temperature": 0.2, "top_p": 1, "max_tokens": 5, "seed": 1, "user": "u", "metadata": {}, "store": False,
            "n": 1, "stop": None, "tools": [], "response_format": {"type": "text"}, "logprobs": False,
            "parallel_tool_calls": True, "service_tier": "auto", "never_heard_of": 1}  # fmt: skip
    assert ask(client, words(), **more).status_code == 200


@pytest.mark.parametrize("placeholder", ["<image>", "<audio>", r"\<image>", "<image><image>"])
def test_a_typed_placeholder_is_text_and_media_do_not_shift(
    client: TestClient, predictor: Predictor, make_png: Any, placeholder: str
) -> None:
    said = f"is {placeholder} red?"
    body = ask(client, words(said), image(make_png("blue"))).json()
    assert body["usage"]["prompt_tokens"] == len(predictor.inputs.tokenize([said])[0])
    assert ask(client, words(said)).status_code == 200
    assert client.post("/v1/predict", json={"text": said}).status_code == 200


def test_a_backslash_before_a_picture_does_not_escape_it(client: TestClient, make_png: Any) -> None:
    with_it = ask(client, words("what\\"), image(make_png("blue"))).json()
    without = ask(client, words("what\\")).json()
    assert with_it["mmagent"]["probabilities"] != without["mmagent"]["probabilities"]


def test_models_health_and_documentation(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "production"]
    assert client.get("/v1/models/tiny").json()["object"] == "model"
    assert ask(client, words(), model="production").status_code == 200
    health = client.get("/healthz").json()
    assert (health["status"], health["reason"], health["bundle"]) == ("ready", None, "tiny")
    assert health["modalities"] == ["text", "image", "audio"]
    assert (health["task"], health["tasks"], listed["data"][0]["tasks"]) == ("classify", ["classify"], ["classify"])
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/chat/completions", "/v1/predict", "/v1/embeddings", "/v1/models", "/v1/models/{name}", "/healthz",
        "/v1/conversations/{id}", "/v1/answers/{id}", "/v1/feedback", "/v1/audio/speech", "/metrics",
        "/admin/status", "/admin/bundles", "/admin/rollback", "/admin/handovers", "/admin/handovers/done",
        "/admin/questions", "/admin/audit", "/admin/queue", "/admin/rounds", "/admin/labels",
    }  # fmt: skip
    assert schema["components"]["schemas"]["ChatRequest"]["examples"]
    example, *_ = schema["components"]["schemas"]["PredictRequest"]["examples"]
    assert client.post("/v1/predict", json=example).status_code == 200


def test_documentation_loads_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/docs", "/redoc"):
        page = client.get(path)
        assert page.status_code == 200
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"([^\"]+)\"", page.text)
        assert len(loaded) > 1
        for address in loaded:
            assert address.startswith("/")
            assert client.get(address).status_code == 200


def test_health_says_why_it_is_not_ready(predictor: Predictor) -> None:
    with TestClient(build(Service(predictor, ServeConfig()))) as client:
        answer = client.get("/healthz")
    assert answer.status_code == 503
    assert answer.json()["reason"] == "the model is warming up"


def test_ids_are_ulids_in_order_of_time() -> None:
    ids = [new_id("ans") for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(len(id) == 30 and set(id[4:]) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ") for id in ids)
    assert ids[0][4:14] <= ids[-1][4:14]


# ---- what bad input gets ---------------------------------------------------------------------------------------------
def test_no_picture(client: TestClient) -> None:
    assert_error(ask(client, words(), image(b"GIF? no")), 422, "messages[0].content[1]", "not a picture")


def test_cut_picture(client: TestClient, make_png: Any) -> None:
    cut = make_png(size=(200, 200))[:-40]
    assert_error(ask(client, words(), image(cut)), 422, "messages[0].content[1]")


@pytest.mark.parametrize("format", ["WAV", "FLAC"])
def test_cut_sound(client: TestClient, make_wav: Any, format: str) -> None:
    data = make_wav(format=format)
    assert_error(ask(client, audio(data[: len(data) // 2], format.lower()), words()), 422, "messages[0].content[0]")


@pytest.mark.parametrize(
    "bad", ["data:image/png;base64,@@@", "data:image/png;base64,abc", "data:image/png,abc", "AAAA"]
)
def test_wrong_base64(client: TestClient, bad: str) -> None:
    part = {"type": "image_url", "image_url": {"url": bad}}
    assert_error(ask(client, words(), part), 422, "messages[0].content[1]")
    sound = {"type": "input_audio", "input_audio": {"data": "not base64!", "format": "wav"}}
    assert_error(ask(client, sound), 422, "messages[0].content[0]", "base64")
    assert_error(client.post("/v1/predict", json={"image": "not base64!"}), 422, "image", "base64")
    assert_error(client.post("/v1/predict", json={"image": "/etc/passwd"}), 422, "image")


def test_too_many_pixels_are_refused_by_the_header(client: TestClient) -> None:
    error = assert_error(ask(client, image(HUGE_PNG)), 413, "messages[0].content[0]", "max_image_pixels", "1000000")
    assert error["code"] == "media_too_large"
    assert_error(client.post("/v1/predict", json={"image": b64(HUGE_PNG)}), 413, "image", "max_image_pixels")


def test_too_long_sound_is_refused_by_the_header(client: TestClient, make_wav: Any) -> None:
    long = make_wav(seconds=600, rate_hz=1000, format="FLAC")
    assert_error(ask(client, audio(long, "flac")), 413, "messages[0].content[0]", "max_audio_s", "600")


def test_a_body_over_the_limit_is_refused_by_its_length_and_by_its_chunks(client: TestClient) -> None:
    big = b'{"messages": "' + b"x" * 2_100_000 + b'"}'
    answer = client.post("/v1/chat/completions", content=big)
    assert_error(answer, 413, None, "max_body_bytes", "2000000")
    read = 0

    def chunks() -> Iterator[bytes]:
        nonlocal read
        for _ in range(300):
            read += 1
            yield b"x" * 100_000

    assert_error(client.post("/v1/chat/completions", content=chunks()), 413, None, "max_body_bytes")


def test_too_many_media(client: TestClient, make_png: Any) -> None:
    assert_error(ask(client, *[image(make_png())] * 17), 413, "messages", "max_media", "16")


@pytest.mark.parametrize(
    "url",
    ["https://example.com/a.png", "http://127.0.0.1/x", "file:///etc/passwd", "ftp://h/x", "HTTP://h", "gopher:x"],
)
def test_addresses_are_refused_and_the_setting_is_named(client: TestClient, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    place = "messages[0].content[1]"
    assert_error(ask(client, words(), part), 422, place, "--allow-media-host", "allowed now: none", "data:image/png")


def test_video_is_not_supported_yet(client: TestClient) -> None:
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    assert_error(ask(client, words(), video), 422, "messages[0].content[1]", "video_url", "not supported yet")
    assert_error(ask(client, {"type": "smell"}), 422, "messages[0].content[0]", "smell", "image_url")


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        (b"{", 400, None, "not JSON"),
        (b"", 422, None, "JSON object is wanted"),
        (b"\xff\xfe", 400, None, "JSON"),
        (b"[" * 100_000, 400, None, "JSON"),
        (b"[]", 422, None, "a list, but a JSON object"),
        (b"{}", 422, "messages", "missing"),
        (b'{"messages": []}', 422, "messages", "at least 1"),
        (b'{"messages": "hi"}', 422, "messages", "'hi'"),
        (b'{"messages": [1]}', 422, "messages[0]", "JSON object"),
        (b'{"messages": [{"role": "god", "content": "x"}]}', 422, "messages[0].role", "'god'"),
        (b'{"messages": [{"role": "user", "content": 3}]}', 422, "messages[0].content", "3"),
        (b'{"messages": [{"role": "user", "content": [3]}]}', 422, "messages[0].content[0]", "JSON object"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', 422,
         "messages[0].content[0].text", "missing"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}', 422,
         "messages[0].content[0].image_url", "JSON object"),
        (b'{"messages": [{"role": "user", "content": ""}]}', 422, None, "no text, picture or sound"),
        (b'{"messages": [{"role": "user"}]}', 422, None, "no text, picture or sound"),
        (b'{"messages": [{"role": "system", "content": "x"}]}', 422, "messages", "no message of the user"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 9}', 422, "n", "4 answers to choose from"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 0}', 422, "n", "greater than or equal to 1"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', 422, "tools[0].type", "missing"),
        (b'{"messages": [{"role": "user", "content": "x"}], "functions": [{}]}', 422, None, "send tools"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}', 422, None, "wants logprobs"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 9}', 422, "temperature", "less than"),
        (b'{"messages": [{"role": "user", "content": "x"}], "stop": ["", "b", "c", "d", "e"]}', 422, None,
         "4 at most"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}', 422, None, "no tools"),
        (b'{"messages": [{"role": "user", "content": "x"}], "conversation": "a b"}', 422, "conversation", "letters"),
        (b'{"messages": [{"role": "user", "content": "x"}], "stream": "maybe"}', 422, "stream", "'maybe'"),
        (b'{"messages": [{"role": "user", "content": "x"}], "model": "gpt-9"}', 404, "model", "'tiny', 'production'"),
    ],
)  # fmt: skip
def test_bad_bodies(client: TestClient, body: bytes, status: int, param: str | None, says: str) -> None:
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert_error(answer, status, param, says)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"txt": "x"}, None, "did you mean 'text'"),
        ({}, None, "either messages is wanted"),
        ({"text": "x", "messages": [{"role": "user", "content": "x"}]}, None, "either messages"),
        ({"text": ""}, None, "no text, picture or sound"),
        ({"audio": b64(b"noise")}, "audio", "not a sound"),
    ],
)
def test_bad_predictions(client: TestClient, body: Any, param: str | None, says: str) -> None:
    assert_error(client.post("/v1/predict", json=body), 422, param, says)


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert_error(client.get("/v1/nothing"), 404, None, "/docs")
    assert_error(client.get("/v1/models/other"), 404, "model", "'tiny'")
    answer = client.get("/v1/chat/completions")
    assert_error(answer, 405, None, "POST")
    assert answer.headers["allow"] == "POST"


def test_an_unexpected_error_tells_nothing(predictor: Predictor) -> None:
    class Broken(Predictor):
        def __init__(self, like: Predictor) -> None:
            self.__dict__.update(like.__dict__)

        def answer(self, samples: Any) -> Any:
            if any(len(sample.views[0].ids) > 12 for sample in samples):
                raise ZeroDivisionError("secret")
            return super().answer(samples)

    for client in _client(Broken(predictor), ServeConfig()):
        error = assert_error(ask(client, words("shape " * 20)), 500, None)
        assert "secret" not in json.dumps(error)
        assert ask(client, words("shape")).status_code == 200
        for _ in range(3):
            ask(client, words("shape " * 20))
        assert "forward passes failed" in client.get("/healthz").json()["reason"]


# ---- keys and load ---------------------------------------------------------------------------------------------------
def test_keys(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.config import key_hashes

    monkeypatch.setenv("MMAGENT_API_KEYS", "first-key-of-sixteen, second-key-of-sixteen")
    config = ServeConfig(host="0.0.0.0", key_hashes=key_hashes())
    assert "first" not in config.model_dump_json()
    for client in _client(predictor, config):
        assert client.get("/healthz").status_code == 200
        assert_error(client.get("/v1/models"), 401, None, "an API key is wanted")
        wrong = client.get("/v1/models", headers={b"Authorization": "Bearer no\u00e9".encode("latin-1")})
        assert assert_error(wrong, 401, None, "wrong")["type"] == "authentication_error"
        for headers in ({"Authorization": "Bearer first-key-of-sixteen"}, {"x-api-key": "second-key-of-sixteen"}):
            assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_full_service_says_when_to_come_back(predictor: Predictor) -> None:
    service = Service(predictor, ServeConfig(max_waiting=1))
    for client in _client_of(service):
        service.waiting = 1
        answer = ask(client, words())
        assert_error(answer, 503, None, "try again")
        assert answer.headers["retry-after"] == "1"
        service.waiting = 0
        assert ask(client, words()).status_code == 200
