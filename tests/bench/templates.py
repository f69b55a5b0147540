"""Labelled rows made from sentence forms, for measurements: names of the test split never occur in training, nor, where
entities are marked, its forms. Relations have a few forms each, and a new one would be another way to say it.

Entities, relations and answers are known because each sentence is put together from them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Row = dict[str, Any]

_PEOPLE = (
    ("Anna", "Boris", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hassan", "Ines", "Jonas", "Keiko", "Luis"),
    ("Mireille", "Nikhil", "Olga", "Pavel", "Rosa", "Stefan"),
)
_SURNAMES = (
    ("Almeida", "Brandt", "Castro", "Dvorak", "Eriksen", "Fontaine", "Gruber", "Haddad", "Ivanova", "Jensen"),
    ("Kowalski", "Lindqvist", "Moretti", "Novak", "Okafor", "Petrov"),
)
_CITIES = (
    ("Lisbon", "Prague", "Nairobi", "Toronto", "Osaka", "Lima", "Oslo", "Cairo", "Vienna", "Dublin", "Seoul", "Quito"),
    ("Madrid", "Helsinki", "Jakarta", "Boston", "Athens", "Warsaw"),
)
_FIRMS = (
    ("Northwind", "Bluestone", "Acorn", "Silverline", "Redwood", "Highgate", "Ironbridge", "Clearwater"),
    ("Fairfield", "Oakhurst", "Stonegate", "Westbrook", "Greenway"),
)
_KINDS = (("Systems", "Foods", "Bank", "Motors", "Media"), ("Energy", "Airlines", "Textiles"))

# {person}, {place}, {firm}: names, each marked as an entity.
_SENTENCES = (
    (
        "{person} flew from {place} to {place} on Monday.",
        "{firm} opened an office in {place}, {person} said.",
        "the new head of {firm} is {person}",
        "Yesterday {person} met {person} near {place}.",
        "nobody at {firm} had heard of {person} before",
        "shares of {firm} fell after the fire in {place}",
        "It rained all week in {place}.",
        "please forward this invoice to {person} at {firm}",
        "we were late and missed the train",
        "{firm} and {firm} agreed on a price.",
    ),
    (
        "{person} left {firm} and moved to {place}.",
        "According to {person}, {firm} will build a plant near {place}.",
        "a parcel for {person} arrived from {place}",
        "In {place} the directors of {firm} spoke with {person}.",
        "nothing happened until the evening",
    ),
)

_RELATIONS: Mapping[str, tuple[str, ...]] = {
    "works_for": (
        "{head} is an engineer at {tail}.", "{tail} hired {head} in spring.", "{head} has been at {tail} for years",
        "{head} joined {tail} as an accountant.", "since May {head} is employed by {tail}",
    ),
    "founded": (
        "{head} founded {tail} in a garage.", "{tail} was started by {head}.", "the founder of {tail} is {head}",
        "{tail} was founded by {head} and a friend.", "{head} started {tail} with little money",
    ),
    "sued": (
        "{head} took {tail} to court.", "{tail} is being sued by {head}.", "{head} filed a lawsuit against {tail}",
        "a lawsuit of {head} against {tail} was settled", "{head} sued {tail} over a contract.",
    ),
    "visited": (
        "{head} was shown around {tail}.", "{tail} welcomed {head} as a guest.", "{head} paid a visit to {tail}",
        "{head} visited the halls of {tail}.", "as a visitor, {head} was impressed by {tail}",
    ),
}  # fmt: skip

_FACTS = (
    ("colour", "The {thing} is painted {answer}.", ("red", "dark green", "bright yellow", "grey", "pale blue")),
    ("price", "The {thing} costs {answer}.", ("12 euros", "forty dollars", "3.50 pounds", "900 yen", "7 francs")),
    ("place", "The {thing} stands in {answer}.", ("the cellar", "room 12", "the old barn", "hall B", "the yard")),
    ("owner", "The {thing} belongs to {answer}.", None),
    ("maker", "The {thing} was made by {answer}.", None),
)
_QUESTIONS = {
    "colour": ("What colour is the {thing}?", "which colour does the {thing} have", "how is the {thing} painted?"),
    "price": ("How much is the {thing}?", "what does the {thing} cost", "what is the price of the {thing}?"),
    "place": ("Where is the {thing}?", "where does the {thing} stand", "in which place is the {thing}?"),
    "owner": ("Whose is the {thing}?", "who owns the {thing}", "to whom does the {thing} belong?"),
    "maker": ("Who made the {thing}?", "who built the {thing}", "by whom was the {thing} made?"),
}
_THINGS = (
    ("lathe", "press", "crane", "kiln", "saw", "pump", "loom", "oven"),
    ("forge", "drill", "winch", "mill"),
)


def rows(kind: str, count: int, *, seed: int = 0) -> Iterator[Row]:
    """`count` rows of training, a tenth as many of validation (of training's names and forms) and a fifth of test."""
    make: Callable[[random.Random, int], Row] = {"tag": _tag, "noisy": _noisy, "relate": _relate, "extract": _extract}[
        kind
    ]
    rng = random.Random(seed)
    for split, share in (("train", 1.0), ("validation", 0.1), ("test", 0.2)):
        for _ in range(round(count * share)):
            yield {**make(rng, split == "test"), "split": split}


def _name(rng: random.Random, kind: str, held: int) -> str:
    if kind == "place":
        return rng.choice(_CITIES[held])
    if kind == "firm":
        return (
            f"{rng.choice(_FIRMS[held])} {rng.choice(_KINDS[held])}" if rng.random() < 0.7 else rng.choice(_FIRMS[held])
        )
    given, family = rng.choice(_PEOPLE[held]), rng.choice(_SURNAMES[held])
    return rng.choice((given, f"{given} {family}", f"Dr {family}"))


def _tag(rng: random.Random, held: int) -> Row:
    form, text, spans = rng.choice(_SENTENCES[held]), "", []
    while "{" in form:
        before, _, rest = form.partition("{")
        kind, _, form = rest.partition("}")
        name = _name(rng, kind, held)
        text += before
        spans.append({"start": len(text), "end": len(text) + len(name), "label": kind})
        text += name
    return {"text": text + form, "spans": spans}


def _noisy(rng: random.Random, held: int) -> Row:
    """As `_tag`, written as people write in a hurry: letters lost or doubled, no capitals, @names, #tags, links, and
    emoji that touch words."""
    row, low, at, text, spans = _tag(rng, held), rng.random() < 0.5, 0, rng.choice(_OPENINGS), []
    for span in (*row["spans"], None):
        end = span["start"] if span else len(row["text"])
        text += _hurried(rng, row["text"][at:end], low)
        if span:
            name = _hurried(rng, row["text"][span["start"] : span["end"]], low)
            sign = rng.choice(("#", "@", "", "", "", ""))
            spans.append({"start": len(text) + len(sign), "end": len(text) + len(sign + name), "label": span["label"]})
            text += sign + name + rng.choice(_EMOJI)
            at = span["end"]
    return {"text": text + rng.choice(_ENDINGS), "spans": spans}


_OPENINGS = ("", "", "", "RT @mo_77: ", "😂😂 ", "omg ", "@lee.b ")
_ENDINGS = ("", "", "", " #fml", " http://t.co/Xy12ab", "!!!!", " 🙄🇫🇷", " lol")
_EMOJI = ("", "", "", "", "", "❤️", "😂😂", "👍🏽")


def _hurried(rng: random.Random, words: str, low: bool) -> str:
    """Words with a letter of some of the longer ones lost, doubled or swapped with the next; no word is lost."""
    out = []
    for word in (words.lower() if low else words).split(" "):
        if len(word) > 3 and rng.random() < 0.12:
            place = rng.randrange(1, len(word) - 1)
            two = word[place : place + 2]
            word = word[:place] + rng.choice((two[1:], two[0] + two, two[::-1])) + word[place + 2 :]
        out.append(word)
    return " ".join(out)


def _relate(rng: random.Random, held: int) -> Row:
    label = rng.choice(tuple(_RELATIONS))
    form = rng.choice(_RELATIONS[label])
    head, tail = _name(rng, rng.choice(("person", "firm")), held), _name(rng, "firm", held)
    return {"text": form.format(head=f"<e1>{head}</e1>", tail=f"<e2>{tail}</e2>"), "label": label}


def _extract(rng: random.Random, held: int) -> Row:
    """Six facts about two things; a fifth of the questions ask for one that is not told."""
    things = rng.sample(_THINGS[held], 2)
    told: dict[tuple[str, str], tuple[str, str]] = {}
    for thing in things:
        for name, form, answers in rng.sample(_FACTS, 3):
            answer = rng.choice(answers) if answers else _name(rng, "person" if name == "owner" else "firm", held)
            told[thing, name] = form.format(thing=thing, answer=answer), answer
    facts = list(told)
    rng.shuffle(facts)
    untold = [(thing, name) for thing in things for name, _, _ in _FACTS if (thing, name) not in told]
    asked = rng.choice(untold if rng.random() < 0.2 else facts)
    question = rng.choice(_QUESTIONS[asked[1]]).format(thing=asked[0])
    context, start = "", -1
    for fact in facts:
        sentence, answer = told[fact]
        if fact == asked:
            start = len(context) + sentence.rindex(answer)
        context += sentence + " "
    right = [{"text": told[asked][1], "answer_start": start}] if asked in told else []
    return {"text": question, "context": context.strip(), "answers": right, "task": "extract"}
