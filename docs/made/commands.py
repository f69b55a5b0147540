"""The pages of the commands: each command's manual and its flags, from its own parser."""

from __future__ import annotations

import argparse
import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from docs.made import markup
from mmagent.arguments import Parser, parser_of

CHECKOUT = Path(__file__).parents[2]
ROOMS = ("jobs", "serve")
FOLDER = "reference/commands"


def modules() -> list[str]:
    """Every module that is run by users: it reads its arguments by a `Parser`."""
    files = sorted(file for room in ROOMS for file in (CHECKOUT / room).glob("*.py"))
    return [f"{file.parent.name}.{file.stem}" for file in files if _is_command(file)]


def _is_command(file: Path) -> bool:
    tree = ast.parse(file.read_text())
    parses = any(isinstance(node, ast.ImportFrom) and node.module == "mmagent.arguments" for node in tree.body)
    runs = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
    return parses and runs


def parser(module: str) -> Parser:
    return parser_of(importlib.import_module(module).main)


def pages() -> Iterator[tuple[str, str]]:
    """The place of each page in the site, and its text."""
    rows = []
    for module in modules():
        found = parser(module)
        yield f"{FOLDER}/{module}.md", page(module, found)
        rows.append([f"[`{module}`]({module}.md)", markup.cell(_first(found.description or ""))])
    text = "# Commands\n\nEach is run as `python -m NAME`; `--help` shows what its page here shows.\n\n"
    yield f"{FOLDER}/index.md", text + markup.table(["command", "what it does"], rows)


def page(module: str, found: Parser) -> str:
    text = f"# {module}\n\n{markup.prose(found.description or '')}\n\n## Flags\n\n{_flags(found)}"
    for name, inner in _within(found):
        text += f"\n### {name}\n\n{markup.prose(inner.description or '')}\n\n{_flags(inner)}"
    if any(action.metavar == "key.path=value" for action in found._actions):
        text += "\nThe keys of `key.path=value` are [those of a recipe](../settings.md).\n"
    return text


def _flags(found: argparse.ArgumentParser) -> str:
    formatter = found._get_formatter()
    rows = []
    for action in found._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        said = formatter._expand_help(action) if action.help else ""
        wanted = " **needed**" if action.required and action.option_strings else ""
        shown = formatter._format_action_invocation(action)
        if action.choices is not None and not action.option_strings:
            shown = " · ".join(map(str, action.choices))
        rows.append([markup.code(shown), markup.cell(said) + wanted])
    return markup.table(["flag", "what"], rows) if rows else "None.\n"


def _within(found: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _first(manual: str) -> str:
    """The first sentence."""
    paragraph = manual.split("\n\n")[0]
    return " ".join(paragraph.split()).partition(". ")[0].rstrip(".:") + "."
