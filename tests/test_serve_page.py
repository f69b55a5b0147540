"""The page, in a real browser: a conversation, uploads, a correction, errors; by keyboard, on a phone, in the dark."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from mmagent import channels, feedback
from mmagent.predictor import Predictor
from mmagent.targets import TaskInfo
from serve import keys
from serve.config import ServeConfig
from serve.service import Service
from tests.serving import running

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    expect.set_options(timeout=20_000)  # a crowded machine is no mistake of the page
    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture
def address(tiny_bundle: Path, storage: Path) -> Iterator[str]:
    channels.append("production", tiny_bundle, share=1, act="promote", by="test")
    with running(Service(Predictor.load(tiny_bundle), ServeConfig(), "production")) as found:
        yield found


@pytest.fixture
def address_of_many(make_bundle: Callable[..., Path], storage: Path) -> Iterator[str]:
    """Of a service that was asked a question of several kinds; the text begins outside the Basic Multilingual Plane."""
    infos = {
        name: TaskInfo(name, ("blue", "green", "red"), mean=3.0, deviation=2.0)
        for name in ("tag", "multilabel", "regress", "extract")
    }
    made = make_bundle(storage / "many", infos, "tag")
    with running(Service(Predictor.load(made, device="cpu"), ServeConfig())) as found:
        for name in infos:
            body = {"text": "😀 is the red circle?", "task": name}
            body |= {"context": "a red circle, not a blue one"} if name == "extract" else {}
            httpx.post(f"{found}/v1/predict", json=body).raise_for_status()
        while len(httpx.get(f"{found}/admin/questions").json()["data"]) < len(infos):
            time.sleep(0.02)
        yield found


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    yield from opened(browser, address)


def opened(browser: Browser, address: str, **context: Any) -> Iterator[Page]:
    """A page of which no script fails and which asks no other host."""
    own = browser.new_context(**context)
    page = own.new_page()
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", "blob:")) else errors.append(request.url),
    )
    page.goto(address)
    yield page
    assert errors == []
    own.close()


def asked(page: Page, words: str) -> Any:
    page.get_by_label("Question", exact=True).last.fill(words)
    page.get_by_role("button", name="Send").click()
    turn = page.locator(".turn").last
    expect(turn.locator(".sure span")).to_contain_text("% sure")
    return turn


def test_a_conversation_with_a_picture_and_a_sound(
    page: Page, address: str, tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    expect(page.locator("#bundle")).to_contain_text("tiny · production · text, image, audio")
    (tmp_path / "shape.png").write_bytes(make_png("red", (64, 64)))
    (tmp_path / "ask.wav").write_bytes(make_wav(seconds=0.6))
    page.locator("#file").set_input_files([tmp_path / "shape.png", tmp_path / "ask.wav"])
    expect(page.locator("#parts li")).to_have_count(2)
    turn = asked(page, "what color is the shape?")
    assert turn.locator(".words").inner_text() in ("red", "green", "blue", "black")
    expect(turn.locator(".asked img")).to_have_count(1)
    expect(turn.locator(".why mark")).to_have_count(6)
    words = turn.locator(".words").inner_text()
    alt = f"The picture, with what speaks for “{words}” in warm colour"
    expect(turn.locator(".why img")).to_have_attribute("alt", alt)
    expect(turn.locator(".spans span")).to_have_count(20)
    turn.get_by_text("Sources and steps").click()
    expect(turn.locator(".steps dd").filter(has_text="ms").last).to_be_visible()
    expect(turn.locator(".steps dt").filter(has_text="model")).to_be_visible()
    expect(page.locator("#parts li")).to_have_count(0)
    second = asked(page, "and now?")
    expect(page.locator(".turn")).to_have_count(2)
    assert second.locator(".why mark").count() > 2  # what was said before is read too
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_a_correction_is_stored(page: Page) -> None:
    turn = asked(page, "what color is the shape?")
    turn.get_by_role("button", name="Wrong").click()
    turn.get_by_label("What would be right?").fill("blue")
    turn.get_by_role("button", name="Send").click()
    expect(turn.get_by_text("Thank you.")).to_be_visible()
    [line] = [json.loads(line) for file in feedback.folder().glob("*") for line in file.read_text().splitlines()]
    assert (line["says"], line["feedback"]["label"]) == ("wrong", "blue")
    again = asked(page, "is there a circle?")
    again.get_by_role("button", name="Right").click()
    expect(again.get_by_text("Thank you.")).to_be_visible()
    expect(again.get_by_role("button", name="Wrong")).to_be_disabled()


def test_mistakes_lose_nothing(page: Page, tmp_path: Path) -> None:
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#status")).to_have_text("There is nothing to ask yet.")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    page.locator("#file").set_input_files([tmp_path / "notes.pdf"])
    expect(page.locator("#status")).to_contain_text("neither a picture nor a sound")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.locator("#file").set_input_files([tmp_path / "broken.png"])
    page.get_by_label("Question", exact=True).last.fill("what is it?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turn .words.error")).to_contain_text("not a picture")
    expect(page.locator("#words")).to_have_value("what is it?")
    expect(page.locator("#parts li")).to_have_count(1)
    page.get_by_role("button", name="Remove broken.png").click()
    expect(asked(page, "what is it?").locator(".words")).not_to_have_class("words error")


def test_dropped_and_pasted(page: Page, make_png: Callable[..., bytes]) -> None:
    data = list(make_png("blue"))
    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([event, holder, data]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(data)], "p.png", { type: "image/png" }));
                const Kind = event === "paste" ? ClipboardEvent : DragEvent;
                document.dispatchEvent(new Kind(event, { [holder]: transfer, bubbles: true, cancelable: true }));
            }""",
            [event, holder, data],
        )
    expect(page.locator("#parts img")).to_have_count(2)


