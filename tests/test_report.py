"""The page: complete, closed to the world, safe against what a data set says; its charts, examples and markup."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pytest

from mmagent import charts, comparison, data_uri, evaluation, example_cards, examples, predictions, report
from mmagent.examples import Example
from mmagent.markup import Markup, join, tag
from mmagent.media import Limits
from mmagent.record import Media, Message, Record, Target, escape
from mmagent.targets import TaskInfo
from mmagent.tasks import Decision, make_all

LABELS = ["<script>alert(1)</script>", "red"]
BAD = LABELS[0]
VOID = {"meta", "br", "img"}


class Reader(HTMLParser):
    """Checks that elements nest, and keeps what the tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def rows_of_a_test() -> pa.Table:
    rows = []
    for index in range(40):
        form = ("text", "speech")[index % 2]
        for without in ("", "image"):
            red = 0.95 - 0.02 * index
            row = {
                "id": f"q{index}",
                "group": f"g{index // 4}",
                "task": "classify",
                "without": without,
                "label": LABELS[index % 3 == 0],
                "predicted": "red" if red > 0.5 else BAD,
                "right": LABELS[index % 3 == 0] == ("red" if red > 0.5 else BAD),
                "confidence": max(red, 1 - red),
                "probabilities": [1 - red, red],
                "abstained": False,
                "error": None,
                "slice.form": form,
            }
            rows.append(row)
    rows.append(
        {"id": "broken", "group": "x", "task": "classify", "without": "", "label": "red", "error": f"images[0]: {BAD}"}
    )
    return pa.Table.from_pylist(rows, predictions.schema(["form"]))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    table = rows_of_a_test()
    before = {"majority": comparison.compare(table, [True, False] * 40 + [None], f"a guess {BAD}")}
    return judge(table, LABELS, bundle=f"demo{BAD}", before={"classify": before})


def judge(table: pa.Table, labels: Sequence[str], bundle: str = "demo", **more: Any) -> dict[str, Any]:
    tasks = make_all({"classify": TaskInfo("classify", tuple(labels))})
    return evaluation.evaluate(table, tasks, "classify", bundle=bundle, data="shop", split="test", **more)


def example(image: bytes, sound: bytes | None = None, *, words: str = BAD, predicted: str = "red") -> Example:
    content = "<image>" + ("<audio>" if sound else " " + escape(words))
    record = Record(
        id=f"q1{BAD}",
        messages=(Message("user", content),),
        images=(Media(image),),
        audios=(Media(sound),) if sound else (),
        target=Target(label="red"),
        meta={"transcript": words, "voice": "en+f1"},
    )
    chances = {"red": 0.9, BAD: 0.1}
    said = Decision(label=predicted, probabilities=chances, confidence=0.9)
    return Example(record, "classify", said, "red", predicted == "red", chances, "form=text")


def page_of(result: dict[str, Any], *shown: Example) -> str:
    curves = [{"kind": "train", "step": step, "loss": 2 / step} for step in range(1, 900)]
    curves += [{"kind": "validation", "step": step, "loss": 2 / step, "accuracy": step / 1000} for step in (100, 500)]
    return report.render(result, curves=curves, examples={"classify": shown})


def test_what_a_data_set_says_is_text_and_nothing_else(
    result: dict[str, Any], make_png: Callable, make_wav: Callable
) -> None:
    page = page_of(result, example(make_png()), example(make_png(), make_wav(), predicted=BAD))
    read = Reader(page)
    assert not read.all("script")
    assert BAD in read.text  # shown, as words
    assert page.count("<script") == 0
    handlers = [key for _, attributes in read.elements for key in attributes if key.startswith("on")]
    assert not handlers


def test_the_page_asks_nothing_of_the_world(result: dict[str, Any], make_png: Callable, make_wav: Callable) -> None:
    read = Reader(page_of(result, example(make_png(), make_wav())))
    links = [attributes[key] for _, attributes in read.elements for key in ("src", "href") if attributes.get(key)]
    assert links
    assert all(link and link.startswith(("data:", "#")) for link in links)
    [policy] = [item["content"] for item in read.all("meta") if item.get("http-equiv")]
    assert policy
    assert "default-src 'none'" in policy
    anchors = {item["id"] for _, item in read.elements if "id" in item}
    assert {link[1:] for link in links if link and link.startswith("#")} <= anchors


def test_pictures_and_sounds_are_inside_and_have_names(
    result: dict[str, Any], make_png: Callable, make_wav: Callable
) -> None:
    image, sound = make_png("green"), make_wav()
    read = Reader(page_of(result, example(image, sound)))
    [picture], [player] = read.all("img"), read.all("audio")
    assert base64.b64decode((picture["src"] or "").partition(",")[2]) == image
    assert base64.b64decode((player["src"] or "").partition(",")[2]) == sound
    assert "controls" in player
    assert picture["alt"]
    assert all(chart["aria-label"] for chart in read.all("svg"))
    assert all(head.get("scope") for head in read.all("th"))


