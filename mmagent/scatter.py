"""A chart of given against right numbers."""

from __future__ import annotations

from collections.abc import Sequence

from mmagent.charts import Frame, grid, number, svg, ticks
from mmagent.markup import Markup, tag


def scatter(points: Sequence[tuple[float, float]], *, title: str, x_label: str, y_label: str) -> Markup:
    """A mark for each (right, given) on one scale for both; on the dashed line the two are equal."""
    values = [value for point in points for value in point]
    low, high = min(values), max(values)
    margin = 0.03 * (high - low) or 1.0
    both = low - margin, high + margin
    frame = Frame(both, both, height=420)
    at = ticks(low, high)
    diagonal = f"M{frame.px(both[0])} {frame.py(both[0])}L{frame.px(both[1])} {frame.py(both[1])}"
    marks = [
        tag(
            "circle",
            tag("title", f"right {number(x)}, answered {number(y)}"),
            cx=frame.px(x), cy=frame.py(y), r=3.5, class_="mark s1 faint",
        )
        for x, y in points
    ]  # fmt: skip
    body = [grid(frame, at, at, number, number, x_label, y_label), tag("path", d=diagonal, class_="diagonal"), *marks]
    return svg(frame.width, frame.height, title, *body)
