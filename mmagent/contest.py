"""What a search came to, as parts of a report: its trials, their curves, what mattered, what freezing buys and costs.

A trial is a mapping as in ``trials.json``: {"id", "sample", "quality", "step", "seconds", "trained_parameters",
"state", "error", "reports": [{"sample", "metrics"}]}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import charts
from mmagent import space as spaces
from mmagent.charts import Frame, grid, number, svg, ticks
from mmagent.markup import Child, Markup, tag
from mmagent.panels import count, figure, key, panel, table, tile
from mmagent.space import Dimension, Space

Trial = Mapping[str, Any]
Section = tuple[str, str, Markup]
COSTS = {"trained_parameters": "trained parameters", "seconds": "seconds of training", "latency_ms": "ms an answer"}
_WINNER, _OWN = 1, 2  # styles of their lines
_ABSENT = -0.08  # where a trial's line passes an axis that it has no value on: below it
_STATES = {"done": "to its end", "stopped": "stopped early", "failed": "failed", "cut": "interrupted"}


def sections(
    space: Space, dims: Sequence[Dimension], trials: Sequence[Trial], verdict: Mapping[str, Any],
    first: float = 0.0,
    importance: Mapping[str, float] | None = None,
) -> list[Section]:  # fmt: skip
    """The sections, for `mmagent.report.render`.

    Args:
        trials: the first is the recipe's own.
        verdict: as in ``winner.json``.
        first: the share of a trial's steps after which all were compared for the first time.
        importance: of each dimension, by the scores that trials had then (`at_first`).
    """
    found: list[Section] = [("search", "Search", _summary(space, trials, verdict))]
    scored = [trial for trial in trials if trial["quality"] is not None]
    if not scored:
        return found
    found.append(("trials", "Trials", _trials(dims, trials, verdict)))
    mattered = _mattered(importance or {}, first)
    what = "Validation of every trial by optimizer step; a dot is where one was stopped. Hover a line for its sample."
    curves = panel(figure(None, _curves(space, scored, verdict), what, _key(trials, verdict)))
    found.append(("curves", "Learning curves", tag("div", curves, mattered, class_="pair") if mattered else curves))
    if freezing := _freezing(dims, scored):
        found.append(("freezing", "What freezing buys", freezing))
    if space.cost:
        found.append(("cost", "Quality and cost", _cost(space.cost, scored)))
    return found


def front(trials: Sequence[Trial], cost: str) -> list[Trial]:
    """The trials that none beats in quality without a higher cost, the cheapest first (Pareto)."""
    out: list[Trial] = []
    known = [trial for trial in trials if trial["quality"] is not None and trial.get(cost) is not None]
    for trial in sorted(known, key=lambda each: (each[cost], -each["quality"])):
        if not out or trial["quality"] > out[-1]["quality"]:
            out.append(trial)
    return out


def at_first(trial: Trial, share: float) -> float | None:
    """A trial's score at its first report at or behind a share of its steps."""
    rows = [each["metrics"] for each in trial["reports"]]
    reached = [row for row in rows if row["step"] / row["total_steps"] >= share - 1e-6]
    return float(reached[0]["score"]) if reached else None


def _summary(space: Space, trials: Sequence[Trial], verdict: Mapping[str, Any]) -> Markup:
    states = {name: sum(trial["state"] == name for trial in trials) for name in _STATES}
    told = ", ".join(f"{n} {_STATES[name]}" for name, n in states.items() if n)
    own = verdict["own"]
    spread = f"± {number(own['deviation'])} over {len(own['scores'])} seeds" if own["deviation"] is not None else ""
    steps = sum(trial["step"] for trial in trials)
    longest = max(trial["step"] for trial in trials) or 1
    metric = space.metric or "score"
    tiles = [
        tile(f"winner's {metric} on validation", number(verdict["score"]), verdict["trial"], main=True),
        tile("the recipe's own values", number(own["mean"]) if own["mean"] is not None else "-", spread),
        tile("trials", str(len(trials)), told),
        tile("steps in all", count(steps), f"of {steps / longest:.1f} full runs"),
    ]
    words = f"{space.method}, {space.scheduler}" if space.method != "population" else "population"
    return tag("div", tag("dl", tiles, class_="tiles"), tag("p", verdict["why"]),
               tag("p", f"Samples: {words}. The winner: {spaces.short(verdict['sample'])}", class_="soft"))  # fmt: skip


