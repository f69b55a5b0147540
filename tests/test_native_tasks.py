"""Every task with a native multimodal model, on words, pictures and sounds: it learns, keeps still what is frozen, and
says the same from its bundle, alone and among others, and over HTTP."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from mmagent.augment import Words, augment
from mmagent.batch import PartError
from mmagent.config import AugmentConfig
from mmagent.conversations import MEDIA
from mmagent.order import sample_rng
from mmagent.reading import MADE
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.targets import TaskInfo
from serve.app import build
from serve.config import ServeConfig
from serve.service import Service
from tests import multimodal
from tests.multimodal import Made, configured

LABELS = ("blue", "red")
INFOS = {
    "classify": TaskInfo("classify", LABELS),
    "multilabel": TaskInfo("multilabel", LABELS),
    "regress": TaskInfo("regress", mean=0.0, deviation=1.0),
    "tag": TaskInfo("tag", LABELS),
    "relate": TaskInfo("relate", LABELS),
    "extract": TaskInfo("extract"),
    "match": TaskInfo("match"),
    "match:dual": TaskInfo("match:dual", dual=True),
    "generate": TaskInfo("generate"),
}
FAMILY = {"text": "llava", "image": "llava", "audio": "qwen2_audio"}
SAID = {"classify": "label", "multilabel": "labels", "regress": "value", "tag": "spans", "relate": "label",
        "extract": "text", "match": "label", "match:dual": "label", "generate": "text"}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: multimodal.write(family, root / family) for family in ("llava", "qwen2_audio")}


def body(task: str, modality: str, index: int, make_png: Any, make_wav: Any) -> dict[str, Any]:
    """A question whose answer the modality alone tells."""
    questions: dict[str, dict[str, Any]] = {
        "text": {"text": f"{('the sea', 'a fire')[index]} so?"},
        "image": {"text": "so so?", "image": make_png(LABELS[index])},
        "audio": {"text": "so so?", "audio": make_wav((220.0, 880.0)[index])},
    }
    given = questions[modality]
    if task == "relate":
        given["spans"] = [{"start": 0, "end": 2, "label": "head"}, {"start": 3, "end": 5, "label": "tail"}]
    if task == "extract":
        given["context"] = "red or blue"
    if task.startswith("match"):
        given["candidates"] = ["it is blue", "it is red"]
    found: dict[str, Any] = {"task": task, **given}
    return found


def answered(task: str, index: int) -> dict[str, Any]:
    label = LABELS[index]
    known: dict[str, dict[str, Any]] = {
        "multilabel": {"labels": [label]},
        "regress": {"value": 2.0 * index - 1},
        "tag": {"spans": [{"start": 0, "end": 2, "label": label}]},
        "extract": {"answers": [label]},
        "generate": {"answer": label},
    }
    return known.get(task.partition(":")[0], {"label": f"it is {label}" if task.startswith("match") else label})


def rows(task: str, modality: str, make_png: Any, make_wav: Any) -> list[Record]:
    out = []
    for index in range(2):
        row = body(task, modality, index, make_png, make_wav)
        more = answered(task, index)
        if task == "relate":
            row |= {"label": more["label"]}
            more = {}
        out.append(parse({"id": str(index), **row, **more}))
    return out


def told(answer: Any) -> dict[str, Any]:
    return answer.to_dict(timings=False)


def same(a: dict[str, Any], b: dict[str, Any], task: str) -> None:
    said = SAID[task]
    if said == "spans":
        places = [[(span["start"], span["end"], span["label"]) for span in each.get(said, ())] for each in (a, b)]
        assert places[0] == places[1]
    else:
        assert a[said] == (pytest.approx(b[said], abs=1e-4) if said == "value" else b[said])
    assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-3)


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
@pytest.mark.parametrize("task", INFOS)
def test_a_task_is_learnt_kept_and_served(
    folders: dict[str, Path], make_png: Any, make_wav: Any, tmp_path: Path, task: str, modality: str
) -> None:
    made = Made(configured(folders[FAMILY[modality]]), {task: INFOS[task]})
    records = rows(task, modality, make_png, make_wav)
    losses = made.fit(records)
    assert min(losses) < losses[0] / 2
    for name, parameter in made.encoder.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, made.before[name]), name
    predictor = made.predictor()
    together = [told(answer) for answer in predictor.predict(records)]
    alone = [told(predictor.predict([record])[0]) for record in records]
    again = [told(answer) for answer in made.bundled(tmp_path / "b").predict(records)]
    for a, b, c in zip(together, alone, again, strict=True):
        same(a, b, task)
        same(a, c, task)
    with TestClient(build(Service(predictor, ServeConfig()))) as client:
        for index, answer in enumerate(together):
            asked = body(task, modality, index, make_png, make_wav)
            for kind in ("image", "audio"):
                if kind in asked:
                    asked[kind] = base64.b64encode(asked[kind]).decode()
            reply = client.post("/v1/predict", json=asked)
            assert reply.status_code == 200, reply.text
            found = reply.json()["mmagent"]
            ahead = len(records[index].messages[-1].content) - len(asked["text"])  # the client wrote no placeholder
            if task == "tag":
                found["spans"] = [{**s, "start": s["start"] + ahead, "end": s["end"] + ahead} for s in found["spans"]]
            same(found, answer, task)


def test_candidates_bring_pictures_of_their_own(folders: dict[str, Path], make_png: Any) -> None:
    """Read beside what is asked and apart from it; also where what is asked has one too, and some have none."""
    pictures = [make_png(colour) for colour in LABELS]
    offered = [{"text": "this", "image": pictures[0]}, {"image": pictures[1]}, "none of them"]
    for task in ("match", "match:dual"):
        made = Made(configured(folders["llava"], **{"freeze.strategy": "all"}), {task: INFOS[task]})
        asked = [{"text": f"the {colour} one?"} for colour in LABELS] + [{"text": "not this", "image": pictures[0]}]
        records = [
            parse({"id": str(index), "task": task, "candidates": offered, "label": str(index), **each})
            for index, each in enumerate(asked)
        ]
        sample = made.inputs.sample(records[2])
        waits = [int((view.ids == MADE).sum()) for view in sample.views]
        assert waits == ([8, 8, 4] if task == "match" else [4, 4, 4, 0])
        batch = made.inputs.batch([sample])
        assert len(batch[f"{MEDIA}pixel_values"]) == sum(waits) // 4
        made.fit(records, steps=60)
        predictor = made.predictor()
        together = predictor.predict(records)
        assert [answer.label for answer in together] == ["0", "1", "2"]
        for record, answer in zip(records, together, strict=True):
            same(told(predictor.predict([record])[0]), told(answer), task)


def test_a_record_weighs_one_over_all_its_views(folders: dict[str, Path], make_png: Any) -> None:
    made = Made(configured(folders["llava"]), {"match": INFOS["match"], "tag": INFOS["tag"]})
    match = {"task": "match", "text": "which?", "candidates": ["a", "b"], "label": "a"}
    long = {"task": "tag", "text": "so it is " * 30, "spans": [], "image": make_png()}
    samples = [made.inputs.sample(parse(row, default_id=str(index))) for index, row in enumerate((match, long))]
    views = [len(sample.views) for sample in samples]
    assert views[0] == 2
    assert views[1] > 2
    batch = made.inputs.batch(samples)
    assert batch["sample_row"].tolist() == [0, 0, *[1] * views[1]]
    weights = torch.zeros(2).index_add(0, batch["sample_row"], batch["weight"])
    torch.testing.assert_close(weights, torch.ones(2))
    alone = made.inputs.batch(samples[:1])
    assert alone["weight"].tolist() == [0.5, 0.5, 0.0]  # the last is the stand-in
    assert alone["sample_row"].tolist() == [0, 0, 1]
    assert len(batch[f"{MEDIA}pixel_values"]) == views[1]  # each stride sees the picture


@pytest.mark.parametrize(
    "spoken", ["see <image> or <image><image> </s> here", "a \\<image> here", "<|image_pad|> here"]
)
def test_signs_in_what_users_write_are_words(folders: dict[str, Path], make_png: Any, spoken: str) -> None:
    made = Made(configured(folders["llava"]), {"tag": INFOS["tag"], "match": INFOS["match"]})
    place = len(spoken) - 4
    spans: list[dict[str, Any]] = [{"start": place, "end": place + 4, "label": "red"}]
    message = [{"role": "user", "content": spoken.replace("<image>", "\\<image>") if "\\" not in spoken else spoken}]
    more = len(message[0]["content"]) - len(spoken)
    spans = [{**span, "start": span["start"] + more, "end": span["end"] + more} for span in spans]
    records = [
        parse({"task": "tag", "messages": message, "images": [], "spans": spans}, default_id="1"),
        parse({"task": "match", "text": "what?", "image": make_png(), "candidates": [spoken]}, default_id="2"),
    ]
    sign = made.inputs.tokenizer.convert_tokens_to_ids("<image>")
    batch = made.batch(records)
    assert (batch["ids"] == sign).sum(1).tolist() == [0, 4]
    made.module(batch)
    tags = batch["tag/tags"][0]
    offsets = made.inputs.sample(records[0]).views[0].offsets
    assert offsets is not None
    where = offsets[torch.nonzero(tags > 0)[:, 0]]
    assert message[0]["content"][where[0][0] : where[-1][1]] == "here"


def test_words_give_way_to_pictures_where_places_are_few(folders: dict[str, Path], make_png: Any) -> None:
    """The model has 160: more strides are made of a text, and the longer of a question and a candidate is cut."""
    made = Made(configured(folders["llava"], **{"data.max_text_tokens": 160}), INFOS)
    pictures = [make_png()] * 20
    signs = "<image>" * 20
    tag = parse({"task": "tag", "messages": [{"role": "user", "content": f"{signs}{'so it is ' * 20}"}],
                 "images": pictures, "spans": []}, default_id="1")  # fmt: skip
    sample = made.inputs.sample(tag)
    assert max(len(view.ids) for view in sample.views) <= 160
    read = {tuple(place) for view in sample.views for place in view.offsets.tolist() if place[0] >= 0}  # type: ignore[union-attr]
    assert len(read) == 20 * len("soitis")  # all of its letters
    match = parse({"task": "match", "messages": [{"role": "user", "content": f"{signs}{'x' * 100}"}],
                   "images": pictures, "candidates": ["no"]}, default_id="2")  # fmt: skip
    [view] = made.inputs.sample(match).views
    assert len(view.ids) == 160
    assert view.cut == 100 + 2 + 80 - 160
    for task in ("tag", "match", "classify"):
        row = parse({"task": task, "text": "so", "images": [make_png()] * 40, "candidates": ["a"]}, default_id="3")
        with pytest.raises(PartError, match="which leaves too little of the 160 that the language model has places"):
            made.inputs.sample(row)
    for record in (tag, match):
        made.module(made.inputs.batch([made.inputs.sample(record)]))


def test_a_lost_picture_and_a_slower_sound_are_told_the_model(
    folders: dict[str, Path], make_png: Any, make_wav: Any
) -> None:
    sees = Made(configured(folders["llava"]), {"tag": INFOS["tag"]})
    [record, _] = rows("tag", "image", make_png, make_wav)
    sample, words = sees.inputs.sample(record), Words.of(sees.inputs.tokenizer)
    lost = augment(sample, AugmentConfig(image_drop=0.999, word_drop=0.5), words, sample_rng(0, 0, "a"))
    whole, less = (sees.inputs.batch([each], stand_ins=False) for each in (sample, lost))
    assert f"{MEDIA}pixel_values" in whole
    assert f"{MEDIA}pixel_values" not in less
    assert whole["ids"].shape[1] == less["ids"].shape[1] + 4
    assert whole["tag/tags"][0, 4:].tolist() == less["tag/tags"][0].tolist()
    assert (less["ids"][0] == words.hidden).any()
    hears = Made(configured(folders["qwen2_audio"]), {"tag": INFOS["tag"]})
    [record, _] = rows("tag", "audio", make_png, make_wav)
    sample = hears.inputs.sample(record)
    slow = augment(sample, AugmentConfig(audio_tempo=0.9), words, sample_rng(0, 1, "a"))
    assert len(slow.audios[0]) != len(sample.audios[0])
    whole, other = (hears.inputs.batch([each]) for each in (sample, slow))
    assert whole["ids"].shape[1] != other["ids"].shape[1]
    tags = [batch["tag/tags"][0] for batch in (whole, other)]
    assert [each[each >= 0].tolist() for each in tags] == [[1, 2, 0, 0, 0, 0, 0][: int((tags[0] >= 0).sum())]] * 2
    hears.module(other)