def test_by_keyboard_alone(page: Page) -> None:
    expect(page.locator("#words")).to_be_focused()
    page.keyboard.type("what color")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("is it?")
    assert page.locator("#words").input_value() == "what color\nis it?"
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    expect(turn.locator(".sure span")).to_contain_text("% sure")
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.textContent.trim().slice(0, 20) || document.activeElement.id"))
    assert {"Send", "Conversation", "Admin", "Right", "Wrong", "Why", "New conversation"} <= seen
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, summary, img")]
            .filter((each) => each.offsetParent)
            .filter((each) => !(each.ariaLabel || each.textContent.trim() || each.labels?.length || each.alt))
            .map((each) => each.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize(("scheme", "size"), [("dark", (360, 640)), ("light", (360, 640)), ("dark", (1200, 800))])
def test_on_a_phone_and_in_the_dark(browser: Browser, address: str, scheme: Any, size: tuple[int, int]) -> None:
    context = {"viewport": {"width": size[0], "height": size[1]}, "color_scheme": scheme, "has_touch": size[0] < 500}
    for page in opened(browser, address, **context):
        asked(page, "what color is the shape? " * 5)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        ground, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert contrast(ground, ink) > 7
        box = page.get_by_role("button", name="Send").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= size[1]
        assert box["height"] >= 44


def test_administrators_see_and_act(page: Page, address: str) -> None:
    asked(page, "what color is the shape?")
    page.get_by_role("button", name="Admin").click()
    expect(page.locator("#facts")).to_contain_text("production")
    expect(page.locator("#traffic")).to_contain_text("/v1/chat/completions")
    expect(page.locator("#replicas tr")).to_have_count(1)
    page.get_by_label("Bundle").fill("nothing")
    page.get_by_role("button", name="Deploy").click()
    expect(page.locator("#deployed")).to_contain_text("there is no bundle 'nothing'")
    page.get_by_role("button", name="Roll back").click()
    expect(page.locator("#deployed")).to_contain_text("no bundle before")


def test_administrators_label_what_teaches_most(
    page: Page, tmp_path: Path, make_png: Callable[..., bytes], storage: Path
) -> None:
    """By keyboard: what is saved is feedback, with the question and its picture."""
    for number, colour in enumerate(("red", "green", "blue")):
        (tmp_path / f"{number}.png").write_bytes(make_png(colour, (24, 24)))
        page.locator("#file").set_input_files(tmp_path / f"{number}.png")
        expect(page.locator("#parts li")).to_have_count(1)
        asked(page, f"what color is number {number}?")
    page.get_by_role("button", name="Admin").click()
    expect(page.locator("#drift")).to_contain_text("nothing is told of so few answers")
    expect(page.locator("#rounds")).to_contain_text("No round yet")
    page.get_by_role("button", name="Show what teaches most").press("Enter")
    expect(page.locator("#label-state")).to_have_text("3 questions wait for a label.")
    expect(page.locator("#label-question")).to_contain_text("what color is number")
    assert page.evaluate("document.querySelector('#label-question img').naturalWidth") == 24
    expect(page.locator("#label-said")).to_contain_text("% sure")
    expect(page.get_by_label("The right label")).to_be_focused()
    page.keyboard.type("black")
    page.keyboard.press("Enter")
    expect(page.locator("#label-state")).to_have_text("1 labelled. 2 more are here.")
    expect(page.get_by_label("The right label")).to_be_focused()
    said = re.search("“(.*)”", page.locator("#label-said").inner_text())
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="The model is right")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#label-state")).to_have_text("2 labelled. 1 more are here.")
    page.get_by_role("button", name="Skip").press("Enter")
    expect(page.locator("#label-state")).to_have_text("2 labelled. Thank you.")
    expect(page.get_by_role("button", name="Show what teaches most")).to_be_focused()
    rows = [feedback.record(each) for each in feedback.read(feedback.folder()).said]
    assert said is not None
    assert [row.target.label for row in rows] == ["black", said[1]]
    assert all(row.images for row in rows)
    page.get_by_role("button", name="Show what teaches most").click()
    expect(page.locator("#label-state")).to_have_text("1 questions wait for a label.")