def _trials(dims: Sequence[Dimension], trials: Sequence[Trial], verdict: Mapping[str, Any]) -> Markup:
    names = list(dict.fromkeys(each.key for each in dims if ":" not in each.key))
    head = ["trial", "best", "steps", "seconds", "ended", *names]
    ranked = sorted(trials, key=lambda each: -(each["quality"] if each["quality"] is not None else -math.inf))
    body: list[tuple[str, Sequence[Child]]] = []
    for trial in ranked:
        best = number(trial["quality"]) if trial["quality"] is not None else "-"
        ended = _STATES[trial["state"]] + (f": {trial['error']}" if trial["error"] else "")
        values = [_written(trial["sample"].get(name)) for name in names]
        body.append((trial["id"], [best, count(trial["step"]), f"{trial['seconds']:.0f}", ended, *values]))
    what = (
        "A line for each trial through its values: the better it was, the stronger. Low values and first choices are "
        "at the bottom; below an axis passes who has no value on it."
    )
    lines = panel(figure(None, _parallel(dims, trials, verdict), what, _key(trials, verdict)))
    return tag("div", panel(table(head, body, "Every trial, the best first. The first trial has the recipe's own "
                                  "values.")), lines)  # fmt: skip


def _written(value: Any) -> str:
    return "-" if value is None else number(value) if isinstance(value, float) else str(value)


def _key(trials: Sequence[Trial], verdict: Mapping[str, Any]) -> Markup:
    own = trials[0]["id"]
    names = [f"winner ({verdict['trial']})", f"the recipe's own values ({own})"]
    return key(names if verdict["trial"] != own else [f"winner, the recipe's own values ({own})"], "lines")


def _style(trial: Trial, trials: Sequence[Trial], verdict: Mapping[str, Any]) -> str:
    if trial["id"] == verdict["trial"]:
        return f"line s{_WINNER}"
    return f"line s{_OWN}" if trial["id"] == trials[0]["id"] else "line other"


def _parallel(dims: Sequence[Dimension], trials: Sequence[Trial], verdict: Mapping[str, Any]) -> Markup:
    """An axis for each dimension, and one for the quality, at the right."""
    scored = sorted((t for t in trials if t["quality"] is not None), key=lambda each: each["quality"])
    low, high = scored[0]["quality"], scored[-1]["quality"]
    shown = [each for each in dims if any(each.share(spaces.raw(t["sample"], dims).get(each.key)) is not None
                                          for t in scored)]  # fmt: skip
    width, height, top, foot, left = max(1000, 150 * (len(shown) + 1)), 380, 20, 80, 60
    gap = (width - 2 * left) / max(1, len(shown))

    def y(share: float) -> float:
        return round(height - foot - share * (height - top - foot), 1)

    body: list[Child] = []
    for place, each in enumerate([*shown, None]):
        x = round(left + place * gap, 1)
        name = "best" if each is None else each.key
        ends = _ends(each) if each is not None else [(0.0, number(low)), (1.0, number(high))]
        body.append(tag("path", d=f"M{x} {top}V{height - foot}", class_="rule"))
        body.append(tag("text", name, x=x, y=height - foot + 54, text_anchor="middle", class_="label"))
        if each is not None and any(each.share(spaces.raw(t["sample"], dims).get(each.key)) is None for t in scored):
            ends.append((_ABSENT, "none here"))
        body += [tag("text", words, x=x + 5, y=y(share) + 4, class_="tick") for share, words in ends]
    for trial in scored:
        raw = spaces.raw(trial["sample"], dims)
        shares = [each.share(raw.get(each.key)) for each in shown]
        quality = (trial["quality"] - low) / (high - low) if high > low else 1.0
        at = [_ABSENT if share is None else share for share in (*shares, quality)]
        path = "M" + "L".join(f"{left + place * gap:.1f} {y(share)}" for place, share in enumerate(at))
        told = f"{trial['id']}: {number(trial['quality'])}, {spaces.short(trial['sample'])}"
        opacity = f"{0.2 + 0.8 * quality:.2f}"
        body.append(tag("path", tag("title", told), d=path, class_=_style(trial, trials, verdict), opacity=opacity))
    chart = svg(width, height, "Parallel coordinates of all trials", *body, class_="chart wide")
    return tag("div", chart, class_="scroll", tabindex="0", role="region", aria_label="Parallel coordinates")


