"""easy-VQA as text, speech and paraphrases: the data set of the demo.

Pictures of one coloured shape and questions on them come with the pip package ``easy-vqa``; speech is made by
espeak-ng (`mmagent.speech`). How, says the recipe ``jobs/recipes/easy_vqa_data.yaml``. Training holds each question
once, written or spoken, some without the picture; the test split holds every question in each form.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.pool import PoolError
from jobs.progress import Progress
from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.easy_vqa_recipe import Form, Question, Recipe, family_of, reword
from jobs.speech import render
from mmagent import speech
from mmagent.record import Media, Message, Record, Target, escape


@dataclass(frozen=True, slots=True)
class Plan:
    """One record to be: which question, in which form, with or without its picture."""

    id: str
    split: str
    form: Form
    question: Question
    text: str  # the words as they are written or spoken
    clip: speech.Clip | None
    blind: bool

    @property
    def origin(self) -> str:
        """The part of the package the picture is of."""
        return "test" if self.split == "test" else "train"


class EasyVqa:
    """The source `easy_vqa`. Everything about it follows from the recipe and the seed."""

    splits = frozenset({"train", "validation", "test"})
    shuffled = True

    def __init__(self, *, seed: int, validation_share: float, recipe: Recipe | None = None, limit: int = 0) -> None:
        """`limit` keeps the first so many questions of each part (for tests)."""
        try:
            import easy_vqa
        except ImportError as error:
            raise SourceError(
                "the source easy_vqa needs the pip package of that name: pip install easy-vqa   "
                "(or: pip install 'mmagent[demo]')"
            ) from error
        self._seed, self._validation_share = seed, validation_share
        self._recipe = Recipe.load() if recipe is None else recipe
        self._train = _questions(*easy_vqa.get_train_questions())
        self._test = _questions(*easy_vqa.get_test_questions())
        self._limit = limit or None
        self._images = {"train": easy_vqa.get_train_image_paths(), "test": easy_vqa.get_test_image_paths()}
        self._check_wordings({question.text for question in self._train})

    @property
    def total(self) -> int:
        return len(self.plans)

    @cached_property
    def plans(self) -> Sequence[Plan]:
        """The records to be, in the order of the shards."""
        return [*self._plan_training(self._train[: self._limit]), *self._plan_test(self._test[: self._limit])]

    def recipe(self) -> dict[str, Any]:
        return {"package": f"easy-vqa {metadata.version('easy-vqa')}", **self._recipe.model_dump(mode="json")}

    def rows(self, workers: int) -> Iterator[GoodRow | BadRow]:
        sounds = self._sounds(workers)
        pictures = {
            (part, number): Media(Path(file).read_bytes(), f"{part}/images/{number}.png")
            for part, files in self._images.items()
            for number, file in files.items()
        }
        created_ms = int(time.time() * 1000)
        for number, plan in enumerate(self.plans, 1):
            picture = pictures[plan.origin, plan.question.image_id]
            sound = Media(sounds[plan.clip], None) if plan.clip else None
            yield GoodRow("easy_vqa", number, _record(plan, picture, sound, created_ms))

    def _sounds(self, workers: int) -> dict[speech.Clip, bytes]:
        """Each distinct clip of the plan with its file; for the whole data set about 200 MB."""
        clips = list(dict.fromkeys(plan.clip for plan in self.plans if plan.clip))
        try:
            with Progress("speech", len(clips), "clips") as progress:
                out = {}
                for clip, sound in render(clips, workers):
                    out[clip] = sound
                    progress.add()
                return out
        except (speech.SpeechError, PoolError) as error:
            raise SourceError(str(error)) from error

    def _plan_training(self, questions: Sequence[Question]) -> list[Plan]:
        recipe, dice = self._recipe, random.Random(f"{self._seed}/training")
        images = sorted({question.image_id for question in questions})
        dice.shuffle(images)
        held_out = set(images[: max(1, round(len(images) * self._validation_share))])
        plans = []
        for number, question in enumerate(questions):
            validation = question.image_id in held_out
            split = "validation" if validation else "train"
            spoken = dice.random() < recipe.speech_share
            blind = dice.random() < recipe.blind_share
            voice, rendering = dice.choice(recipe.voices.training), dice.random()
            count = recipe.renderings.validation if validation else recipe.renderings.training
            clip = self._clip(question.text, voice, f"{split}/{int(rendering * count)}") if spoken else None
            form: Form = "text" if not spoken else "speech_known" if validation else "speech"
            plans.append(Plan(f"train-{number:06d}", split, form, question, question.text, clip, blind))
        # A reader shuffles within a window; the package lists the questions picture by picture.
        dice.shuffle(plans)
        return plans

    def _plan_test(self, questions: Sequence[Question]) -> list[Plan]:
        recipe, dice = self._recipe, random.Random(f"{self._seed}/test")
        reworded = set(dice.sample(range(len(questions)), min(recipe.paraphrases, len(questions))))
        plans = []
        for number, question in enumerate(questions):
            known, unseen = dice.choice(recipe.voices.training), dice.choice(recipe.voices.unseen)
            first, second = dice.randrange(recipe.renderings.test), dice.randrange(recipe.renderings.unseen)
            wording = reword(question, dice.choice(recipe.wordings[question.family]))
            forms: list[tuple[Form, str, speech.Clip | None]] = [
                ("text", question.text, None),
                ("speech_known", question.text, self._clip(question.text, known, f"test/{first}")),
                ("speech_unseen", question.text, self._clip(question.text, unseen, f"unseen/{second}")),
            ]
            if number in reworded:
                forms.append(("paraphrase", wording, None))
            plans += [
                Plan(f"test-{number:06d}-{form}", "test", form, question, text, clip, False)
                for form, text, clip in forms
            ]
        return plans

    def _clip(self, text: str, voice: str, rendering: str) -> speech.Clip:
        """The clip of a question, a voice and a rendering: speed and pitch are drawn by their hash."""
        key = hashlib.blake2b(f"{self._seed}/{text}/{voice}/{rendering}".encode(), digest_size=8).digest()
        dice = random.Random(int.from_bytes(key))
        recipe = self._recipe
        return speech.Clip(
            text, voice, dice.randint(*recipe.rate_wpm), dice.randint(*recipe.pitch), dice.randint(*recipe.pitch_range)
        )

    def _check_wordings(self, trained: set[str]) -> None:
        for text in sorted(trained):
            family, subject = family_of(text)
            question = Question(text, "", 0, family, subject)
            for wording in self._recipe.wordings.get(family, ()):
                if reword(question, wording) in trained:
                    raise SourceError(f"the wording {wording!r} of {family} occurs in training: {text!r}")
            if not self._recipe.wordings.get(family):
                raise SourceError(f"the recipe has no wordings for the family {family}")


def _questions(texts: Sequence[str], answers: Sequence[str], images: Sequence[int]) -> list[Question]:
    families = {text: family_of(text) for text in set(texts)}
    return [
        Question(text, answer, image, *families[text])
        for text, answer, image in zip(texts, answers, images, strict=True)
    ]


def _record(plan: Plan, picture: Media, sound: Media | None, created_ms: int) -> Record:
    question = plan.question
    image_id = f"{plan.origin}-{question.image_id}"
    words = "<audio>" if sound else escape(plan.text)
    meta = {"form": plan.form, "family": question.family, "question": question.text, "image_id": image_id}
    if plan.clip:
        meta |= {"voice": plan.clip.voice, "transcript": plan.clip.text}
    return Record(
        id=plan.id,
        split=plan.split,
        messages=(Message("user", words if plan.blind else f"<image> {words}"),),
        images=() if plan.blind else (picture,),
        audios=(sound,) if sound else (),
        target=Target(label=question.answer),
        meta={**meta, "group": image_id},
        origin="easy_vqa",
        created_ms=created_ms,
    )
