"""What easy-VQA becomes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from jobs.sources import GoodRow, SourceError
from jobs.sources.easy_vqa import EasyVqa
from jobs.sources.easy_vqa_recipe import RECIPE_FILE, Recipe, Voices, family_of, reword


@pytest.fixture(scope="module")
def easy() -> EasyVqa:
    pytest.importorskip("easy_vqa", reason="the demo's data are an optional extra")
    return EasyVqa(seed=0, validation_share=0.1)


def test_training_holds_each_question_once(easy: EasyVqa) -> None:
    plans = [plan for plan in easy.plans if plan.split != "test"]
    assert len({plan.id for plan in plans}) == len(plans) == 38_575
    training = [plan for plan in plans if plan.split == "train"]
    spoken = sum(plan.form == "speech" for plan in training) / len(training)
    assert abs(spoken - 0.5) < 0.02
    for form in ("text", "speech"):
        part = [plan.blind for plan in training if plan.form == form]
        assert abs(sum(part) / len(part) - 0.12) < 0.01
    assert all((plan.clip is not None) == (plan.form != "text") for plan in plans)


def test_validation_is_cut_by_image(easy: EasyVqa) -> None:
    images = {
        split: {plan.question.image_id for plan in easy.plans if plan.split == split}
        for split in ("train", "validation")
    }
    assert not images["train"] & images["validation"]
    assert len(images["validation"]) == 400
    forms = Counter(plan.form for plan in easy.plans if plan.split == "validation")
    assert set(forms) == {"text", "speech_known"}


def test_the_test_split_holds_every_form(easy: EasyVqa) -> None:
    plans = [plan for plan in easy.plans if plan.split == "test"]
    forms = Counter(plan.form for plan in plans)
    assert forms == {"text": 9673, "speech_known": 9673, "speech_unseen": 9673, "paraphrase": 2000}
    assert not any(plan.blind for plan in plans)
    assert {plan.question.family for plan in plans if plan.form == "paraphrase"} == {
        "exist", "exist_not", "color", "shape", "shape_of_color",
    }  # fmt: skip


def test_no_clip_of_training_is_heard_in_the_test(easy: EasyVqa) -> None:
    clips = {
        split: {plan.clip for plan in easy.plans if plan.split == split and plan.clip} for split in ("train", "test")
    }
    shared = clips["train"] & clips["test"]
    assert len(shared) < 10  # two draws of speed and pitch may fall together
    voices = Recipe.load().voices
    assert {clip.voice for clip in clips["train"]} == set(voices.training)
    assert {plan.clip.voice for plan in easy.plans if plan.form == "speech_unseen" and plan.clip} == set(voices.unseen)


def test_the_plan_follows_from_the_seed(easy: EasyVqa) -> None:
    assert list(EasyVqa(seed=0, validation_share=0.1).plans) == list(easy.plans)
    assert list(EasyVqa(seed=1, validation_share=0.1).plans) != list(easy.plans)


def test_paraphrases_never_occur_in_training(easy: EasyVqa) -> None:
    trained = {plan.question.text for plan in easy.plans if plan.split != "test"}
    assert len(trained) == 107
    wordings = Recipe.load().wordings
    assert all(len(set(lines)) >= 6 for lines in wordings.values())
    for plan in easy.plans:
        if plan.form == "paraphrase":
            assert plan.text not in trained
            assert plan.question.subject in plan.text
            negated = re.search(r"\b(no|not|without)\b", plan.text) is not None
            assert negated == (plan.question.family == "exist_not")
    for question in {plan.question.text: plan.question for plan in easy.plans}.values():
        for wording in wordings[question.family]:
            text = reword(question, wording)
            assert text not in trained
            assert ("{x}" in wording) == bool(question.subject)
            assert "{" not in text


@pytest.mark.parametrize(
    ("text", "family", "subject"),
    [
        ("is there not a blue shape in the image?", "exist_not", "blue shape"),
        ("is a circle present?", "exist", "circle"),
        ("is no teal shape present?", "exist_not", "teal shape"),
        ("what is the color of the triangle?", "color", "triangle"),
        ("what shape is in the image?", "shape", ""),
        ("what is the brown shape?", "shape_of_color", "brown"),
    ],
)
def test_families(text: str, family: str, subject: str) -> None:
    assert family_of(text) == (family, subject)


def test_an_unknown_question_stops() -> None:
    with pytest.raises(SourceError, match="of no family known here"):
        family_of("how many shapes are there?")


def test_voices_of_the_recipe() -> None:
    pytest.importorskip("espeakng_loader")
    from mmagent.speech import Synthesizer

    voices = Recipe.load().voices
    assert len(set(voices.training)) >= 10
    assert len(set(voices.unseen)) == 2
    synthesizer = Synthesizer()
    for voice in (*voices.training, *voices.unseen):
        synthesizer.check_voice(voice)


@pytest.mark.parametrize("unseen", ["en-us+f9", "en-029+f3", "en-us"])
def test_an_unseen_voice_that_training_has_is_refused(unseen: str) -> None:
    with pytest.raises(ValueError, match="shares its accent or its variant"):
        Voices(training=("en-us+f3", "en+m1"), unseen=(unseen,))


def test_a_wrong_recipe_names_the_key(tmp_path: Path) -> None:
    raw = yaml.safe_load(RECIPE_FILE.read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw | {"speech_share": 2}))
    with pytest.raises(SourceError, match=r"recipe\.yaml cannot be used: speech_share"):
        Recipe.load(file)
    file.write_text(yaml.safe_dump(raw | {"voises": {}}))
    with pytest.raises(SourceError, match="voises"):
        Recipe.load(file)


def test_a_wording_of_training_is_refused() -> None:
    pytest.importorskip("easy_vqa")
    raw = Recipe.load().model_dump()
    raw["wordings"]["exist"] = ("is there a {x}?",)
    with pytest.raises(SourceError, match="occurs in training"):
        EasyVqa(seed=0, validation_share=0.1, recipe=Recipe.model_validate(raw))


def test_records_of_easy_vqa() -> None:
    pytest.importorskip("easy_vqa")
    pytest.importorskip("espeakng_loader")
    rows = [row.record for row in EasyVqa(seed=0, validation_share=0.2, limit=30).rows(1) if isinstance(row, GoodRow)]
    assert len(rows) == 30 + 30 * 4
    contents = Counter(record.messages[0].content for record in rows if record.audios)
    assert set(contents) <= {"<image> <audio>", "<audio>"}
    for record in rows:
        assert record.meta["group"] == record.meta["image_id"]
        assert ("voice" in record.meta) == ("transcript" in record.meta) == bool(record.audios)
        assert ("<image>" in record.messages[0].content) == bool(record.images)
        if record.audios:
            assert record.meta["transcript"] == record.meta["question"]
