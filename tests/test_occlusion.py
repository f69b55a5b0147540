"""Evidence for models that join at the input and for native ones: a trained toy loses most by what it looks at."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from mmagent import explain, text
from mmagent.answer import Answer
from mmagent.evidence import BINS, GRID, Evidence, ExplainError, Place
from mmagent.occlusion import _words, unsaid
from mmagent.predictor import Predictor
from mmagent.record import Message, Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service
from tests import multimodal
from tests.test_soft import Made, configured

COLOURS = ("blue", "red", "black")  # black: there is no patch, so that the others hang on theirs
CHOOSES = {"classify": TaskInfo("classify", COLOURS)}
WRITES = {"generate": TaskInfo("generate")}
SIDE, PATCH = 32, 12


def patched(colour: str, corner: tuple[int, int]) -> bytes:
    """A black picture with a patch of a colour in a corner."""
    picture = Image.new("RGB", (SIDE, SIDE), "black")
    row, column = (place * (SIDE - PATCH) for place in corner)
    picture.paste(Image.new("RGB", (PATCH, PATCH), colour), (column, row))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


CORNERS = [(row, column) for row in (0, 1) for column in (0, 1)]


def seen(task: str) -> list[Record]:
    """The same question of pictures that a patch alone tells apart."""
    target = {"classify": "label", "generate": "answer"}[task]
    return [
        parse({"id": f"{colour}{corner}", "task": task, "text": "what color is there?", target: colour,
               "image": patched(colour, corner)})
        for colour in COLOURS for corner in CORNERS if colour != "black" or corner == (0, 0)
    ]  # fmt: skip


def read() -> list[Record]:
    """Texts that one word tells apart, wherever it stands."""
    forms = (
        "the shape is {} in there",
        "{} is the shape there",
        "is there not a circle in {}",
        "what is {} is a color",
    )
    return [
        parse({"id": f"{colour}{n}", "task": "classify", "text": form.format(colour), "label": colour})
        for colour in COLOURS for n, form in enumerate(forms)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def soft(tiny_backbone: Path, tiny_recipe: dict[str, Any]) -> Predictor:
    """A model that joins at the input, and tells both apart."""
    overrides = {"freeze.strategy": "all", "model.image.size": SIDE, "model.image.tokens": 16}
    made = Made(configured(tiny_recipe, tiny_backbone, **overrides), CHOOSES)
    losses = made.fit([*read(), *seen("classify")], steps=220)
    assert losses[-1] < 0.15
    return made.predictor()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A native model that writes what it sees."""
    folder = multimodal.write("llava", tmp_path_factory.mktemp("native") / "image")
    made = multimodal.Made(multimodal.configured(folder, **{"freeze.strategy": "all"}), WRITES)
    losses = made.fit(seen("generate"), steps=250)
    assert losses[-1] < 0.15
    return made.predictor()


def explained(predictor: Predictor, record: Record) -> tuple[Any, Answer, Evidence]:
    sample = predictor.prepare(record)
    [answer] = predictor.answer([sample])
    return sample, answer, explain.explain(predictor, sample, answer)


def chance(predictor: Predictor, sample: Any, answer: Answer) -> float:
    return predictor.answer([sample])[0].probabilities[str(answer.label)]


def test_the_word_that_tells_is_the_evidence(soft: Predictor) -> None:
    for record in read():
        _, answer, found = explained(soft, record)
        assert answer.label == record.target.label
        assert max(found.words, key=lambda word: word.weight).text == answer.label
        assert [word.text for word in found.words] == text.words(record).split()
        assert all(text.words(record)[word.start : word.end] == word.text for word in found.words)


def by_corner(predictor: Predictor, records: list[Record]) -> tuple[float, float]:
    """The mean weight of the quarter where the patch is, and of the others, over all pictures with one."""
    inside: list[float] = []
    outside: list[float] = []
    half = GRID // 2
    for record, corner in zip(records[:8], CORNERS * 2, strict=True):
        _, _, found = explained(predictor, record)
        [grid] = found.images
        assert grid.shape == (GRID, GRID)
        for row, column in CORNERS:
            quarter = grid[row * half : (row + 1) * half, column * half : (column + 1) * half]
            (inside if (row, column) == corner else outside).append(float(quarter.mean()))
    return float(np.mean(inside)), float(np.mean(outside))


def test_the_region_that_tells_is_the_evidence(soft: Predictor) -> None:
    inside, outside = by_corner(soft, seen("classify"))
    assert inside > 3 * outside


