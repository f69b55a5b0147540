"""The pages of the docs as tests read them: their blocks, the commands in them, and a shell that runs a tutorial."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r'(?:<!-- not run: (?P<why>[^\n]*?) -->\n)?```(?P<kind>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)
_FIGURES = re.compile(r"<!-- figures:[a-z_]+ -->.*?<!-- /figures -->", re.DOTALL)
_ENDS = {";", "&&", "||", "|", "&", ")", ">", "<"}
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Block:
    """title: of the file that it is. why: it is not run, if there is a reason."""

    kind: str
    title: str | None
    why: str | None
    text: str


def pages() -> list[Path]:
    """Every page that people write, the README first."""
    own = [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md")]
    return [*own, *sorted((CHECKOUT / "docs").rglob("*.md"))]


def read(page: Path) -> str:
    """A page without its measured figures, whose names look like keys."""
    return _FIGURES.sub("", page.read_text())


def blocks(text: str) -> list[Block]:
    return [
        Block(found["kind"], found["title"], found["why"], found["text"])
        for found in _BLOCK.finditer(text.replace("\r", ""))
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words behind each ``python -m`` of the shell blocks and of code in sentences; ``...`` is no command."""
    shell = [block.text for block in blocks(text) if block.kind in ("", "sh")]
    spans = [span for span in re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text)) if "python -m" in span]
    for line in "\n".join([*shell, *spans]).replace("\\\n", " ").splitlines():
        if "..." not in line and "python -m" in line:
            yield from _of_line(line)


def _of_line(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words = list(lexer)
    for start, word in enumerate(words):
        if word == "-m" and start and words[start - 1].startswith("python"):
            rest = words[start + 1 :]
            end = next((number for number, each in enumerate(rest) if each in _ENDS), len(rest))
            yield rest[:end]


class Shell:
    """A terminal in a folder that looks like the checkout; variables that a block exports are there in the next.

    Args:
        recipe: what stands in ``jobs/recipes/small.yaml`` there.
        placeholders: words of the page that stand for something of the reader's.
    """

    def __init__(self, folder: Path, recipe: str, placeholders: Mapping[str, str]) -> None:
        self.folder, self._placeholders = folder, placeholders
        folder.mkdir()
        for name in ("mmagent", "serve", "constraints.txt", "pyproject.toml"):
            (folder / name).symlink_to(CHECKOUT / name)
        jobs = folder / "jobs"
        (jobs / "recipes").mkdir(parents=True)
        for place in (CHECKOUT / "jobs").iterdir():
            if place.name not in ("recipes", "__pycache__"):
                (jobs / place.name).symlink_to(place)
        for place in (CHECKOUT / "jobs" / "recipes").iterdir():
            (jobs / "recipes" / place.name).symlink_to(place)
        (jobs / "recipes" / "small.yaml").unlink()
        (jobs / "recipes" / "small.yaml").write_text(recipe)
        self.env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.env.pop("PYTHONPATH", None)
        self._said = ""

    def tutorial(self, page: Path, more: Mapping[str, str]) -> None:
        """Runs all blocks of a page in order.

        Args:
            more: by the title of a file: what stands in it beyond the page's own lines.
        """
        for block in blocks(read(page)):
            if block.why is not None:
                continue
            if block.title is not None:
                file = self.folder / block.title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(self._filled(block.text) + more.get(block.title, ""))
            elif block.kind == "sh":
                self._said = self.run(block.text)
            elif block.kind == "python":
                self._said = self.run(f"python - <<'END'\n{block.text}END\n")
            elif block.kind == "text":
                self._check(block.text)

    def run(self, script: str) -> str:
        """What a script prints; every command of it succeeds."""
        after = self.folder / ".environment"
        whole = f"set -eu -o pipefail\n{self._filled(script)}\nenv -0 > '{after}'\n"
        done = subprocess.run(
            ["bash", "-c", whole], cwd=self.folder, env=self.env, text=True, timeout=_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        print(f"$ {script}\n{done.stdout}")
        assert done.returncode == 0, f"status {done.returncode}:\n{script}\n{done.stdout[-3000:]}"
        self.env = dict(pair.split("=", 1) for pair in after.read_text().split("\0") if "=" in pair)
        return done.stdout

    def _filled(self, text: str) -> str:
        for word, meant in self._placeholders.items():
            text = text.replace(word, meant)
        return text

    def _check(self, shown: str) -> None:
        """What a page shows as output is there, line by line; ``…`` stands for anything."""
        for line in shown.splitlines():
            pattern = ".*".join(re.escape(piece) for piece in line.split("…"))
            assert re.search(pattern, self._said), f"{line!r} is not in:\n{self._said[-3000:]}"
