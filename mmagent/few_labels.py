"""Learning curves: how good a model is by how many labels it learned from, mean and deviation over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import wording
from mmagent.charts import Frame, grid, number, percent_tick, svg, ticks
from mmagent.markup import Child, Markup, join, tag
from mmagent.panels import count, figure, panel, table

_MOST_TICKS = 8  # numbers written below the chart


def curve(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By task its metric, and for each number of labels the values of all seeds, their mean and their deviation (of a
    sample, n - 1 in the denominator; None of one seed).

    Args:
        points: ``{"labels_per_class", "seed", "rows", "tasks": {TASK: {"metric", "value"}}}`` of each run.
    """
    out: dict[str, dict[str, Any]] = {}
    for task, found in points[0]["tasks"].items() if points else ():
        steps = []
        for labels in sorted({point["labels_per_class"] for point in points}):
            runs = [point for point in points if point["labels_per_class"] == labels]
            values = [run["tasks"][task]["value"] for run in sorted(runs, key=lambda run: run["seed"])]
            steps.append(
                {
                    "labels_per_class": labels,
                    "rows": round(statistics.mean(run["rows"] for run in runs)),
                    "mean": statistics.mean(values),
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                    "values": values,
                }
            )
        out[task] = {"metric": found["metric"], "points": steps}
    return out


def told(metric: str, point: Mapping[str, Any]) -> str:
    """``82.1 ± 3.4 %``."""
    if point["deviation"] is None:
        return wording.written(metric, point["mean"])
    if wording.is_share(metric):
        return f"{100 * point['mean']:.1f} ± {100 * point['deviation']:.1f} %"
    return f"{number(point['mean'])} ± {number(point['deviation'])}"


def text(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """The curves as a table for a terminal."""
    lines = []
    for task, found in curves.items():
        head = ("labels per class", "rows", "seeds", f"{wording.name(found['metric'])} of {task}")
        body = [
            (str(each["labels_per_class"]), f"{each['rows']:,}", str(len(each["values"])), told(found["metric"], each))
            for each in found["points"]
        ]  # fmt: skip
        widths = [max(len(row[column]) for row in (head, *body)) for column in range(len(head))]
        lines += [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *body)
        ]
    return "\n".join(lines)


def section(curves: Mapping[str, Mapping[str, Any]], split: str) -> Markup:
    """The curves as a part of a report, a chart and a table for each task.

    Args:
        split: what was asked.
    """
    parts: list[Child] = []
    for task, found in curves.items():
        metric = found["metric"]
        name = wording.heading(wording.name(metric))
        what = f"{name} on {split} by labels of each class: the mean over seeds, and the deviation as a bar."
        rows: list[tuple[str, list[Child]]] = []
        for point in found["points"]:
            each = ", ".join(wording.written(metric, value) for value in point["values"])
            rows.append((str(point["labels_per_class"]), [count(point["rows"]), told(metric, point), each]))
        head = ["labels of each class", "training rows", f"{wording.name(metric)}, mean ± deviation", "each seed"]
        chart = panel(figure(task if len(curves) > 1 else None, _chart(metric, found["points"], name), what))
        parts.append(tag("div", chart, panel(table(head, rows, "Every number of labels.")), class_="pair"))
    return join(parts)


def _chart(metric: str, points: Sequence[Mapping[str, Any]], name: str) -> Markup:
    """Means joined by a line, with a whisker of one deviation up and down; numbers of labels on a scale of factors."""
    shares = wording.is_share(metric)
    spread = [(point["mean"], point["deviation"] or 0.0) for point in points]
    low, high = min(mean - by for mean, by in spread), max(mean + by for mean, by in spread)
    if shares:
        low, high = max(min(low, 1.0) - 0.02, min(0.0, low)), 1.0
    xs = [math.log(point["labels_per_class"]) for point in points]
    edge = 0.04 * (xs[-1] - xs[0]) or 0.5
    frame = Frame((xs[0] - edge, xs[-1] + edge), (low, high if high > low else low + 1.0))
    shown = xs[:: -(-len(xs) // _MOST_TICKS)]
    write = percent_tick if shares else number
    body: list[Child] = [
        grid(frame, shown, ticks(*frame.y), lambda x: f"{math.exp(x):.0f}", write, "labels of each class", name)
    ]
    line = "M" + "L".join(f"{frame.px(x)} {frame.py(mean)}" for x, (mean, _) in zip(xs, spread, strict=True))
    body.append(tag("path", d=line, class_="line s1"))
    for x, (mean, by), point in zip(xs, spread, points, strict=True):
        top = min(mean + by, high)
        whisker = tag("path", d=f"M{frame.px(x)} {frame.py(mean - by)}V{frame.py(top)}", class_="whisker s1")
        mark = tag("circle", cx=frame.px(x), cy=frame.py(mean), r=4, class_="mark s1")
        note = tag("title", f"{point['labels_per_class']} labels of each class: {told(metric, point)}")
        body.append(tag("g", note, whisker if by else None, mark))
    return svg(frame.width, frame.height, f"{name} by number of labels", *body)
