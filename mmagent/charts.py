"""Charts as inline SVG: crisp at any size, no script, no request; colours come from the page's CSS variables.

Each function returns one ``<svg>`` with a text alternative; marks carry a ``<title>``, which browsers show as a tip.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmagent.markup import Child, Markup, join, tag

WIDTH = 500  # user units; the page scales the picture
SPACE = "\u00a0"  # between a number and its unit: no line breaks there
_POINTS = 240  # of one line: more cannot be told apart


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style` 1 to 4 picks its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 1
    marks: bool = False


@dataclass(frozen=True)
class Mark:
    """One value with its interval, in a row of `dots`."""

    series: str
    value: float
    low: float | None = None
    high: float | None = None
    style: int = 1


@dataclass(frozen=True)
class Frame:
    """Where data coordinates lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = WIDTH
    height: int = 290
    left: int = 64
    right: int = 26
    top: int = 14
    bottom: int = 46

    def px(self, value: float) -> float:
        return self._scale(value, self.x, self.left, self.width - self.right)

    def py(self, value: float) -> float:
        return self._scale(value, self.y, self.height - self.bottom, self.top)

    @staticmethod
    def _scale(value: float, data: tuple[float, float], start: float, end: float) -> float:
        span = data[1] - data[0] or 1.0
        return round(start + (value - data[0]) / span * (end - start), 2)


def percent(value: float) -> str:
    """``0.9731`` as ``97.3 %``; what is not quite all is never rounded up to it."""
    rounded = f"{100 * value:.1f}"
    if rounded == "100.0" and value < 1:
        rounded = "99.9"
    return f"{'100' if rounded == '100.0' else rounded}{SPACE}%"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    shares: bool = False,
    x_shares: bool = False,
    floor: float | None = None,
) -> Markup:
    """Lines over a common axis; `shares` and `x_shares` write the axes in percent, `floor` is where y starts."""
    drawn = [item for item in series if item.points]
    xs = [x for item in drawn for x, _ in item.points]
    ys = [y for item in drawn for _, y in item.points]
    low = min(ys) if floor is None else floor
    high = 1.0 if shares else max(ys)
    y_ticks = ticks(low, high)
    top = 1.0 if shares else max(high, y_ticks[-1])
    frame = Frame((min(xs), max(xs)), (min(low, y_ticks[0]), top))
    write, write_x = (percent_tick if flag else number for flag in (shares, x_shares))
    body = [grid(frame, ticks(*frame.x), y_ticks, write_x, write, x_label, y_label)]
    for item in drawn:
        thin = _thin(item.points)
        path = "M" + "L".join(f"{frame.px(x)} {frame.py(y)}" for x, y in thin)
        body.append(tag("path", d=path, class_=f"line s{item.style}"))
        if item.marks or len(thin) == 1:
            body += [
                tag(
                    "circle",
                    tag("title", f"{item.name}: {write(y)} at {write_x(x)}"),
                    cx=frame.px(x), cy=frame.py(y), r=3, class_=f"mark s{item.style}",
                )
                for x, y in thin
            ]  # fmt: skip
    return svg(frame.width, frame.height, title, *body)


def reliability(bins: Sequence[Mapping[str, Any]], title: str) -> Markup:
    """Accuracy against confidence, a bar for each bin that holds rows; the diagonal is a model that knows itself.
    Below it, how many answers fall into each bin."""
    frame = Frame((0, 1), (0, 1), height=330)
    low = Frame((0, 1), (0, max(item["n"] for item in bins)), height=84, bottom=6, top=4)
    body = [grid(frame, _FIFTHS, _FIFTHS, percent_tick, percent_tick, "confidence", "accuracy")]
    histogram = []
    for item in bins:
        if not item["n"]:
            continue
        left, right = frame.px(item["low"]) + 1, frame.px(item["high"]) - 1
        told = (
            f"{item['n']} answers with confidence {percent(item['low'])} to {percent(item['high'])}: mean confidence "
            f"{percent(item['confidence'])}, accuracy {percent(item['accuracy'])}"
        )
        y = frame.py(item["accuracy"])
        body.append(_bar(left, y, right - left, frame.py(0) - y, "bar s1", told))
        gap = sorted((y, frame.py(item["confidence"])))
        body.append(_bar(left, gap[0], right - left, gap[1] - gap[0], "gap", told))
        y = low.py(item["n"])
        histogram.append(_bar(left, y, right - left, max(1.0, low.py(0) - y), "bar muted", told))
    body.append(tag("path", d=f"M{frame.px(0)} {frame.py(0)}L{frame.px(1)} {frame.py(1)}", class_="diagonal"))
    below = tag("g", *histogram, _text(low.left - 8, low.top + 10, "answers", "end"), transform="translate(0 334)")
    return svg(frame.width, frame.height + low.height + 6, title, *body, below)


