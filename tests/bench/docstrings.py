"""Real text that every environment has: what libraries say of their functions, and whose function it is.

The prose of docstrings, up to their first section (parameters, examples, ...), without the libraries' own names.
Modules are divided between training and test, since functions of one module read alike.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jobs.corpus import share_of

LIBRARIES = {
    "networkx": ("networkx", "nx"), "nltk": ("nltk",), "numpy": ("numpy", "np"), "pandas": ("pandas", "pd"),
    "ray": ("ray",), "scipy": ("scipy",), "sklearn": ("sklearn", "scikit-learn"), "sqlalchemy": ("sqlalchemy",),
    "sympy": ("sympy",), "torch": ("torch", "pytorch"), "transformers": ("transformers", "huggingface"),
}  # fmt: skip
TEST_SHARE = 0.3  # of the modules
SHORTEST, LONGEST = 8, 60  # words
_HEADINGS = "args|arguments|parameters|returns?|raises|yields|examples?|notes?"
_END = re.compile(rf"^\s*(\.\. |>>>|[-=~]{{4,}}|({_HEADINGS})\s*:?\s*$)", re.IGNORECASE)


class Said(NamedTuple):
    """A docstring's prose."""

    words: str
    of: str  # which library
    test: bool


def collect() -> list[Said]:
    """All of it, each text once, library by library and file by file."""
    found: dict[str, Said] = {}
    for library, names in LIBRARIES.items():
        spec = importlib.util.find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"{library} is not installed, of whose docstrings this measurement is made: make setup")
        own = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, names))})(?!\w)", re.IGNORECASE)
        root = Path(next(iter(spec.submodule_search_locations)))
        for file in sorted(root.rglob("*.py")):
            name = str(file.relative_to(root))
            if "test" in name:
                continue
            test = share_of(f"{library}/{name}") < TEST_SHARE
            for doc in _docstrings(file):
                words = own.sub("it", _prose(doc))
                if SHORTEST <= len(words.split()) <= LONGEST:
                    found.setdefault(words, Said(words, library, test))
    return list(found.values())


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            yield doc


def _prose(doc: str) -> str:
    """Of a docstring, up to its first section; a line of dashes makes the line above it a heading."""
    lines: list[str] = []
    for line in inspect.cleandoc(doc).splitlines():
        if _END.match(line):
            if lines and re.match(r"^\s*[-=~]{4,}", line):
                lines.pop()
            break
        lines.append(line)
    return " ".join(re.sub(r"[`*]+|:\w+:", "", " ".join(lines)).split())
