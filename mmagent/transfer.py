"""What a bundle reaches on its own data set and on another, side by side, as a part of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmagent import charts, wording
from mmagent.charts import Mark
from mmagent.evaluation import blocks
from mmagent.markup import Child, Markup, join, tag
from mmagent.panels import count, figure, key, panel, table
from mmagent.wording import heading, interval, value


def sections(evaluation: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """The section (anchor, title, body), where the bundle was asked another data set than its own."""
    own = evaluation.get("own")
    if not own:
        return []
    both = {task: block for task, block in blocks(evaluation).items() if task in own["tasks"]}
    if not both:
        return []
    there, here = f"{own['data']} ({own['split']})", f"{evaluation['data']} ({evaluation['split']})"
    return [
        (
            "transfer",
            "Its own domain and this one",
            join(_chart(both, own, (here, there)), _table(both, own, (here, there))),
        )
    ]


def rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Task, metric, and its value at home and on the other data set, each with its interval, to be printed."""
    own = evaluation["own"]["tasks"]
    out = []
    for task, block in blocks(evaluation).items():
        for metric in (block["main"], *wording.beside(block)) if task in own else ():
            if metric in own[task]["metrics"]:
                shown = (
                    f"{value(part, metric)} ({interval(metric, part['metrics'][metric])})"
                    for part in (own[task], block)
                )
                out.append((task, metric, *shown))
    return out


def _chart(both: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any], names: tuple[str, str]) -> Markup | None:
    shared = {task: block for task, block in both.items() if wording.is_share(block["main"])}
    if not shared:
        return None
    lines = []
    for task, block in shared.items():
        metric = block["main"]
        marks = [_mark(own["tasks"][task], metric, names[1], 2), _mark(block, metric, names[0], 1)]
        lines.append((f"{task}: {wording.name(metric)}", marks))
    chart = charts.dots(lines, title=f"{names[1]} and {names[0]}", x_label="of all answers")
    what = "The same bundle on both, with 95 % intervals."
    return panel(figure(None, tag("div", chart, class_="scroll"), what, key(names, "dots")))


def _mark(block: Mapping[str, Any], metric: str, name: str, style: int) -> Mark:
    found = block["metrics"][metric]
    return Mark(name, found["value"], found["low"], found["high"], style)


def _table(both: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any], names: tuple[str, str]) -> Markup:
    body: list[tuple[str, list[Child]]] = []
    for task, block in both.items():
        home = own["tasks"][task]
        body.append((f"{task}: answers", [count(home["n"]), count(block["n"])]))
        for metric in (block["main"], *wording.beside(block), "mean_confidence", "ece"):
            if metric in home["metrics"] and metric in block["metrics"]:
                cells: list[Child] = [
                    join(value(part, metric), " ", tag("small", interval(metric, part["metrics"][metric])))
                    for part in (home, block)
                ]
                body.append((heading(wording.name(metric)), cells))
    return panel(table(["metric", names[1], names[0]], body, "The same bundle on its own data set and on this one."))
