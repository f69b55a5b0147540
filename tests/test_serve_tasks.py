"""Every task over HTTP: what a request must bring, and that the answer is the library's."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from mmagent import bundle, text
from mmagent.calibration import Calibration
from mmagent.config import resolve
from mmagent.model import MultimodalModel
from mmagent.predictor import Predictor
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service

LABELS = ("blue", "green", "red")
INFOS = {
    task: TaskInfo(task, LABELS, mean=3.0, deviation=2.0)
    for task in ("classify", "classify:mood", "multilabel", "regress", "match", "tag", "relate", "extract")
}
TEXT = "what color is the red circle in a blue image?"
ENDS = [{"start": 14, "end": 28, "label": "head"}, {"start": 34, "end": 44, "label": "tail"}]
BODIES: dict[str, dict[str, Any]] = {
    "classify": {"text": TEXT},
    "classify:mood": {"text": TEXT},
    "multilabel": {"text": TEXT},
    "regress": {"text": TEXT},
    "match": {"text": TEXT, "candidates": ["red", "it is blue", "no"]},
    "tag": {"text": TEXT},
    "relate": {"text": TEXT, "spans": ENDS},
    "extract": {"context": "there is a red circle, not a blue one", "text": "what color is the circle?"},
}
FILLED = {
    "classify": {"label"}, "classify:mood": {"label"}, "multilabel": {"labels"}, "regress": {"value"},
    "match": {"label", "text"}, "tag": {"spans"}, "relate": {"label"}, "extract": {"text", "spans"},
}  # fmt: skip
ANSWERS = {"label", "labels", "value", "text", "spans"}


@pytest.fixture(scope="module")
def predictor(tiny_backbone: Path, tiny_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Of a bundle named ``many`` that answers every kind of task, untrained."""
    config = resolve(tiny_recipe, {})
    encoder, tokenizer = text.load_encoder(str(tiny_backbone)), text.load_tokenizer(str(tiny_backbone))
    torch.manual_seed(1)
    model = MultimodalModel(config.model, make_all(INFOS), encoder.width, None)
    folder = tmp_path_factory.mktemp("bundles") / "many"
    bundle.save(
        folder, name="many", config=config, tasks=INFOS, task="classify", state=model.state_dict(), backbone=encoder,
        tokenizer=tokenizer, calibration={task: Calibration() for task in INFOS}, origin={},
    )  # fmt: skip
    return Predictor.load(folder, device="cpu")


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    service = Service(predictor, ServeConfig(max_views=4))
    with TestClient(build(service)) as client:
        assert client.portal is not None
        client.portal.call(service.warm_up)
        yield client


def predict(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/predict", json=body)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def assert_same(extension: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ANSWERS & set(extension) == ANSWERS & set(expected)
    for name in ("label", "labels", "text"):
        assert extension.get(name) == expected.get(name)
    for name in ("value", "probabilities", "confidence"):
        assert extension.get(name) == pytest.approx(expected.get(name), abs=1e-4)
    assert [{**span, "confidence": None} for span in extension.get("spans", ())] == [
        {**span, "confidence": None} for span in expected.get("spans", ())
    ]


@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("task", INFOS)
def test_the_answer_is_the_librarys(
    client: TestClient, predictor: Predictor, make_png: Any, task: str, with_picture: bool
) -> None:
    picture = make_png("blue")
    body = BODIES[task] | ({"image": picture} if with_picture else {})
    answer = predict(client, task=task, **body | ({"image": b64(picture)} if with_picture else {}))
    assert answer.status_code == 200, answer.text
    extension = answer.json()["mmagent"]
    assert (extension["task"], extension["bundle"]) == (task, "many")
    assert ANSWERS & set(extension) == FILLED[task]
    record = predictor.parse({**body, "task": task})
    [expected] = predictor.predict([record])
    said = expected.to_dict()
    if with_picture and task == "tag":  # stored behind the picture's mark, which the client did not write
        ahead = len(record.messages[-1].content) - len(TEXT)
        said["spans"] = [{**s, "start": s["start"] - ahead, "end": s["end"] - ahead} for s in said["spans"]]
    assert_same(extension, said)


@pytest.mark.parametrize("task", INFOS)
def test_chat_says_the_same(client: TestClient, task: str) -> None:
    body = dict(BODIES[task])
    texts = [body.pop(name) for name in ("context", "text") if name in body]
    content = [{"type": "text", "text": words} for words in texts]
    asked = {"messages": [{"role": "user", "content": content}], "task": task, **body}
    chat = client.post("/v1/chat/completions", json=asked).json()
    one = predict(client, task=task, **BODIES[task]).json()["mmagent"]
    assert_same(chat["mmagent"], one)
    said = chat["choices"][0]["message"]["content"]
    spans = "; ".join(f"{span['text']} ({span['label']})" for span in one.get("spans", ()))
    assert said == {
        "multilabel": ", ".join(one.get("labels", ())) or "none",
        "regress": f"{one.get('value', 0.0):g}",
        "tag": spans or "none",
        "extract": one.get("text") or "no answer",
        "match": one.get("text"),
    }.get(task, one.get("label"))
    assert chat["usage"]["total_tokens"] == chat["usage"]["prompt_tokens"] + chat["usage"]["completion_tokens"]


def test_a_question_without_an_answer_says_so(predictor: Predictor) -> None:
    class Silent(Predictor):  # sure that the text holds no answer
        def __init__(self, like: Predictor) -> None:
            self.__dict__.update(like.__dict__)

        def raws(self, samples: Any, states: Any = None) -> Any:
            return [[] for _ in samples]

    with TestClient(build(Service(Silent(predictor), ServeConfig()))) as client:
        content = "\n".join(("a red circle", "why?"))
        asked = {"messages": [{"role": "user", "content": content}], "task": "extract"}
        answer = client.post("/v1/chat/completions", json=asked).json()
        assert answer["choices"][0]["message"]["content"] == "no answer"
        assert answer["mmagent"]["text"] == ""
        assert answer["mmagent"]["spans"] == []


def test_the_default_task_answers_where_none_is_named(client: TestClient) -> None:
    assert predict(client, text=TEXT).json()["mmagent"]["task"] == "classify"
    health, model = client.get("/healthz").json(), client.get("/v1/models").json()["data"][0]
    for about in (health, model):
        assert (about["task"], set(about["tasks"])) == ("classify", set(INFOS))


def test_spans_count_what_the_client_wrote(client: TestClient, make_png: Any) -> None:
    said = 'is "<image>" a <audio> or a red circle \\'
    parts = [
        {"type": "text", "text": said},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(make_png())}"}},
        {"type": "text", "text": "in a blue image?"},
    ]
    asked = {"messages": [{"role": "user", "content": parts}], "task": "tag"}
    spans = client.post("/v1/chat/completions", json=asked).json()["mmagent"]["spans"]
    assert spans
    for span in spans:
        assert span["text"] == f"{said} in a blue image?"[span["start"] : span["end"]]