def confusion(labels: Sequence[str], cells: Sequence[Mapping[str, Any]], title: str) -> Markup:
    """Rows are the truth, columns the answer; a cell is as dark as its share of its row."""
    size, left, top = 38, 110, 92
    place = {label: index for index, label in enumerate(labels)}
    totals: dict[str, int] = {}
    for cell in cells:
        totals[cell["truth"]] = totals.get(cell["truth"], 0) + cell["count"]
    body: list[Child] = []
    for index, label in enumerate(labels):
        at = index * size + size / 2
        body.append(_text(left - 8, top + at + 4, _short(label), "end"))
        x, y = left + at + 4, top - 8
        body.append(_text(x, y, _short(label), "start", transform=f"rotate(-45 {x} {y})"))
    box = {"width": size - 2, "height": size - 2, "rx": 4}
    for row, column in itertools.product(range(len(labels)), repeat=2):
        body.append(tag("rect", x=left + column * size, y=top + row * size, class_="cell", **box))
    for cell in cells:
        share = cell["count"] / totals[cell["truth"]]
        x, y = left + place[cell["predicted"]] * size, top + place[cell["truth"]] * size
        right = cell["truth"] == cell["predicted"]
        told = f"{cell['truth']} answered as {cell['predicted']}: {cell['count']} ({percent(share)} of {cell['truth']})"
        shade = f"{0.15 + 0.85 * share:.2f}"
        kind = "right" if right else "wrong"
        mark = tag("rect", x=x, y=y, class_=f"cell {kind}", fill_opacity=shade, **box)
        ink = "count on-dark" if share > 0.5 else "count"
        words = _text(x + size / 2 - 1, y + size / 2 + 3, _count(cell["count"]), "middle", class_=ink)
        body.append(tag("g", tag("title", told), mark, words))
    width, height = left + len(labels) * size + 50, top + len(labels) * size + 8
    return svg(width, height, title, *body)


def dots(rows: Sequence[tuple[str, Sequence[Mark]]], *, title: str, x_label: str) -> Markup:
    """Shares with their intervals, a line for each row: before and after on one scale, which ends at 100 %."""
    least = min(mark.value if mark.low is None else mark.low for _, marks in rows for mark in marks)
    start = max(0.0, math.floor((least - 0.02) * 10) / 10)
    step, left = 38, 200
    height = len(rows) * step + 58
    frame = Frame((start, 1), (0, 1), width=1000, height=height, left=left, right=28, bottom=46, top=12)
    body: list[Child] = [grid(frame, ticks(start, 1), [], percent_tick, percent_tick, x_label, "")]
    for index, (name, marks) in enumerate(rows):
        y = frame.top + index * step + step / 2
        body.append(tag("path", d=f"M{frame.left} {y}H{frame.width - frame.right}", class_="rule"))
        body.append(_text(frame.left - 12, y + 4, _short(name, 24), "end", class_="row"))
        body += [_dot(frame, mark, y, name) for mark in marks]
    return svg(frame.width, frame.height, title, *body, class_="chart wide")


