"""What the site has beyond its files: pages made of the code at each build, and pictures where a page asks for one.

mkdocs calls these functions (`hooks` in mkdocs.yml). ``<!-- picture:NAME -->`` in a page becomes the picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.made import commands, http, pictures, settings

_PICTURE = re.compile(r"<!-- picture:([a-z]+) -->")


def pages() -> Iterator[tuple[str, str]]:
    """The place of each page that is made, and its text."""
    yield from commands.pages()
    yield "reference/settings.md", settings.page()
    yield "reference/recipes.md", settings.recipes()
    yield "reference/http.md", http.page()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every command gets its line in the navigation."""
    lines = [{module: f"{commands.FOLDER}/{module}.md"} for module in commands.modules()]
    for part in config.nav or []:
        for entry in part.get("Reference", []):
            if "Commands" in entry:
                entry["Commands"] = [f"{commands.FOLDER}/index.md", *lines]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for place, text in pages():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _PICTURE.sub(lambda match: pictures.draw(match[1]), markdown)
