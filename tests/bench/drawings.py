"""True and false statements about small drawings, in the manner of NLVR (Suhr et al., ACL 2017): three boxes side by
side with a few coloured triangles, squares and circles, scattered or stacked; no drawing of the test is in training.

A statement is true of about half of the drawings it is made for: guessing from its words gains little.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

Row = dict[str, Any]
BOX = 100  # pixels of a side
GAP = 50  # between boxes
COLOURS = {"yellow": (255, 214, 10), "blue": (0, 102, 204), "black": (17, 17, 17)}
SHAPES = ("triangle", "square", "circle")
_SIZES = (10, 20, 30)
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


class Item(NamedTuple):
    """One thing in a box; x and y are of its upper left corner, in the box."""

    shape: str
    colour: str
    size: int
    x: int
    y: int

    @property
    def at_wall(self) -> bool:
        return min(self.x, self.y) == 0 or max(self.x, self.y) + self.size == BOX


Drawing = list[list[Item]]  # the items of each box
Kind = Callable[[Item], bool]
Claim = tuple[str, Callable[[Drawing], bool]]  # words, and whether they are true of a drawing
_TRIES = 100


def rows(count: int, *, seed: int = 0) -> Iterator[Row]:
    """`count` statements of training, a tenth as many of validation and a sixth of test, of a sixth as many drawings.

    ``picture`` is an encoded PNG of 400 x 100 pixels.
    """
    rng = random.Random(seed)
    for split, share in (("train", 1.0), ("validation", 0.1), ("test", 1 / 6)):
        made = [
            _towers(rng) if rng.random() < 0.4 else _scattered(rng) for _ in range(max(12, round(count * share / 6)))
        ]
        pictures = [draw(drawing) for drawing in made]
        for _ in range(round(count * share)):
            words, index, true = _statement(rng, made)
            yield {"text": words, "picture": pictures[index], "label": "true" if true else "false", "split": split}


def draw(drawing: Drawing) -> bytes:
    image = Image.new("RGB", (3 * BOX + 2 * GAP, BOX), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for index, box in enumerate(drawing):
        left = index * (BOX + GAP)
        pen.rectangle((left, 0, left + BOX - 1, BOX - 1), fill=(211, 211, 211))
        for item in box:
            x, y, edge = left + item.x, item.y, item.size - 1
            if item.shape == "triangle":
                corners = [(x, y + edge), (x + edge, y + edge), (x + edge // 2, y)]
                pen.polygon(corners, fill=COLOURS[item.colour])
            else:
                outline = pen.rectangle if item.shape == "square" else pen.ellipse
                outline((x, y, x + edge, y + edge), fill=COLOURS[item.colour])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _scattered(rng: random.Random) -> Drawing:
    """One to eight items in each box, apart from each other; a quarter of them touch a wall."""
    boxes = []
    for _ in range(3):
        box: list[Item] = []
        for _ in range(60):
            if len(box) == 8 or (box and rng.random() < 0.03):
                break
            size = rng.choice(_SIZES)
            place = [rng.randint(1, BOX - size - 1), rng.randint(1, BOX - size - 1)]
            if rng.random() < 0.25:
                place[rng.randrange(2)] = rng.choice((0, BOX - size))
            item = Item(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), size, *place)
            if all(_apart(item, other) for other in box):
                box.append(item)
        boxes.append(box[: rng.randint(1, 8)])
    return boxes


def _towers(rng: random.Random) -> Drawing:
    """One to four squares in each box, one on the other, from the floor up."""
    colours = tuple(COLOURS)
    return [
        [Item("square", rng.choice(colours), 20, 40, BOX - 20 * level) for level in range(1, rng.randint(1, 4) + 1)]
        for _ in range(3)
    ]


def _apart(one: Item, other: Item) -> bool:
    return (
        one.x + one.size < other.x or other.x + other.size < one.x
        or one.y + one.size < other.y or other.y + other.size < one.y
    )  # fmt: skip


def _statement(rng: random.Random, drawings: list[Drawing]) -> tuple[str, int, bool]:
    """A statement, the drawing it is about, and whether it is true of it: as often as not, whatever it says."""
    wanted = rng.random() < 0.5
    while True:
        words, holds = rng.choice(_FORMS)(rng)
        for index in rng.sample(range(len(drawings)), min(_TRIES, len(drawings))):
            if _fits(words, drawings[index]) and holds(drawings[index]) == wanted:
                return words, index, wanted


def _fits(words: str, drawing: Drawing) -> bool:
    """Towers are spoken of where there are some, and walls where items lie about."""
    stacked = all(item.size == 20 and item.x == 40 for box in drawing for item in box)
    return stacked if "tower" in words else not (stacked and "wall" in words)


def _phrase(rng: random.Random) -> tuple[str, Kind]:
    """A kind of items, such as ``yellow triangle``, ``black item`` or ``circle``, and what is of it."""
    colour = rng.choice((*COLOURS, ""))
    shape = rng.choice((*SHAPES, "item") if colour else SHAPES)
    return f"{colour} {shape}".strip(), lambda i: colour in (i.colour, "") and shape in (i.shape, "item")


def _count(rng: random.Random, most: int) -> tuple[str, Callable[[int], bool]]:
    number = rng.randint(1, most)
    how = rng.choice(("exactly", "at least", "at most", ""))
    test = {"exactly": int.__eq__, "at least": int.__ge__, "at most": int.__le__, "": int.__ge__}[how]
    return f"{how} {_NUMBERS[number]}".strip(), lambda n: bool(test(n, number))


def _plural(words: str, count: str) -> str:
    return words if count.endswith("one") else words + "s"


def _verb(count: str) -> str:
    return "is" if count.endswith("one") else "are"


def _of(box: list[Item], kind: Kind) -> int:
    return sum(map(kind, box))


def _sum(drawing: Drawing, kind: Kind) -> int:
    return sum(_of(box, kind) for box in drawing)


def _box_with(rng: random.Random) -> Claim:
    (words, kind), (count, holds) = _phrase(rng), _count(rng, 3)
    return f"there is a box with {count} {_plural(words, count)}", lambda d: any(holds(_of(box, kind)) for box in d)


def _in_all(rng: random.Random) -> Claim:
    (words, kind), (count, holds) = _phrase(rng), _count(rng, 5)
    return f"there {_verb(count)} {count} {_plural(words, count)} in total", lambda d: holds(_sum(d, kind))


def _touching(rng: random.Random) -> Claim:
    (words, kind), (count, holds) = _phrase(rng), _count(rng, 3)
    said = f"there {_verb(count)} {count} {_plural(words, count)} touching the wall"
    return said, lambda d: holds(_sum(d, lambda item: kind(item) and item.at_wall))


def _none(rng: random.Random) -> Claim:
    words, kind = _phrase(rng)
    return f"there is a box with no {words}", lambda d: any(not _of(box, kind) for box in d)


def _every_box(rng: random.Random) -> Claim:
    words, kind = _phrase(rng)
    return f"each box has a {words}", lambda d: all(_of(box, kind) for box in d)


def _together(rng: random.Random) -> Claim:
    (one, first), (two, second) = _phrase(rng), _phrase(rng)
    return f"there is a box with a {one} and a {two}", lambda d: any(
        any(first(a) and second(b) and a is not b for a in box for b in box) for box in d
    )


def _one_colour(rng: random.Random) -> Claim:
    colour = rng.choice(tuple(COLOURS))
    said = f"there is a box where all items are {colour}"
    return said, lambda d: any(all(item.colour == colour for item in box) for box in d)


def _shapes_alike(rng: random.Random) -> Claim:
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    said = f"all {shape}s are {colour}"
    return said, lambda d: all(item.colour == colour for box in d for item in box if item.shape == shape)


def _tower(rng: random.Random) -> Claim:
    number = rng.randint(1, 4)
    said = f"there is a tower of {_NUMBERS[number]} {_plural('block', _NUMBERS[number])}"
    return said, lambda d: any(len(box) == number for box in d)


def _end(rng: random.Random) -> Claim:
    colour, (place, end) = rng.choice(tuple(COLOURS)), rng.choice((("base", 0), ("top", -1)))
    return f"there is a tower with a {colour} {place}", lambda d: any(box[end].colour == colour for box in d)


_FORMS = (
    _box_with, _in_all, _touching, _none, _every_box, _together, _one_colour, _shapes_alike, _tower, _end
)  # fmt: skip