def test_rounds_and_drift_are_shown(browser: Browser, make_bundle: Callable[..., Path], storage: Path) -> None:
    labels = ("red", "green")
    info = TaskInfo("classify", labels, dict.fromkeys(labels, 500))
    made = make_bundle(storage / "counted", {"classify": info}, "classify")
    channels.append("production", made, share=1, act="promote", by="test")
    place = storage / "refine" / "production" / "r001"
    place.mkdir(parents=True)
    told = {"state": "refused", "said": 9, "train": 7, "replayed": 14, "aside": {"unknown label": 2}}
    (place / "round.json").write_text(json.dumps(told))
    check = {"name": "fixed", "before": 0.9, "after": 0.5, "rule": "not surely below -0.02", "passed": False}
    (place / "gate.json").write_text(json.dumps({"checks": [check]}))
    with running(Service(Predictor.load(made, device="cpu"), ServeConfig(), "production")) as address:
        body = {"inputs": [{"text": "what is it?"} for _ in range(60)]}
        httpx.post(f"{address}/v1/predict", json=body, timeout=60).raise_for_status()
        for page in opened(browser, address):
            page.get_by_role("button", name="Admin").click()
            round = page.locator("#rounds summary")
            words = "production-r001: refused by the gate (1 checks); 7 new rows, 14 replayed, 2 set aside"
            expect(round).to_have_text(words)
            round.press("Enter")
            expect(page.locator("#rounds td").nth(3)).to_have_text("not surely below -0.02")
            expect(page.locator("#drift tr")).to_have_count(2)  # of all, and of text
            shift = float(page.locator("#drift tr").first.locator("td").nth(3).inner_text())
            assert shift > 0.5  # one label alone is answered


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_every_kind_of_answer_is_labelled_on_a_phone(browser: Browser, address_of_many: str, scheme: Any) -> None:
    seen = set()
    context = {"viewport": {"width": 360, "height": 640}, "color_scheme": scheme, "has_touch": True}
    for page in opened(browser, address_of_many, **context):
        page.get_by_role("button", name="Admin").click()
        page.get_by_role("button", name="Show what teaches most").click()
        expect(page.locator("#label-state")).to_have_text("4 questions wait for a label.")
        for left in (3, 2, 1, 0):
            box = page.locator("#label-answer")
            task = page.locator("#label-said").inner_text().split(":")[0]
            seen.add(task)
            if task == "tag":
                box.get_by_label("The text").evaluate("each => each.setSelectionRange(10, 13)")
                box.get_by_label("Label", exact=True).fill("red")
                box.get_by_role("button", name="Mark the selection").click()
                expect(box.locator("li")).to_contain_text("red (red)")
            elif task == "multilabel":
                box.get_by_label("green").check()
                box.get_by_label("blue").check()
            elif task == "regress":
                box.get_by_label("The right value").fill("2.5")
            else:
                box.get_by_label("The right text").fill("red circle")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            ground, ink = page.evaluate(
                "(each => [getComputedStyle(each).backgroundColor, getComputedStyle(each).color])"
                "(document.querySelector('#label-question'))"
            )
            assert contrast(ground, ink) > 7
            page.get_by_role("button", name="Save the right answer").click()
            expect(page.locator("#label-state")).to_contain_text(f"{left} more" if left else "Thank you.")
    assert seen == {"tag", "multilabel", "regress", "extract"}
    rows = {row.task: row.target for row in map(feedback.record, feedback.read(feedback.folder()).said)}
    assert rows["tag"].spans == ({"start": 9, "end": 12, "label": "red"},)
    assert rows["multilabel"].labels == ("blue", "green")
    assert rows["regress"].value == 2.5
    assert rows["extract"].texts == ("red circle",)


