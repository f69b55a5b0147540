"""How a run learned, drawn from the lines of its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import charts, wording
from mmagent.charts import Series, percent
from mmagent.markup import Markup, tag
from mmagent.panels import figure, panel
from mmagent.wording import heading

_LINES = 4  # of one chart


def section(curves: Sequence[Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    """Loss, and the main metric of each task (`mmagent.evaluation.blocks`), by optimizer step; None without a line."""

    def points(kind: str, name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in curves if row.get("kind") == kind and row.get(name) is not None]

    def both(name: str) -> list[Series]:
        training = Series("training", points("train", name), 2)
        return [training, Series("validation", points("validation", name), 1, True)]

    charted = [("loss", both("loss"))]
    if len(tasks) == 1:
        main = next(iter(tasks.values()))["main"]
        charted.append((main, both(main)))
    else:  # the validation of each task
        lines = [
            Series(task, points("validation", f"{task}/{block['main']}"), style, True)
            for style, (task, block) in enumerate([*tasks.items()][:_LINES], 1)
        ]
        charted.append(("validation", lines))
    figures = [_learnt(name, drawn) for name, series in charted if (drawn := [item for item in series if item.points])]
    return tag("div", figures, class_="pair") if figures else None


def _learnt(name: str, drawn: Sequence[Series]) -> Markup:
    shares = name != "loss" and wording.is_share(name)
    values = [y for item in drawn for _, y in item.points]
    title, what = heading(wording.name(name)), wording.name(name)
    chart = charts.lines(
        drawn, title=f"{title} by optimizer step", x_label="optimizer step", y_label=what, shares=shares,
        floor=min(0.0, *values),
    )  # fmt: skip
    ends = (percent(item.points[-1][1]) if shares else charts.number(item.points[-1][1]) for item in drawn)
    last = "; ".join(f"{item.name} at the end {end}" for item, end in zip(drawn, ends, strict=True))
    names = tag("ul", [tag("li", item.name, class_=f"s{item.style}") for item in drawn], class_="key lines")
    return panel(figure(title, chart, f"{last}.", names))