def test_it_shows_the_numbers(result: dict[str, Any]) -> None:
    text = Reader(page_of(result)).text.replace(charts.SPACE, " ")
    accuracy = result["metrics"]["accuracy"]
    assert charts.percent(accuracy["value"]).replace(charts.SPACE, " ") in text
    assert "form: speech" in text
    assert "Without its image" in text
    assert "majority answer" in text
    assert f"Not answered: 1 x images[0]: {BAD}" in text


def test_a_page_of_the_least_is_a_page_too() -> None:
    rows = [{"id": "1", "group": "1", "task": "classify", "without": "", "label": "red", "predicted": "red",
             "right": True, "confidence": 1.0,
             "probabilities": [0.0, 1.0], "abstained": False}]  # fmt: skip
    table = pa.Table.from_pylist(rows, predictions.schema([]))
    result = judge(table, LABELS)
    read = Reader(report.render(result))
    assert "100" + charts.SPACE + "%" in read.text
    assert not read.all("audio")


def test_many_classes_become_a_list_of_mistakes() -> None:
    names = [f"c{index:03d}" for index in range(60)]
    rows = [
        {"id": str(index), "group": str(index), "task": "classify", "without": "", "label": names[index],
         "predicted": names[index // 2], "right": index == index // 2,
         "confidence": 0.5, "probabilities": [1 / 60] * 60, "abstained": False}
        for index in range(60)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, predictions.schema([]))
    result = judge(table, names)
    assert "most frequent mistakes" in Reader(report.render(result)).text


def test_media_that_cannot_be_shown_is_named(result: dict[str, Any]) -> None:
    text = Reader(page_of(result, example(b"no picture"))).text
    assert "cannot be shown: not a picture" in text


def test_a_full_page_takes_no_more_media(
    result: dict[str, Any], make_png: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_cards, "MEDIA_BYTES", 300)
    read = Reader(page_of(result, *[example(make_png(), words=str(index)) for index in range(9)]))
    assert 1 <= len(read.all("img")) < 9
    assert "the page is full" in read.text


def test_large_media_get_smaller(make_png: Callable, make_wav: Callable) -> None:
    limits = Limits()
    large = data_uri.image_uri(make_png("red", (2000, 2000), "BMP"), limits)
    assert large.startswith("data:image/webp;base64,")
    assert len(large) < 20_000
    sound = data_uri.audio_uri(make_wav(440, 30.0), limits)
    assert sound.startswith("data:audio/ogg;base64,")
    assert len(sound) < 200_000


def test_examples_are_right_and_wrong_ones_of_each_form_by_seed() -> None:
    table = rows_of_a_test()
    chosen = examples.choose(table, "form", each=2, seed=1)
    assert chosen == examples.choose(table, "form", each=2, seed=1)
    assert chosen != examples.choose(table, "form", each=2, seed=2)
    rows = {row["id"]: row for row in table.to_pylist() if not row["without"]}
    cells = [(group, rows[key]["label"] == rows[key]["predicted"]) for key, group in chosen.items()]
    assert sorted(cells) == sorted([(f"form={f}", right) for f in ("text", "speech") for right in (True, False)] * 2)
    assert "broken" not in chosen
    assert set(examples.choose(table, None, each=2).values()) == {""}


def test_the_likeliest_labels_and_the_right_one() -> None:
    labels, chances = list("abcdef"), [0.1, 0.3, 0.05, 0.25, 0.2, 0.1]
    assert list(examples.likeliest(labels, chances)) == ["b", "d", "e", "a"]
    assert list(examples.likeliest(labels, chances, also="c")) == ["b", "d", "e", "c"]
    assert list(examples.likeliest(labels, chances, also="unknown")) == ["b", "d", "e", "a"]


def test_markup_escapes_all_but_markup() -> None:
    assert tag("p", "1 < 2", Markup("<b>x</b>"), None, [3, "&"], class_='a"b') == (
        '<p class="a&quot;b">1 &lt; 2<b>x</b>3&amp;</p>'
    )
    assert tag("audio", controls=True, loop=False, aria_label=None) == "<audio controls></audio>"
    assert isinstance(join("<"), Markup)


@pytest.mark.parametrize(
    ("value", "words"), [(1.0, "100 %"), (0.99999, "99.9 %"), (0.9731, "97.3 %"), (0.0, "0.0 %"), (0.99949, "99.9 %")]
)
def test_a_percentage_is_never_rounded_up_to_all(value: float, words: str) -> None:
    assert charts.percent(value) == words.replace(" ", charts.SPACE)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1800, [0, 500, 1000, 1500]),
        (0.96, 1, [0.96, 0.97, 0.98, 0.99, 1]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, wanted: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(wanted)


def test_a_line_has_no_more_points_than_can_be_seen() -> None:
    series = charts.Series("loss", [(step, 1 / step) for step in range(1, 10_000)])
    drawn = charts.lines([series], title="loss", x_label="step", y_label="loss", floor=0)
    [path] = re.findall(r'd="([^"]+)" class="line', drawn)
    assert path.count("L") < 250
