"""What a client wrote, and where it stands in the record: placeholders are escaped there, and media leave marks.

Clients count the characters of their own words, a record those of its messages as stored; `Wording` translates.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmagent.record import Message, escape, escapes, segments


@dataclass
class Wording:
    """One message while it is made of its parts, in their order."""

    content: str = ""  # as a record stores it
    words: str = ""  # the client's texts, with a space between them
    _places: list[int] = field(default_factory=list)  # of each character of `words`, in `content`
    _marked: bool = False  # the last part was a picture or sound

    def add_words(self, text: str) -> None:
        """A text; words in it that look like a placeholder stay words."""
        if not text:
            return
        self._space()
        self._marked = False
        if self.words:
            self.words += " "
            self._places.append(len(self.content) - 1)
        added, start, more = dict(escapes(text)), len(self.content), 0
        for index in range(len(text)):
            self._places.append(start + index + more)  # what comes at a place belongs to what begins there
            more += added.get(index, 0)
        self.content += escape(text)
        self.words += text

    def add_mark(self, kind: str) -> None:
        """A picture or a sound: ``image`` or ``audio``. Several stand side by side, as in rows."""
        if not self._marked:
            self._space()
        self.content += f"<{kind}>"
        self._marked = True

    def stored(self, place: int) -> int:
        """Where a place in the client's words (0 to their number) stands in the message."""
        if place < len(self._places):
            return self._places[place]
        return self._places[-1] + 1 if self._places else 0

    def written(self, place: int) -> int:
        """The other way round; a place in a mark is that of the next word."""
        return bisect_left(self._places, place)

    def _space(self) -> None:
        """Between parts: a backslash at the end of a text must not escape the placeholder after it."""
        if self.content:
            self.content += " "


def of(message: Message) -> Wording:
    """The wording of a message that was made in this way."""
    wording = Wording()
    for what, words in parts(message):
        if what == "text":
            wording.add_words(words)
        else:
            wording.add_mark(what)
    return wording


def parts(message: Message) -> Iterator[tuple[str, str]]:
    """A message's parts without the space that stands between them when a request is made a record."""
    found = list(segments(message.content))
    for place, (what, words) in enumerate(found):
        if what == "text":
            words = words.removeprefix(" ") if place else words
            words = words.removesuffix(" ") if place + 1 < len(found) else words
            if not words:
                continue
        yield what, words
