"""``report.html``: one evaluation as one page that stands alone: no script, no request, pictures and sound inside.

html = report.render(evaluation, curves=rows_of_metrics_jsonl, examples=examples)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import charts
from mmagent.charts import SPACE, Mark, Series, percent
from mmagent.examples import Example, group_name
from mmagent.examples import section as examples_section
from mmagent.markup import Child, Markup, join, tag
from mmagent.media import Limits
from mmagent.report_style import CSS

_MATRIX_LABELS = 40  # more are a table of the most frequent mistakes
_MISTAKES = 30
_TALL_ROWS = 15  # a longer table scrolls in its own window
_PLOTTED = 16  # slices in the first chart
# Nothing may be fetched and nothing run, whatever a data set says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
_BEFORE_NAMES = {"majority": "majority answer", "linear_probe": "linear probe"}


def render(
    evaluation: Mapping[str, Any],
    *,
    curves: Sequence[Mapping[str, Any]] = (),
    examples: Sequence[Example] = (),
    limits: Limits | None = None,
) -> str:
    """The page.

    Args:
        evaluation: as in ``evaluation.json``.
        curves: the lines of ``metrics.jsonl``: {"step", "kind": "train" | "validation", "loss", "accuracy"}.
        examples: answers to show, grouped by their heading in the order given.
        limits: of the media in the examples.
    """
    sections = [
        ("result", "Before and after", _results(evaluation)),
        ("learning", "Learning", _learning(curves)),
        ("confidence", "Confidence", _confidence(evaluation)),
        ("classes", "Classes", _classes(evaluation)),
        ("examples", "Examples", examples_section(examples, limits or Limits())),
    ]
    shown = [(key, name, body) for key, name, body in sections if body]
    name = f"Evaluation of {evaluation['bundle']}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", name),
        tag("style", Markup(CSS)),
    )
    links = [tag("a", title, href=f"#{key}") for key, title, _ in shown]
    what = f"{_count(evaluation['n'])} answers on the split {evaluation['split']} of {evaluation['data']}"
    top = tag("header", tag("h1", name), tag("p", what, class_="soft"), tag("nav", links, aria_label="Sections"))
    body = [tag("section", tag("h2", title, id=key), part, aria_labelledby=key) for key, title, part in shown]
    page = tag("body", top, tag("main", _headline(evaluation), body), _footer(evaluation))
    return "<!doctype html>\n" + tag("html", head, page, lang="en") + "\n"


def _headline(evaluation: Mapping[str, Any]) -> Markup:
    values = evaluation["metrics"]
    accuracy = values["accuracy"]
    tiles = [_tile("Accuracy", percent(accuracy["value"]), f"{_interval(accuracy)} (95{SPACE}% interval)", main=True)]
    for key, before in evaluation.get("before", {}).items():
        value = before["metrics"]["accuracy"]
        name = _BEFORE_NAMES.get(key, key).capitalize()
        tiles.append(_tile(name, percent(value["value"]), f"before fine-tuning: {_interval(value)}"))
    tiles.append(_tile("Macro F1", percent(values["macro_f1"]["value"]), _interval(values["macro_f1"])))
    tiles.append(_tile("Calibration error", percent(values["ece"]["value"]), "how far confidence is from accuracy"))
    if blind := evaluation.get("blind"):
        shown = blind["slices"].get("form=text", blind)
        if shown["n"]:
            note = f"confidence {percent(shown['mean_confidence'])}, right {percent(shown['accuracy'])}"
            note = f"without its {blind['without']}: {note}"
            tiles.append(_tile("Honesty gap", percent(shown["gap"]), note))
    if evaluation["errors"]["n"]:
        tiles.append(_tile("Not answered", _count(evaluation["errors"]["n"]), "rows with an error: in no number here"))
    return tag("dl", tiles, class_="tiles")


def _tile(name: str, value: str, note: str, *, main: bool = False) -> Markup:
    shown = (tag("dt", name), tag("dd", value, class_="big"), tag("dd", note, class_="note"))
    return tag("div", *shown, class_="tile main" if main else "tile")


def _results(evaluation: Mapping[str, Any]) -> Markup:
    before = evaluation.get("before", {})
    rows = {"all": evaluation, **evaluation["slices"]}
    # One column of slices is a picture, all of them a table: the first that divides the rows is what the test is about.
    columns = Counter(name.partition("=")[0] for name in evaluation["slices"])
    first = next((column for column, values in columns.items() if 1 < values <= _PLOTTED), None)
    plotted = {name: part for name, part in rows.items() if name.partition("=")[0] in ("all", first)}
    lines = [(group_name(name), _marks(name, part, before)) for name, part in plotted.items()]
    names = ["this bundle", *(_BEFORE_NAMES.get(key, key) for key in before)]
    chart = charts.dots(lines, title="Accuracy of this bundle and of simpler answers, by slice", x_label="accuracy")
    what = "Accuracy with its 95 % interval, on one scale that ends at 100 %."
    figure = _figure(None, tag("div", chart, class_="scroll"), what, _key(names, "dots"))
    notes = [
        tag("p", tag("b", _BEFORE_NAMES.get(key, key)), f": {item['what']}", class_="soft")
        for key, item in before.items()
    ]
    return join(tag("div", figure, class_="panel"), notes, tag("div", _slice_table(rows, before), class_="panel"))


def _marks(name: str, part: Mapping[str, Any], before: Mapping[str, Any]) -> list[Mark]:
    value = part["metrics"]["accuracy"]
    marks = []
    for style, (key, item) in enumerate(before.items(), 2):
        other = item if name == "all" else item["slices"].get(name)
        if other:
            number = other["metrics"]["accuracy"]
            marks.append(Mark(_BEFORE_NAMES.get(key, key), number["value"], number["low"], number["high"], style))
    return [*marks, Mark("this bundle", value["value"], value["low"], value["high"])]


def _slice_table(rows: Mapping[str, Mapping[str, Any]], before: Mapping[str, Any]) -> Markup:
    head = ["slice", "answers", "accuracy", "macro F1", "calibration error", "mean confidence"]
    body: list[tuple[str, list[Child]]] = []
    for name, part in rows.items():
        values = part["metrics"]
        accuracy = join(percent(values["accuracy"]["value"]), " ", tag("small", _interval(values["accuracy"])))
        cells: list[Child] = [_count(part["n"]), accuracy]
        cells += [percent(values[key]["value"]) for key in ("macro_f1", "ece", "mean_confidence")]
        for item in before.values():
            other = item if name == "all" else item["slices"].get(name)
            cells.append(percent(other["metrics"]["accuracy"]["value"]) if other else "–")
        body.append((group_name(name), cells))
    head += [f"before: {_BEFORE_NAMES.get(key, key)}" for key in before]
    return _table(head, body, "Every slice of the test, with 95 % intervals, and what simpler answers reach on it.")


def _learning(curves: Sequence[Mapping[str, Any]]) -> Markup | None:
    def points(kind: str, key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in curves if row.get("kind") == kind and row.get(key) is not None]

    figures: list[Child] = []
    for name, shares in (("Loss", False), ("Accuracy", True)):
        what = name.lower()
        series = (
            Series("training", points("train", what), 2),
            Series("validation", points("validation", what), 1, True),
        )
        drawn = [item for item in series if item.points]
        if not drawn:
            continue
        title, step = f"{name} by optimizer step", "optimizer step"
        chart = charts.lines(drawn, title=title, x_label=step, y_label=what, shares=shares, floor=0)
        last = "; ".join(f"{item.name} at the end {_written(item.points[-1][1], shares)}" for item in drawn)
        key = tag("ul", [tag("li", item.name, class_=f"s{item.style}") for item in drawn], class_="key lines")
        figures.append(tag("div", _figure(name, chart, f"{last}.", key), class_="panel"))
    return tag("div", figures, class_="pair") if figures else None


def _written(value: float, shares: bool) -> str:
    return percent(value) if shares else charts.number(value)


def _confidence(evaluation: Mapping[str, Any]) -> Markup:
    bins = evaluation["calibration"]["bins"]
    ece = percent(evaluation["calibration"]["ece"])
    told = (
        f"Of all answers given with some confidence, that share should be right: bars on the dashed line. Red is the "
        f"distance to the mean confidence of the bin; its mean over all answers is the calibration error, {ece}."
    )
    chart = charts.reliability(bins, f"Reliability diagram: accuracy by confidence; expected calibration error {ece}")
    figures = [tag("div", _figure("Is it right as often as it says?", chart, told), class_="panel")]
    points = [(row["coverage"], row["accuracy"]) for row in evaluation["coverage"]]
    floor = max(0.0, min(y for _, y in points) - 0.02)
    line = charts.lines(
        [Series("accuracy", points, 1)],
        title="Accuracy by share of questions answered", x_label="share of questions answered, surest first",
        y_label="accuracy", shares=True, x_shares=True, floor=floor,
    )  # fmt: skip
    what = "The surest answers first: how accurate it is where the less sure ones are left to a person. "
    what += " ".join(_at_coverage(evaluation["coverage"], wanted) for wanted in (0.5, 0.9, 0.95))
    figures.append(tag("div", _figure("What does doubt buy?", line, what), class_="panel"))
    return join(tag("div", figures, class_="pair"), _blind(evaluation.get("blind")))


def _at_coverage(points: Sequence[Mapping[str, float]], wanted: float) -> str:
    best = min(points, key=lambda row: abs(row["coverage"] - wanted))
    return f"Of the surest {percent(best['coverage'])}, {percent(best['accuracy'])} are right."


def _blind(blind: Mapping[str, Any] | None) -> Markup | None:
    if not blind or not blind["n"]:
        return None
    rows = {"all": blind, **blind["slices"]}
    body = [
        (
            group_name(name),
            [_count(part["n"]), *(percent(part[key]) for key in ("accuracy", "mean_confidence", "gap"))],
        )
        for name, part in rows.items()
    ]
    told = (
        f"The same questions with the {blind['without']} taken away. An honest model then claims no more than it gets "
        "right: the gap is the distance between mean confidence and accuracy."
    )
    table = _table(["slice", "answers", "accuracy", "mean confidence", "gap"], body, told)
    return tag("div", tag("h3", f"Without its {blind['without']}"), table, class_="panel")


def _classes(evaluation: Mapping[str, Any]) -> Markup:
    head = ["class", "precision", "recall", "F1", "support"]
    body = [
        (label, [*(percent(row[key]) for key in ("precision", "recall", "f1")), _count(row["support"])])
        for label, row in evaluation["per_class"].items()
    ]
    table = tag("div", _table(head, body, "Precision, recall and F1 of each class."), class_="panel")
    occurring = [label for label in evaluation["confusion"]["labels"] if label in evaluation["per_class"]]
    cells = evaluation["confusion"]["cells"]
    if len(occurring) <= _MATRIX_LABELS:
        told = "Rows: the right answer; columns: the given one. Blue is right, red is wrong, darker is more of its row."
        chart = charts.confusion(occurring, cells, "Confusion matrix: right answer by given answer")
        shown = _figure("Confusion matrix", chart, told)
    else:
        wrong = [cell for cell in cells if cell["truth"] != cell["predicted"]][:_MISTAKES]
        mistakes = [(cell["truth"], [cell["predicted"], _count(cell["count"])]) for cell in wrong]
        shown = _table(["right answer", "given answer", "times"], mistakes, "The most frequent mistakes.")
    return tag("div", tag("div", shown, class_="panel"), table, class_="pair")


def _footer(evaluation: Mapping[str, Any]) -> Markup:
    notes = (
        "Intervals are 95 % percentile bootstraps of 1,000 resamples; rows of one group (the questions about one "
        "picture) are drawn together. Calibration error: 15 bins of equal width (Guo et al. 2017). "
        "Macro F1: the mean over the classes that occur. All numbers: evaluation.json, beside this page."
    )
    parts: list[Child] = [tag("p", notes)]
    for reason, count in evaluation["errors"]["reasons"].items():
        parts.append(tag("p", f"Not answered: {count} x {reason}"))
    if evaluation["unknown_labels"]:
        names = ", ".join(evaluation["unknown_labels"][:20])
        parts.append(tag("p", f"Labels of the data that this bundle cannot answer (counted as wrong): {names}"))
    return tag("footer", parts)


def _figure(name: str | None, chart: Markup, caption: str, key: Markup | None = None) -> Markup:
    return tag("figure", tag("h3", name) if name else None, key, chart, tag("figcaption", caption))


def _key(names: Sequence[str], kind: str) -> Markup:
    return tag("ul", [tag("li", name, class_=f"s{index}") for index, name in enumerate(names, 1)], class_=f"key {kind}")


def _table(
    head: Sequence[str], body: Sequence[tuple[str, Sequence[Child]]], caption: str, *, tall: bool = False
) -> Markup:
    top = tag("thead", tag("tr", [tag("th", name, scope="col") for name in head]))
    rows = [tag("tr", tag("th", name, scope="row"), [tag("td", cell) for cell in cells]) for name, cells in body]
    tall = len(body) > _TALL_ROWS
    table = tag("table", top, tag("tbody", rows), aria_label=caption)
    # The region can be scrolled by keyboard where it is too small for the table.
    region = tag(
        "div", table, class_="scroll tall" if tall else "scroll", tabindex="0", role="region", aria_label=caption
    )
    return tag("figure", tag("figcaption", caption, class_="above"), region)


def _interval(value: Mapping[str, float | None]) -> str:
    if value["low"] is None or value["high"] is None:
        return "–"
    return f"{percent(value['low']).removesuffix(f'{SPACE}%')} – {percent(value['high'])}".replace(" ", SPACE)


def _count(value: int) -> str:
    return f"{value:,}"
