"""Parts that a page is laid out of: tiles, figures with captions, tables that scroll."""

from __future__ import annotations

from collections.abc import Sequence

from mmagent.markup import Child, Markup, tag

_TALL_ROWS = 15  # a longer table scrolls in its own window


def tile(name: str, value: str, note: str, *, main: bool = False) -> Markup:
    shown = (tag("dt", name), tag("dd", value, class_="big"), tag("dd", note, class_="note"))
    return tag("div", *shown, class_="tile main" if main else "tile")


def panel(*children: Child) -> Markup:
    return tag("div", *children, class_="panel")


def figure(name: str | None, chart: Markup, caption: str, key: Markup | None = None) -> Markup:
    return tag("figure", tag("h3", name) if name else None, key, chart, tag("figcaption", caption))


def key(names: Sequence[str], kind: str) -> Markup:
    return tag("ul", [tag("li", name, class_=f"s{index}") for index, name in enumerate(names, 1)], class_=f"key {kind}")


def table(head: Sequence[str], body: Sequence[tuple[str, Sequence[Child]]], caption: str) -> Markup:
    """`body`: the name of each row, and its cells."""
    top = tag("thead", tag("tr", [tag("th", name, scope="col") for name in head]))
    rows = [tag("tr", tag("th", name, scope="row"), [tag("td", cell) for cell in cells]) for name, cells in body]
    tall = len(body) > _TALL_ROWS
    shown = tag("table", top, tag("tbody", rows), aria_label=caption)
    # The region can be scrolled by keyboard where it is too small for the table.
    region = tag(
        "div", shown, class_="scroll tall" if tall else "scroll", tabindex="0", role="region", aria_label=caption
    )
    return tag("figure", tag("figcaption", caption, class_="above"), region)


def count(value: int) -> str:
    return f"{value:,}"
