"""Answers to look at: a seeded choice of right and wrong ones, and their media small enough for a page.

`choose` looks at the predictions alone; the caller then reads the chosen records from their shards, and `section` shows
them.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import soundfile

from mmagent.charts import percent
from mmagent.evaluation import slice_column
from mmagent.markup import Child, Markup, join, tag
from mmagent.media import Limits, MediaError, check_image, decode_audio, decode_image
from mmagent.record import Record

_IMAGE_BYTES = 60_000  # encoded media up to this size are shown as they are, larger ones anew and smaller
_IMAGE_SIDE = 320
_AUDIO_BYTES = 90_000
_AUDIO_S = 10.0
_AUDIO_RATE_HZ = 16_000
MEDIA_BYTES = 4_000_000  # of all pictures and sounds of a page together, as text
_SMALL_IMAGE_BYTES = 8_000  # a picture of a few pixels: shown with sharp edges
_BROWSER_IMAGES = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}
_LOUD = {b"RIFF": "audio/wav", b"fLaC": "audio/flac", b"OggS": "audio/ogg"}


@dataclass(frozen=True)
class Example:
    """A record and what was answered."""

    record: Record
    predicted: str
    confidence: float
    probabilities: Mapping[str, float]  # likeliest first, as many as are worth showing
    group: str = ""  # the heading it stands under, e.g. ``form=speech_unseen``
    abstained: bool = False

    @property
    def correct(self) -> bool:
        return self.predicted == self.record.target.label


def choose(table: pa.Table, column: str | None, *, each: int = 3, seed: int = 0) -> dict[str, str]:
    """Ids of up to `each` right and `each` wrong answers for every value of the slice `column` (or of the whole, where
    there is none), with the group they belong to. Which ones depends on the seed and the ids alone."""
    groups = table[slice_column(column)].to_pylist() if column else [""] * table.num_rows
    cells: dict[tuple[str, bool], list[str]] = {}
    columns = (table[name].to_pylist() for name in ("id", "label", "predicted", "error", "without"))
    for (key, label, predicted, error, without), group in zip(zip(*columns, strict=True), groups, strict=True):
        if error is None and not without and group is not None:
            cells.setdefault((group, label == predicted), []).append(key)
    out: dict[str, str] = {}
    for (group, _), ids in sorted(cells.items()):
        ranked = sorted(ids, key=lambda key: (zlib.crc32(f"{seed}:{key}".encode()), key))
        heading = f"{column}={group}" if column else ""
        out |= dict.fromkeys(ranked[:each], heading)
    return out


def likeliest(
    labels: Sequence[str], probabilities: Sequence[float], *, count: int = 4, also: str | None = None
) -> dict[str, float]:
    """The `count` most probable labels, first first; in place of the last of them the label `also`, if it is none."""
    order = np.argsort(-np.asarray(probabilities), kind="stable")[:count].tolist()
    if also in labels and labels.index(also) not in order:
        order[-1] = labels.index(also)
    return {labels[index]: float(probabilities[index]) for index in order}


def image_uri(data: bytes, limits: Limits) -> str:
    """The picture as a data URI; a large one, or of a format that browsers do not know, as a smaller WebP.

    Raises:
        MediaError: it cannot be read.
    """
    kind = _BROWSER_IMAGES.get(check_image(data, limits).format)
    if kind and len(data) <= _IMAGE_BYTES:
        return _uri(kind, data)
    picture = decode_image(data, limits)
    picture.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80)
    return _uri("image/webp", out.getvalue())


def audio_uri(data: bytes, limits: Limits) -> str:
    """The sound as a data URI; a large one as its first ten seconds in Ogg Vorbis.

    Raises:
        MediaError: it cannot be read.
    """
    kind = _LOUD.get(data[:4])
    if kind and len(data) <= _AUDIO_BYTES:
        return _uri(kind, data)
    samples = decode_audio(data, _AUDIO_RATE_HZ, limits)[: int(_AUDIO_S * _AUDIO_RATE_HZ)]
    out = io.BytesIO()
    soundfile.write(out, samples, _AUDIO_RATE_HZ, format="OGG", subtype="VORBIS")
    return _uri("audio/ogg", out.getvalue())


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
    told = "Chosen by a seeded draw, mistakes first. The bars are the likeliest answers: green is the right one."
    return join(tag("p", told, class_="soft"), parts) if parts else None


def _card(example: Example, media: tuple[Child, Child]) -> Markup:
    record, right = example.record, example.record.target.label
    picture, sound = media
    words = "\n".join(text.strip() for kind, text in record.segments() if kind == "text" and text.strip())
    spoken = record.meta.get("transcript") if record.audios else None
    asked = [tag("p", words, class_="asked")] if words else []
    if spoken:
        asked.append(tag("p", f"“{spoken}”", class_="asked spoken"))
    verdict: list[Child] = ["answer ", tag("b", example.predicted, class_="ok" if example.correct else "no")]
    if not example.correct:
        verdict += [", right is ", tag("b", right)]
    verdict.append(f" · confidence {percent(example.confidence)}")
    if example.abstained:
        verdict.append(" · below the bundle's threshold")
    about = " · ".join(filter(None, (record.meta.get("voice") and f"voice {record.meta['voice']}", record.id)))
    return tag(
        "article",
        tag("div", picture, tag("div", asked or tag("p", "(no words)", class_="soft"), class_="side"), class_="top"),
        sound,
        tag("p", verdict, class_="verdict"),
        _bars(example),
        tag("p", about, class_="about"),
        class_="example right" if example.correct else "example wrong",
    )


def _bars(example: Example) -> Markup:
    rows: list[Child] = []
    for label, value in example.probabilities.items():
        kind = "is-truth" if label == example.record.target.label else "is-said" if label == example.predicted else None
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


def group_name(name: str) -> str:
    """``form=speech_known`` as ``form: speech known``."""
    column, equals, value = name.partition("=")
    return f"{column}: {value.replace('_', ' ')}" if equals else name


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
