"""Cards that show answers to look at: what was asked, what was answered, and what is right, as each task has it."""

from __future__ import annotations

from collections.abc import Sequence

from mmagent import passages
from mmagent.charts import number, percent
from mmagent.data_uri import audio_uri, image_uri
from mmagent.examples import Example, group_name
from mmagent.markup import Child, Markup, join, tag
from mmagent.media import Limits, MediaError
from mmagent.passages import Span, passage
from mmagent.record import Record, segments
from mmagent.targets import spanned
from mmagent.tasks.extract import spans_of
from mmagent.tasks.task import focus

MEDIA_BYTES = 4_000_000  # of all pictures and sounds of a page together, as text
_SMALL_IMAGE_BYTES = 8_000  # a picture of a few pixels: shown with sharp edges
_RANKED = 6  # candidates of a match, and those that are right
_SPANNED = ("tag", "relate", "extract")
_BARS = "The bars are the likeliest answers: green is the right one."
_TOLD = {  # how to read a card, by kind of task
    "classify": _BARS,
    "relate": "The two spans are marked. " + _BARS,
    "tag": "Green spans are right, red ones are not; where they differ, the second line has all that are right.",
    "extract": "Green is a right answer's place, red a wrong one's; the second line has the right one.",
    "multilabel": "Green labels are right, red ones are not, and dashed ones are missing.",
    "match": "Candidates from best to worst: green is right.",
    "generate": "Right: the same words, but for case and a full stop at the end; many other texts may be as good.",
    "regress": "Right: less than half a standard deviation of the training values away.",
}


def section(shown: Sequence[Example], limits: Limits) -> Markup | None:
    """Cards under the headings of their groups, mistakes first; none without examples."""
    left = MEDIA_BYTES
    parts: list[Child] = []
    for group in dict.fromkeys(example.group for example in shown):
        cards = []
        for example in sorted((item for item in shown if item.group == group), key=lambda item: item.correct):
            media, size = _media(example, limits, left)
            left -= size
            cards.append(_card(example, media))
        parts.append(join(tag("h3", group_name(group)) if group else None, tag("div", cards, class_="grid")))
    told = f"Chosen by a seeded draw, mistakes first. {_TOLD[shown[0].kind]}" if shown else ""
    return join(tag("p", told, class_="soft"), parts) if parts else None


def _card(example: Example, media: tuple[Child, Child]) -> Markup:
    record, (picture, sound) = example.record, media
    words = _asked(record, example.kind)
    spoken = record.meta.get("transcript") if record.audios else None
    asked: list[Child] = [tag("p", words, class_="asked")] if words else []
    if spoken:
        asked.append(tag("p", f"“{spoken}”", class_="asked spoken"))
    passaged = _passages(example)
    nothing = None if passaged else tag("p", "(no words)", class_="soft")
    about = " · ".join(filter(None, (record.meta.get("voice") and f"voice {record.meta['voice']}", record.id)))
    return tag(
        "article",
        tag("div", picture, tag("div", asked or nothing, class_="side"), class_="top") if picture or asked or nothing
        else None,
        sound,
        passaged,
        tag("p", _verdict(example), class_="verdict"),
        _detail(example),
        tag("p", about, class_="about"),
        class_="example right" if example.correct else "example wrong",
    )  # fmt: skip


def _asked(record: Record, kind: str) -> str:
    """The words of a record; those whose spans are shown in a passage of their own are left out."""
    at = spanned(record) if kind in _SPANNED else None
    messages = [message for index, message in enumerate(record.messages) if index != at]
    parts = (part for message in messages for part in segments(message.content))
    return "\n".join(text.strip() for kind, text in parts if kind == "text" and text.strip())


def _verdict(example: Example) -> list[Child]:
    words = example.answer.words
    if example.kind == "regress":
        words = number(example.answer.value or 0.0)
    elif example.kind == "extract":
        words = words or "(no answer)"
    verdict: list[Child] = []
    if example.kind not in ("tag", "multilabel"):  # shown as spans and chips
        verdict += ["answer ", tag("b", words, class_="ok" if example.correct else "no")]
        if not example.correct or example.kind == "regress":
            verdict += [", right is ", tag("b", example.right or "(no answer)")]
        verdict.append(" · ")
    verdict.append(f"confidence {percent(example.answer.confidence)}")
    if example.abstained:
        verdict.append(" · below the bundle's threshold")
    return verdict