def test_without_the_top_of_the_evidence_the_answer_loses_more_than_without_any(soft: Predictor) -> None:
    rng = np.random.default_rng(0)
    top: list[float] = []
    some: list[float] = []
    for record in [*read(), *seen("classify")]:
        sample, answer, found = explained(soft, record)
        units = found.units()
        count = max(1, round(len(units) / 5))
        ranked = sorted(range(len(units)), key=[-unit[0] for unit in units].__getitem__)[:count]
        before = chance(soft, sample, answer)
        for chosen, into in ((ranked, top), (rng.choice(len(units), count, replace=False), some)):
            less = explain.without(soft, sample, found, [units[at][1] for at in chosen])
            into.append(before - chance(soft, less, answer))
    assert np.mean(top) > 2 * max(float(np.mean(some)), 0.01)


def test_a_native_model_that_writes_is_explained(native: Predictor) -> None:
    records = seen("generate")
    inside, outside = by_corner(native, records)
    assert inside > 3 * outside
    changed = 0
    for record in records[:8]:
        sample, answer, found = explained(native, record)
        assert (answer.text, found.method, found.target) == (record.target.text, "occlusion", answer.words)
        assert [word.text for word in found.words] == ["what", "color", "is", "there", "?"]
        images = sorted((unit for unit in found.units() if unit[1][0] == "image"), reverse=True)
        less = explain.without(native, sample, found, [unit for _, unit in images[: GRID**2 // 5]])
        changed += native.answer([less])[0].text != answer.text
    assert changed >= 6  # of 8: without the patch it writes another colour


def test_over_http_it_is_the_same(soft: Predictor, make_wav: Callable[..., bytes]) -> None:
    with TestClient(build(Service(soft, ServeConfig()))) as client:
        content = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64(patched("red", (0, 1)))}},
            {"type": "input_audio", "input_audio": {"data": b64(make_wav()), "format": "wav"}},
            {"type": "text", "text": "what color is there?"},
        ]
        body = {"messages": [{"role": "user", "content": content}], "explain": True}
        evidence = client.post("/v1/chat/completions", json=body).json()["mmagent"]["evidence"]
        assert evidence["method"] == "occlusion"
        assert [token["text"] for token in evidence["tokens"]] == ["what", "color", "is", "there", "?"]
        assert np.shape(evidence["images"][0]["grid"]) == (GRID, GRID)
        assert len(evidence["audios"][0]["spans"]) == BINS


@pytest.mark.parametrize("method", ["integrated_gradients", "rollout"])
def test_what_the_model_has_not_is_said_plainly(soft: Predictor, method: Any) -> None:
    with TestClient(build(Service(soft, ServeConfig(explain=method)))) as client:
        answer = client.post("/v1/predict", json={"text": "red", "explain": True})
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("not_supported", "explain")
        assert f"{method} is for models that join at the output" in error["message"]
        assert "--explain occlusion" in error["message"]
        assert client.post("/v1/predict", json={"text": "red"}).status_code == 200


def test_nothing_written_is_nothing_to_explain(native: Predictor) -> None:
    sample = native.prepare(seen("generate")[0])
    [answer] = native.answer([sample])
    with pytest.raises(ExplainError, match="nothing was written"):
        explain.explain(native, sample, replace(answer, text=""))


def test_words_keep_their_places_among_pictures_and_messages() -> None:
    record = Record("", (Message("system", "Be kind."), Message("user", r"a \<image> <image>red one"),
                         Message("user", "and  <audio> blue")))  # fmt: skip
    found = _words(record)
    said = text.words(record)
    assert all(said[word.start : word.end] == word.text for word in found)
    assert [word.text for word in found][-2:] == ["and", "blue"]
    [red] = [word for word in found if word.text == "red"]
    assert red.place == Place(1, 2, 0, 3)
    less = unsaid(record, [red.place, found[-1].place])  # type: ignore[list-item]
    assert less.messages[1].content == r"a \<image> <image> one"
    assert less.messages[2].content == "and  <audio> "
    long = Record("", (Message("user", " ".join(f"w{n}" for n in range(1000))), Message("user", "end")))
    runs = _words(long)
    assert len(runs) <= 129
    assert " ".join(word.text for word in runs).split() == [*(f"w{n}" for n in range(1000)), "end"]
    assert all(text.words(long)[word.start : word.end] == word.text for word in runs)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
