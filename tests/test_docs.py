"""The docs say what is so: every command in them is one, every key and file is there, and the site is whole."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from docs.made import commands, http, settings
from mmagent import config as configs
from mmagent.agent import policy
from mmagent.arguments import parser_of
from serve.config import ServeConfig
from tests import tutorials
from tests.test_serve_page import CHROMIUM
from tests.tutorials import CHECKOUT

PAGES = tutorials.pages()
STORED = {"serve/keys.json", "serve/audit.jsonl", "serve/store.sqlite"}  # below the storage root
_PATH = re.compile(r"(?<![\w/.$-])(?:mmagent|jobs|serve|tests|docs|cluster)/[\w./*-]*[\w*]")
_KEY = re.compile(r"`([a-z]+(?:\.[a-z0-9_]+)+)(?:=[^`]*)?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_every_command_of_a_page_is_taken_by_its_parser(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for module, *arguments in tutorials.commands(tutorials.read(page)):
        if not module.startswith(("jobs.", "serve.")):
            continue  # pip, tests.bench
        try:
            parsed = parser_of(importlib.import_module(module).main).parse_args(arguments)
            if overrides := getattr(parsed, "overrides", None):
                recipe = getattr(parsed, "config", None) or "jobs/recipes/small.yaml"
                configs.load(CHECKOUT / recipe, overrides)
        except SystemExit as ended:
            if ended.code:  # --help ends with 0
                wrong.append(f"{module} {arguments}: {capsys.readouterr().err}")
        except (ImportError, AttributeError, configs.ConfigError) as error:
            wrong.append(f"{module} {arguments}: {error}")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_every_key_file_and_target_that_a_page_names_is_there(page: Path) -> None:
    text = tutorials.read(page)
    known = configs.keys()
    named = {key for key in _KEY.findall(text) if key.partition(".")[0] in configs.Config.model_fields}
    suffixes = (".py", ".yaml", ".json", ".md")  # `data.json` is a file
    unknown = sorted(key for key in named if key not in known and not key.endswith(suffixes) and not _is_section(key))
    assert not unknown
    paths = {path for path in _PATH.findall(text) if path not in STORED and not path.startswith("cluster/")}
    assert not sorted(path for path in paths if not list(CHECKOUT.glob(path)))
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) - {"bench-"} <= targets


def _is_section(key: str) -> bool:
    known = configs.keys()
    return any(each.startswith(f"{key}.") for each in known)


@pytest.mark.skipif(not (CHECKOUT / "cluster").is_dir(), reason="there is no cluster/ in this checkout")
def test_every_file_of_cluster_that_a_page_names_is_there() -> None:
    # kubectl itself is not run: there is no Kubernetes here.
    named = {path for page in PAGES for path in _PATH.findall(tutorials.read(page)) if path.startswith("cluster/")}
    assert not sorted(path for path in named if not list(CHECKOUT.glob(path)))


def test_what_a_page_shows_as_a_file_can_be_read(tmp_path: Path) -> None:
    seen = set()
    for page in PAGES:
        for block in tutorials.blocks(tutorials.read(page)):
            if block.kind == "yaml":
                yaml.safe_load(block.text)
                if block.title == "agent.yaml":
                    (tmp_path / "agent.yaml").write_text(block.text)
                    assert policy.read(tmp_path / "agent.yaml").rules
                    seen.add(block.title)
            elif block.kind == "python":
                compile(block.text, str(page), "exec")
    assert seen == {"agent.yaml"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: strictly, so that every link and anchor leads somewhere."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(CHECKOUT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_every_command_and_key_has_its_place_in_the_site(site: Path) -> None:
    found = commands.modules()
    assert {"jobs.prepare", "jobs.train", "jobs.search", "jobs.refine", "serve.start", "serve.keys"} <= set(found)
    for module in found:
        page = _words(site / "reference" / "commands" / f"{module}.html")
        for action in commands.parser(module)._actions:
            assert all(flag in page for flag in action.option_strings if flag not in ("-h", "--help"))
    page, known = _words(site / "reference" / "settings.html"), configs.keys()
    assert not [key for key in known if key not in page]
    flags = _words(site / "reference" / "commands" / "serve.start.html")
    assert not [name for name, field in ServeConfig.model_fields.items() if name != "key_hashes"
                and " ".join((field.description or "").split())[:40] not in flags]  # fmt: skip
    recipes = (site / "reference" / "recipes.html").read_text()
    assert not [file.name for file in (CHECKOUT / "jobs" / "recipes").glob("*.yaml") if file.name not in recipes]
    api = _words(site / "reference" / "http.html")
    assert not [path for path in http.document()["paths"] if path not in api]
    assert "Predictor" in _words(site / "reference" / "library.html")


def _words(page: Path) -> str:
    text = re.sub(r"<[^>]+>", "", page.read_text())
    for sign, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&amp;", "&")):
        text = text.replace(sign, letter)
    return " ".join(text.split())


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source|object|link)\b[^>]*?(?:src|href|data)=[\"']?((?:https?:)?//[^\"' >]+)"
    )
    assert loads.search('<link rel="stylesheet" href="https://fonts.example/x.css">')
    assert not [found for page in site.rglob("*.html") for found in loads.findall(page.read_text())]
    assert not [sheet.name for sheet in site.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//", sheet.read_text())]
    # Material would fetch what draws these from a CDN: our pictures are drawn when the site is built.
    assert not [page.name for page in site.rglob("*.html") if 'class="mermaid"' in page.read_text()]
    assert (site / "architecture.html").read_text().count('<svg class="picture"') == 3


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_asks_nobody_else_and_no_page_is_wider_than_it(site: Path, width: int) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="dark").new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        wide = []
        for file in _html(site):
            page.goto(file.as_uri())
            if page.evaluate("document.documentElement.scrollWidth") > width:
                wide.append(file.name)
        browser.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    assert wide == []


def _html(site: Path) -> Iterator[Path]:
    return (file for file in sorted(site.rglob("*.html")) if file.name != "404.html")


def test_a_key_says_what_it_takes() -> None:
    page = settings.page()
    lines = {line.split("</code>")[0].rpartition("<code>")[2].replace("<wbr>", ""): line for line in page.splitlines()}
    assert "*1.0* · number, > 0 and <= 1" in lines["data.share"].replace("&lt;", "<").replace("\\>", ">")
    assert "*must be given*" in lines["data.name"]
    assert "`output` · `input`" in lines["model.join"]
    assert "number, > 0 · `auto`" in lines["train.epochs"].replace("\\>", ">")