def bars(rows: Sequence[tuple[str, float]], *, title: str, x_label: str) -> Markup:
    """Shares of one whole, a bar for each row."""
    step, left = 26, 130
    end = max(0.1, math.ceil(max(share for _, share in rows) * 10) / 10)
    frame = Frame((0, end), (0, 1), height=len(rows) * step + 58, left=left, right=64, bottom=46, top=12)
    body: list[Child] = [grid(frame, ticks(0, end), [], percent_tick, percent_tick, x_label, "")]
    for index, (name, share) in enumerate(rows):
        y = frame.top + index * step
        body.append(_text(frame.left - 10, y + step / 2 + 4, name, "end", class_="row"))
        width = frame.px(share) - frame.left
        body.append(_bar(frame.left, y + 4, max(1.0, width), step - 8, "bar s1", f"{name}: {percent(share)}"))
        body.append(_text(frame.left + width + 6, y + step / 2 + 4, percent(share), "start"))
    return svg(frame.width, frame.height, title, *body)


def svg(width: float, height: float, title: str, *children: Child, class_: str = "chart") -> Markup:
    return tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title, class_=class_)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def percent_tick(value: float) -> str:
    return f"{100 * value:.3g}{SPACE}%"


_FIFTHS = [0, 0.2, 0.4, 0.6, 0.8, 1.0]


def _dot(frame: Frame, mark: Mark, y: float, row: str) -> Markup:
    x = frame.px(mark.value)
    told = f"{row}, {mark.series}: {percent(mark.value)}"
    parts: list[Child] = []
    if mark.low is not None and mark.high is not None:
        told += f" ({percent(mark.low)} to {percent(mark.high)})"
        parts.append(tag("path", d=f"M{frame.px(mark.low)} {y}H{frame.px(mark.high)}", class_=f"whisker s{mark.style}"))
    if mark.style == 1:
        parts.append(tag("circle", cx=x, cy=y, r=6, class_="mark s1"))
    else:  # hollow, of another shape: told apart without colour too
        shape = f"M{x} {y - 6}l6 6l-6 6l-6 -6z" if mark.style == 2 else f"M{x - 5} {y - 5}h10v10h-10z"
        parts.append(tag("path", d=shape, class_=f"hollow s{mark.style}"))
    return tag("g", tag("title", told), *parts)


def grid(
    frame: Frame,
    xs: Sequence[float],
    ys: Sequence[float],
    write_x: Callable[[float], str],
    write_y: Callable[[float], str],
    x_label: str,
    y_label: str,
) -> Markup:
    """The rules, numbers and names of both axes."""
    foot = frame.height - frame.bottom
    middle = (frame.top + foot) / 2
    out: list[Child] = []
    for value in ys:
        out.append(tag("path", d=f"M{frame.left} {frame.py(value)}H{frame.width - frame.right}", class_="rule"))
        out.append(_text(frame.left - 8, frame.py(value) + 4, write_y(value), "end"))
    for value in xs:
        out.append(tag("path", d=f"M{frame.px(value)} {frame.top}V{foot}", class_="rule"))
        out.append(_text(frame.px(value), foot + 18, write_x(value), "middle"))
    out.append(_text((frame.left + frame.width - frame.right) / 2, frame.height - 6, x_label, "middle", class_="label"))
    if y_label:
        out.append(_text(12, middle, y_label, "middle", class_="label", transform=f"rotate(-90 12 {middle})"))
    return join(out)


def _bar(x: float, y: float, width: float, height: float, class_: str, told: str) -> Markup:
    return tag(
        "rect", tag("title", told), x=round(x, 2), y=round(y, 2), width=round(width, 2), height=round(height, 2),
        class_=class_,
    )  # fmt: skip


def _text(x: float, y: float, words: str, anchor: str, *, class_: str = "tick", transform: str | None = None) -> Markup:
    return tag(
        "text", words, x=round(x, 2), y=round(y, 2), text_anchor=anchor, class_=class_, transform=transform
    )  # fmt: skip


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours where there are more points than can be seen."""
    stride = math.ceil(len(points) / _POINTS)
    parts = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _short(words: str, limit: int = 14) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"


def _count(value: int) -> str:
    return str(value) if value < 10_000 else f"{value / 1000:.0f}k"
