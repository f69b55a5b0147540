"""Passages of documents: Markdown, text, HTML, PDF, pictures with captions, and past conversations.

A passage is a few paragraphs of one section, with the section's heading as its title: what a search finds, and an
answer quotes. A conversation's passage is its question; what is said is the answer that was given.

    NAME.md NAME.txt NAME.html NAME.pdf     documents
    NAME.png|jpg|webp|gif + NAME.txt        a picture and its caption
    NAME.jsonl                              {"question", "answer"}, or {"messages": [...]}, a conversation a line
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
KINDS = (".md", ".markdown", ".txt", ".rst", ".html", ".htm", ".pdf", ".jsonl", *IMAGES)
_WORDS = 160  # of a passage
_OVERLAP = 30  # words that the next one repeats, where a section is longer than one


class DocumentError(ValueError):
    """A file of which no passage can be made; says why."""


@dataclass(frozen=True, slots=True)
class Passage:
    text: str  # what is searched
    source: str  # the file, relative to its folder; with a page or line behind '#'
    title: str = ""
    answer: str = ""  # of a conversation
    image: str = ""  # the picture, where the text is its caption

    @property
    def id(self) -> str:
        key = "\x00".join((self.text, self.source, self.title, self.answer, self.image))
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def files(folder: Path) -> list[Path]:
    """Those that can be read, in order; captions of pictures are no documents of their own."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix.lower() in KINDS]
    captioned = {file.with_suffix(".txt") for file in found if file.suffix.lower() in IMAGES}
    hidden = [file for file in found if any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return [file for file in found if file not in captioned and file not in hidden]


def read(file: Path, folder: Path) -> list[Passage]:
    """
    Raises:
        DocumentError: see the class.
    """
    source, kind = str(file.relative_to(folder)), file.suffix.lower()
    try:
        if kind in IMAGES:
            return _picture(file, source)
        if kind == ".pdf":
            return _pdf(file, source)
        words = file.read_text(errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{source}: cannot be read as text ({error})") from error
    if kind == ".jsonl":
        return list(_conversations(words, source))
    if kind in (".html", ".htm"):
        sections = _html(words)
    else:
        sections = _sections(words, file.stem)
    return [passage for title, body in sections for passage in _cut(body, source, title)]


def _picture(file: Path, source: str) -> list[Passage]:
    caption = file.with_suffix(".txt")
    if not caption.is_file():
        raise DocumentError(f"{source}: a picture without a caption; {caption.name} beside it would be one")
    words = " ".join(caption.read_text().split())
    return [Passage(words, source, file.stem, image=source)] if words else []


def _pdf(file: Path, source: str) -> list[Passage]:
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        reader = pypdf.PdfReader(file)
        title = str((reader.metadata.title if reader.metadata else None) or file.stem)
        pages = [(number, page.extract_text()) for number, page in enumerate(reader.pages, 1)]
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DocumentError(f"{source}: cannot be read as PDF ({error})") from error
    found = [passage for number, words in pages for passage in _cut(words, f"{source}#page={number}", title)]
    if not found:
        raise DocumentError(f"{source}: there is no text in this PDF; a scan wants OCR first")
    return found


def _conversations(words: str, source: str) -> Iterator[Passage]:
    for number, line in enumerate(words.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "messages" in row:
                said = [
                    m for m in row["messages"] if m["role"] in ("user", "assistant") and isinstance(m["content"], str)
                ]
                pairs = [(a, b) for a, b in itertools.pairwise(said) if (a["role"], b["role"]) == ("user", "assistant")]
                question, answer = pairs[-1][0]["content"], pairs[-1][1]["content"]
            else:
                question, answer = str(row["question"]), str(row["answer"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DocumentError(
                f'{source}, line {number}: {{"question", "answer"}} is wanted, or messages of a user and an assistant'
            ) from error
        yield Passage(" ".join(question.split()), f"{source}#line={number}", answer=answer.strip())


def _sections(words: str, title: str) -> list[tuple[str, str]]:
    """Heading and body of each section of Markdown; of plain text the whole."""
    sections: list[tuple[str, list[str]]] = [(title, [])]
    path: list[str] = []
    fenced = False
    for line in words.splitlines():
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        heading = None if fenced else re.match(r"(#{1,6})\s+(.*?)\s*#*$", line)
        if heading:
            path = [*path[: len(heading[1]) - 1], heading[2]]
            sections.append((" > ".join(filter(None, path)), []))
        else:
            sections[-1][1].append(line)
    return [(name, "\n".join(body)) for name, body in sections]


class _Text(HTMLParser):
    """The words of a page by its headings, without scripts, styles and navigation."""

    _SILENT = ("script", "style", "nav", "template", "noscript", "svg")
    _BREAKS = ("p", "div", "li", "tr", "br", "section", "article", "table", "ul", "ol", "pre", "blockquote")

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[str]]] = [("", [])]
        self._silent = 0
        self._heading: list[str] | None = None
        self._titled = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._SILENT:
            self._silent += 1
        elif re.fullmatch(r"h[1-6]|title", tag):
            self._heading = []
        elif tag in self._BREAKS:
            self.sections[-1][1].append("\n\n" if tag != "br" else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._SILENT:
            self._silent = max(0, self._silent - 1)
        elif re.fullmatch(r"h[1-6]|title", tag) and self._heading is not None:
            name = " ".join("".join(self._heading).split())
            self.sections.append((name, []))
            self._heading = None

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        (self._heading if self._heading is not None else self.sections[-1][1]).append(data)


def _html(words: str) -> list[tuple[str, str]]:
    parser = _Text()
    parser.feed(words)
    parser.close()
    return [(title, "".join(body)) for title, body in parser.sections]


def _cut(words: str, source: str, title: str) -> list[Passage]:
    """Paragraphs put together up to so many words; a longer one in overlapping pieces."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", words)]
    out: list[list[str]] = [[]]
    for paragraph in filter(None, paragraphs):
        pieces = paragraph.split(" ")
        if out[-1] and len(out[-1]) + len(pieces) > _WORDS:
            out.append([])
        while len(out[-1]) + len(pieces) > _WORDS:
            out[-1] += pieces[:_WORDS]
            pieces = pieces[_WORDS - _OVERLAP :]
            out.append([])
        out[-1] += pieces
    return [Passage(" ".join(part), source, title) for part in out if part]


def searched(passages: Sequence[Passage]) -> list[str]:
    """What of passages is made a vector: the title says what a text is about."""
    return [f"{each.title}. {each.text}" if each.title and not each.answer else each.text for each in passages]
