"""Takes personal data out of what is learned from, by a function of yours or by Presidio.

    python -m jobs.refine --channel production --scrub jobs.scrubbing:presidio      # pip install presidio-analyzer
    python -m jobs.refine --channel production --scrub my_package.privacy:hide      # def hide(text: str) -> str

A function gets each text of a record (messages, candidates, a written answer) and gives it back without what must not
be learned. Where spans count a text's characters it has to keep its length; what does not is set aside. Pictures and
sounds are left as they are.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mmagent import targets
from mmagent.config import ConfigError
from mmagent.record import Record, compose, segments

Scrub = Callable[[str], str]


def load(name: str) -> Scrub:
    """The function that ``MODULE:FUNCTION`` names.

    Raises:
        ConfigError: there is none.
    """
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ImportError("MODULE:FUNCTION is wanted")
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--scrub {name}: {error}") from error
    if not callable(found):
        raise ConfigError(f"--scrub {name} is {type(found).__name__}, but a function of a text is wanted")
    scrub: Scrub = found
    return scrub


def scrubbed(record: Record, scrub: Scrub) -> Record:
    """The record with every text through the function.

    Raises:
        ValueError: a text that spans count the characters of has another length afterwards.
    """
    at = targets.spanned(record) if record.target.spans else None
    messages = []
    for index, message in enumerate(record.messages):
        content = compose((kind, scrub(text) if kind == "text" else text) for kind, text in segments(message.content))
        if index == at and len(content) != len(message.content):
            raise ValueError("spans count the characters of a text whose length changes")
        messages.append(replace(message, content=content))
    candidates = tuple(
        {**each, "content": scrub(each["content"])} if each.get("content") else each for each in record.candidates
    )
    target = record.target
    if target.text is not None:
        target = replace(target, text=scrub(target.text))
    if target.texts is not None and at is not None:  # the answers are what the spans cover, as it is now
        target = replace(target, texts=tuple(targets.words_of(messages[at].content, s) for s in target.spans or ()))
    return replace(record, messages=tuple(messages), candidates=candidates, target=target)


def presidio(text: str) -> str:
    """Names, numbers, addresses and the like as asterisks, by Microsoft Presidio; a text keeps its length.

    Raises:
        ConfigError: it is not installed, or lacks its language model.
    """
    for found in _analyzer().analyze(text=text, language="en"):
        text = text[: found.start] + "*" * (found.end - found.start) + text[found.end :]
    return text


@functools.cache
def _analyzer() -> Any:
    try:
        from presidio_analyzer import AnalyzerEngine

        return AnalyzerEngine()
    except ImportError as error:
        raise ConfigError(
            "--scrub jobs.scrubbing:presidio needs presidio-analyzer: pip install 'mmagent[privacy]'"
        ) from error
    except (OSError, SystemExit) as error:  # spaCy would fetch a model, and ends the process where it cannot
        raise ConfigError(
            f"Presidio has no language model: python -m spacy download en_core_web_lg ({error})"
        ) from error
