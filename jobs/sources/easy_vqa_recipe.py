"""How the data set of the demo is made of easy-VQA: its recipe file, and the families that its questions are of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from jobs.sources import SourceError

RECIPE_FILE = Path(__file__).parents[1] / "recipes" / "easy_vqa_data.yaml"
Family = Literal["exist", "exist_not", "color", "shape", "shape_of_color"]
Form = Literal["text", "speech", "speech_known", "speech_unseen", "paraphrase"]

_FAMILIES: dict[Family, re.Pattern[str]] = {
    "exist": re.compile(r"(?:is there a (.+?)(?: in the image)?|does the image contain a (.+)|is a (.+) present)\?"),
    "exist_not": re.compile(
        r"(?:is there not a (.+?)(?: in the image)?|does the image not contain a (.+)|is no (.+) present)\?"
    ),
    "color": re.compile(r"what (?:color is|is the color of) the (.+)\?"),
    "shape": re.compile(r"what shape (?:does the image contain|is in the image|is present)\?"),
    "shape_of_color": re.compile(r"what is the (\w+) shape\?"),
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Voices(_Section):
    training: tuple[str, ...] = Field(min_length=1, description="heard in training; also the known voices of the test")
    unseen: tuple[str, ...] = Field(min_length=1, description="heard in the test split alone")

    @model_validator(mode="after")
    def _unseen_are_new(self) -> Self:
        for voice in self.unseen:
            accent, _, variant = voice.partition("+")
            for known in self.training:
                known_accent, _, known_variant = known.partition("+")
                if accent == known_accent or variant == known_variant:
                    raise ValueError(
                        f"the unseen voice {voice!r} shares its accent or its variant with the training voice {known!r}"
                    )
        return self


class Renderings(_Section):
    training: PositiveInt = Field(description="ways each training voice says a question in training")
    validation: PositiveInt = Field(description="the same in validation, others than in training")
    test: PositiveInt = Field(description="the same in the test split, others again")
    unseen: PositiveInt = Field(description="ways each unseen voice says a question")


class Recipe(_Section):
    """jobs/recipes/easy_vqa_data.yaml."""

    speech_share: float = Field(gt=0, lt=1, description="of training and validation questions, spoken")
    blind_share: float = Field(ge=0, lt=1, description="of training and validation questions, without picture")
    paraphrases: int = Field(ge=0, description="test questions asked again in other words")
    voices: Voices
    renderings: Renderings
    rate_wpm: tuple[int, int] = Field(description="words per minute, from and to")
    pitch: tuple[int, int] = Field(description="espeak's pitch, 0 to 99, from and to")
    pitch_range: tuple[int, int] = Field(description="espeak's range of pitch, 0 to 99, from and to")
    wordings: dict[Family, tuple[str, ...]] = Field(description="by family, wordings that training never has")

    @classmethod
    def load(cls, path: Path = RECIPE_FILE) -> Self:
        """Raises SourceError naming the file and the key."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError) as error:
            raise SourceError(f"cannot read the recipe {path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise SourceError(f"the recipe {path} cannot be used: {place}: {first['msg']}") from error


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the package, with the family it belongs to and what it names."""

    text: str
    answer: str
    image_id: int
    family: Family
    subject: str  # "blue shape", "circle", "blue"; empty where nothing is named


def family_of(text: str) -> tuple[Family, str]:
    """The family of a question's text, and the shape or color it names.

    Raises:
        SourceError: of no known family.
    """
    for family, pattern in _FAMILIES.items():
        if match := pattern.fullmatch(text):
            return family, next((group for group in match.groups() if group), "")
    raise SourceError(f"easy-VQA asks {text!r}, which is of no family known here: another version of the package?")


def reword(question: Question, wording: str) -> str:
    return wording.replace("{x}", question.subject)
