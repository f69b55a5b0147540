"""Words of the code as Markdown: signs that Markdown or HTML would read are kept as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def prose(text: str) -> str:
    """Several paragraphs; lines that are indented by four stay as they are, as a block of code."""
    lines = [line if line.startswith("    ") else plain(line) for line in text.strip().splitlines()]
    return "\n".join(lines)


def plain(line: str) -> str:
    """A line outside of a block: ``<``, ``*`` and ``_`` are letters; within backticks they are anyway."""
    line = line.replace("``", "`")
    pieces = re.split(r"(`[^`]*`)", line)
    return "".join(piece if piece.startswith("`") else _letters(piece) for piece in pieces)


def _letters(text: str) -> str:
    return re.sub(r"([*_\[\]])", r"\\\1", text.replace("<", "&lt;"))


def code(text: str) -> str:
    """A word of the program for a table: a bar would end its cell, and a long word may break behind a dot."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return f"<code>{_breakable(safe)}</code>"


def _breakable(text: str) -> str:
    return re.sub(r"(?<=[a-z])([._])(?=[a-z])", r"\1<wbr>", text)


def cell(text: str) -> str:
    return plain(" ".join(text.split())).replace("|", r"\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