def _passages(example: Example) -> list[Markup]:
    """The text with its spans: what was said, and below it, where that is not right, what is."""
    record, answer = example.record, example.answer
    if example.kind not in _SPANNED:
        return []
    content = focus(record)
    if example.kind == "relate":
        ends = [Span(span["start"], span["end"], span["label"]) for span in record.target.spans or ()]
        return [passage(content, ends)]
    if example.kind == "tag":
        return [passage(content, line) for line in passages.compared(answer.spans or (), record.target.spans or ())]
    said = [Span(span["start"], span["end"], "", "ok" if example.correct else "no") for span in answer.spans or ()]
    right = [Span(start, end, "", "missed") for start, end in (spans_of(record) or [])[:1]]
    return [passage(content, line) for line in ([said] if example.correct else [said, right]) if line] or [
        passage(content, [])
    ]


def _detail(example: Example) -> Markup | None:
    if example.kind in ("classify", "relate"):
        return _bars(example)
    if example.kind == "multilabel":
        return _chips(set(example.answer.labels or ()), set(example.record.target.labels or ()))
    return _ranking(example) if example.kind == "match" else None


def _chips(said: set[str], right: set[str]) -> Markup:
    kinds = {label: "ok" if label in right else "no" for label in said} | dict.fromkeys(right - said, "missed")
    chips = [tag("li", label, class_=kinds[label]) for label in sorted(kinds)]
    return tag("ul", chips or tag("li", "no label", class_="plain"), class_="chips")


def _ranking(example: Example) -> Markup:
    record, right = example.record, set(example.record.target.labels or ())
    items: list[Child] = []
    for rank, (index, chance) in enumerate(example.answer.probabilities.items(), 1):
        if rank > _RANKED and index not in right:
            continue
        words = "".join(
            text for kind, text in segments(record.candidates[int(index)].get("content") or "") if kind == "text"
        )
        named = words or f"candidate {int(index) + 1}"
        items.append(tag("li", named, " ", tag("small", percent(chance)), value=rank,
                         class_="ok" if index in right else None))  # fmt: skip
    return tag("ol", items, class_="ranking")


def _bars(example: Example) -> Markup:
    rows: list[Child] = []
    for label, value in example.probabilities.items():
        kind = (
            "is-truth" if label == example.record.target.label else "is-said" if label == example.answer.label else None
        )
        fill = tag("div", class_="fill", style=f"width:{100 * value:.1f}%")
        rows.append(tag("dt", label, title=label))
        rows.append(tag("dd", tag("div", fill, class_="track"), class_=kind))
        rows.append(tag("dd", percent(value), class_="value"))
    return tag("dl", rows, class_="bars")


def _media(example: Example, limits: Limits, left: int) -> tuple[tuple[Child, Child], int]:
    """The pictures and players of an example, and the room they take; what finds no room is named instead."""
    pictures: list[Child] = []
    sounds: list[Child] = []
    used = 0
    for kind, medias in (("image", example.record.images), ("audio", example.record.audios)):
        for index, media in enumerate(medias):
            name = f"{kind} {index + 1} of {example.record.id}"
            place = pictures if kind == "image" else sounds
            try:
                data = media.read()
                uri = image_uri(data, limits) if kind == "image" else audio_uri(data, limits)
            except (MediaError, ValueError) as error:
                place.append(tag("p", f"{name} cannot be shown: {error}", class_="about"))
                continue
            if used + len(uri) > left:
                place.append(tag("p", f"{name}: left out, the page is full", class_="about"))
                continue
            used += len(uri)
            small = "small" if len(data) < _SMALL_IMAGE_BYTES else None
            shown = (
                tag("img", src=uri, alt=f"Picture of the question ({name})", class_=small)
                if kind == "image"
                else tag(
                    "audio", controls=True, preload="metadata", src=uri, aria_label=f"Sound of the question ({name})"
                )
            )
            place.append(shown)
    return (pictures, sounds), used