def test_a_relation_is_asked_at_the_clients_places(client: TestClient, predictor: Predictor) -> None:
    said = "a <image> red circle is <audio> in a blue image"
    ends = [
        {"start": said.index(words), "end": said.index(words) + len(words), "label": label}
        for words, label in (("red circle", "head"), ("blue image", "tail"))
    ]
    one = predict(client, task="relate", text=said, spans=ends).json()["mmagent"]
    [expected] = predictor.predict([{"task": "relate", "text": said, "spans": ends}])
    assert one["probabilities"] == pytest.approx(dict(expected.probabilities), abs=1e-4)
    parts = [{"role": "user", "content": said}]
    long = predict(client, task="relate", messages=parts, spans=ends).json()["mmagent"]
    assert long["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)


def test_candidates_may_be_pictures(client: TestClient, predictor: Predictor, make_png: Any) -> None:
    pictures = [{"text": "red", "image": make_png("red")}, {"image": make_png("blue")}]
    sent = [{**each, "image": b64(each["image"])} for each in pictures]
    one = predict(client, task="match", text=TEXT, candidates=sent).json()["mmagent"]
    [expected] = predictor.predict([{"task": "match", "text": TEXT, "candidates": pictures}])
    assert_same(one, expected.to_dict())
    damaged = [sent[0], {"image": b64(b"no picture")}]
    error = predict(client, task="match", text=TEXT, candidates=damaged).json()["error"]
    assert error["param"] == "candidates[1].image"
    assert "not a picture" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"task": "sing"}, 422, "task", "its tasks are: 'classify', 'classify:mood', 'extract'"),
        ({"task": "match"}, 422, "candidates", "no candidates"),
        ({"task": "match", "candidates": []}, 422, "candidates", "at least 1"),
        ({"task": "match", "candidates": ["a", {"text": ""}]}, 422, "candidates", "candidates[1] has no text"),
        ({"task": "match", "candidates": ["a", {"txt": ""}]}, 422, "candidates[1].txt", "extra"),
        ({"task": "match", "candidates": ["a"] * 5}, 413, "candidates", "max_views is 4"),
        ({"task": "match", "candidates": [{"image": "AAAA"}] * 17}, 413, "candidates", "max_"),
        ({"task": "classify", "candidates": ["a"]}, 422, "candidates", "of the kind match"),
        ({"task": "relate"}, 422, "spans", "labelled head and tail"),
        ({"task": "relate", "spans": ENDS[:1]}, 422, "spans", "labelled head and tail"),
        ({"task": "relate", "spans": [ENDS[0], {**ENDS[1], "end": 99}]}, 422, "spans[1]", "has 45 characters"),
        ({"task": "relate", "spans": [{**ENDS[0], "label": "x"}]}, 422, "spans[0].label", "'head'"),
        ({"task": "tag", "spans": ENDS}, 422, "spans", "of the kind relate"),
        ({"task": "extract", "context": "red circle " * 200}, 413, None, "max_views is 4"),
    ],
)
def test_what_a_task_wants_is_named(client: TestClient, body: Any, status: int, param: str | None, says: str) -> None:
    answer = predict(client, text=TEXT, **body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert says in error["message"], error


def test_tasks_at_once_do_not_disturb_each_other(client: TestClient) -> None:
    alone = {task: predict(client, task=task, **body).json()["mmagent"] for task, body in BODIES.items()}
    asked = list(BODIES) * 6
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda task: predict(client, task=task, **BODIES[task]).json()["mmagent"], asked))
    for task, extension in zip(asked, together, strict=True):
        assert_same(extension, alone[task])