def test_a_key_is_asked_for(page: Page, storage: Path) -> None:
    key = keys.Key(id="key_1", name="n", hashes={}, scopes=("ask", "feedback"))
    secret = keys.add(keys.default_file(), key, days=None)
    time.sleep(0.6)
    page.get_by_label("Question", exact=True).last.fill("what color is the shape?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#key-reason")).to_contain_text("an API key is wanted")
    page.get_by_role("textbox", name="Key").fill(secret)
    page.get_by_role("button", name="Use it").click()
    expect(page.locator(".turn .sure span")).to_contain_text("% sure")


def test_the_microphone_is_recorded_and_asked_with(
    playwright: Playwright, address: str, tmp_path: Path, make_wav: Callable[..., bytes]
) -> None:
    (tmp_path / "spoken.wav").write_bytes(make_wav(hz=700.0, seconds=3.0, rate_hz=48_000))
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
             f"--use-file-for-fake-audio-capture={tmp_path / 'spoken.wav'}"]  # fmt: skip
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
    for page in opened(browser, address, permissions=["microphone"]):
        button = page.locator("#record")
        button.click()
        expect(button).to_have_attribute("aria-pressed", "true")
        page.wait_for_timeout(1500)
        button.click()
        expect(button).to_have_attribute("aria-pressed", "false")
        expect(page.locator("#parts li")).to_have_count(1)
        with page.expect_request("**/v1/chat/completions") as sent:
            turn = asked(page, "what is it?")
        said: Any = sent.value.post_data_json
        expect(turn.locator(".spans span")).to_have_count(20)  # what of the sound speaks for the answer
        expect(page.locator("#parts li")).to_have_count(0)
    browser.close()
    [heard] = [part for part in said["messages"][-1]["content"] if part["type"] == "input_audio"]
    sound, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(heard["input_audio"]["data"])))
    assert (heard["input_audio"]["format"], rate_hz, sound.ndim) == ("wav", 16_000, 1)
    assert 0.5 < len(sound) / rate_hz < 10
    loudest = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))).argmax() * rate_hz / len(sound)
    assert loudest == pytest.approx(700, abs=15)


def test_without_a_microphone_it_says_what_to_do(page: Page) -> None:
    page.locator("#record").click()
    expect(page.locator("#status")).to_contain_text("The microphone cannot be used")
    expect(page.locator("#record")).not_to_have_attribute("aria-pressed", "true")
    expect(asked(page, "what is it?").locator(".words")).not_to_have_class("words error")


def test_a_spoken_answer_plays(page: Page) -> None:
    pytest.importorskip("espeakng_loader")
    page.get_by_label("Speak the answer").check()
    turn = asked(page, "what color is the shape?")
    expect(turn.locator(".said > audio")).to_be_visible()
    assert page.evaluate("document.querySelector('.said > audio').duration") > 0.1


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours as CSS writes them."""

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)