def _ends(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.kind == "choice":
        return [((at + 0.5) / len(dimension.options), str(each)) for at, each in enumerate(dimension.options)]
    return [(0.0, number(dimension.low)), (1.0, number(dimension.high))]


def _curves(space: Space, trials: Sequence[Trial], verdict: Mapping[str, Any]) -> Markup:
    metric = space.metric or "score"
    points = {
        trial["id"]: [(each["metrics"]["step"], each["metrics"][metric]) for each in trial["reports"]
                      if metric in each["metrics"]]
        for trial in trials
    }  # fmt: skip
    xs = [x for line in points.values() for x, _ in line]
    ys = [y for line in points.values() for _, y in line]
    if not xs:
        return svg(charts.WIDTH, 20, "no curves")
    y_ticks = ticks(min(ys), max(ys))
    frame = Frame((0.0, max(xs)), (min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])), height=330)
    body: list[Child] = [grid(frame, ticks(*frame.x), y_ticks, number, number, "optimizer step", metric)]
    for trial in sorted(trials, key=lambda each: each["quality"]):
        line = points[trial["id"]]
        if not line:
            continue
        style = _style(trial, trials, verdict)
        told = tag("title", f"{trial['id']}: {spaces.short(trial['sample'])}")
        path = "M" + "L".join(f"{frame.px(x)} {frame.py(y)}" for x, y in line)
        body.append(tag("path", told, d=path, class_=style))
        if trial["state"] != "done" or len(line) == 1:
            x, y = line[-1]
            mark = style.replace("line", "mark")
            body.append(tag("circle", told, cx=frame.px(x), cy=frame.py(y), r=3, class_=mark))
    return svg(frame.width, frame.height, f"{metric} of every trial by optimizer step", *body)


def _mattered(shares: Mapping[str, float], first: float) -> Markup | None:
    """How much each dimension says about the score that trials had where they were compared first."""
    if not shares:
        return None
    rows = [(name, max(0.0, share)) for name, share in shares.items()]
    chart = charts.bars(rows, title="Importance of each dimension", x_label="share of the variance")
    words = (
        "How much of what sets trials apart each dimension explains (functional ANOVA), by their first score at or "
        f"behind {first:.0%} of their steps: a hint, of few trials. What only some have is left out."
    )
    return panel(figure("What mattered", chart, words))


def _freezing(dims: Sequence[Dimension], trials: Sequence[Trial]) -> Markup | None:
    if not any(each.key == "freeze.strategy" for each in dims):
        return None
    by_kind: dict[str, list[Trial]] = {}
    for trial in trials:
        by_kind.setdefault(str(trial["sample"]["freeze.strategy"]), []).append(trial)
    rows: list[tuple[str, Sequence[Child]]] = []
    for strategy, found in sorted(by_kind.items(), key=lambda pair: -max(t["quality"] for t in pair[1])):
        best = max(found, key=lambda each: each["quality"])
        trained = best.get("trained_parameters")
        pace = best["step"] / best["seconds"] if best["seconds"] else 0.0
        rows.append((strategy, [number(best["quality"]), str(len(found)),
                                count(trained) if trained is not None else "-", f"{pace:.2f}"]))  # fmt: skip
    head = ["strategy", "best", "trials", "trained parameters", "steps a second"]
    return panel(table(head, rows, "The best trial of each freezing strategy, and what it costs."))


def _cost(cost: str, trials: Sequence[Trial]) -> Markup:
    best = front(trials, cost)
    known = [trial for trial in trials if trial.get(cost) is not None]
    if not known:
        return panel(tag("p", "No trial's cost is known."))
    xs, ys = [float(t[cost]) for t in known], [float(t["quality"]) for t in known]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    edge = 0.03 * (max(xs) - min(xs)) or 1.0
    frame = Frame((min(xs) - edge, max(xs) + edge), (min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])), height=330)
    body: list[Child] = [grid(frame, x_ticks, y_ticks, number, number, COSTS[cost], "best")]
    steps = [f"M{frame.px(best[0][cost])} {frame.py(best[0]['quality'])}"]
    for trial in best[1:]:
        steps.append(f"H{frame.px(trial[cost])}V{frame.py(trial['quality'])}")
    body.append(tag("path", d="".join(steps), class_="line s1"))
    for trial in known:
        on = any(trial["id"] == each["id"] for each in best)
        told = f"{trial['id']}: {number(trial['quality'])} for {number(trial[cost])} {COSTS[cost]}"
        body.append(tag("circle", tag("title", told), cx=frame.px(trial[cost]), cy=frame.py(trial["quality"]), r=4,
                        class_="mark s1" if on else "mark other"))  # fmt: skip
    rows: list[tuple[str, Sequence[Child]]] = [
        (trial["id"], [number(trial["quality"]), number(trial[cost]), spaces.short(trial["sample"])]) for trial in best
    ]
    chart = figure(None, svg(frame.width, frame.height, "Quality against cost", *body), "On the line: trials that none "
                   "beats without a higher cost (Pareto front).")  # fmt: skip
    told = table(["trial", "best", COSTS[cost], "sample"], rows, "The front, the cheapest first.")
    return tag("div", panel(chart), panel(told), class_="pair")
