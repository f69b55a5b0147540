"""``report.html``: one evaluation as one page that stands alone: no script, no request, pictures and sound inside.

html = report.render(evaluation, curves=rows_of_metrics_jsonl, examples={task: examples})
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import charts, example_cards, learning, stalls, transfer, wording
from mmagent.charts import SPACE, Mark, Series, percent
from mmagent.evaluation import blocks
from mmagent.examples import Example, group_name
from mmagent.markup import Child, Markup, join, tag
from mmagent.media import Limits
from mmagent.panels import count, figure, key, panel, table, tile
from mmagent.report_style import CSS
from mmagent.scatter import scatter
from mmagent.wording import heading, interval, value

_MATRIX_LABELS = 40  # more are a table of the most frequent mistakes
_MISTAKES = 30
_UNKNOWN = 20  # labels named in the notes
_PLOTTED = 16  # slices in the first chart
# Nothing may be fetched and nothing run, whatever a data set says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
Section = tuple[str, str, Markup]  # anchor, title, body


def render(
    evaluation: Mapping[str, Any],
    *,
    curves: Sequence[Mapping[str, Any]] = (),
    examples: Mapping[str, Sequence[Example]] | None = None,
    limits: Limits | None = None,
    more: Sequence[Section] = (),
) -> str:
    """The page.

    Args:
        evaluation: as in ``evaluation.json``.
        curves: the lines of ``metrics.jsonl``: {"step", "kind": "train" | "validation", "loss", METRIC}.
        examples: by task, answers to show, grouped by their heading in the order given.
        limits: of the media in the examples.
        more: sections behind the first one.
    """
    tasks = blocks(evaluation)
    several = len(tasks) > 1
    parts: list[tuple[Markup, list[Section]]] = []
    for index, (task, block) in enumerate(tasks.items()):
        found = _sections(block, (examples or {}).get(task, ()), limits or Limits())
        if several:
            found = [(f"{anchor}-{index}", f"{task}: {title}", body) for anchor, title, body in found]
        if index == 0 and (learnt := learning.section(curves, tasks)):
            found.insert(1, ("learning", "Learning", learnt))
        if index == 0 and (spent := stalls.section(curves)):
            found.insert(2 if learnt else 1, ("time", "Time", spent))
        if index == 0:
            found[1:1] = [*more, *transfer.sections(evaluation)]
        parts.append((_headline(block), found))
    total = sum(block["n"] for block in tasks.values())
    main: list[Child] = []
    for task, (headline, found) in zip(tasks, parts, strict=True):
        main += [tag("p", "Task ", tag("b", task), class_="task") if several else None, headline, *map(_section, found)]
    return _page(
        f"Evaluation of {evaluation['bundle']}",
        f"{count(total)} answers on the split {evaluation['split']} of {evaluation['data']}",
        [section for _, found in parts for section in found],
        main,
        _footer(evaluation, tasks),
    )


def page(name: str, what: str, sections: Sequence[Section]) -> str:
    """A page of sections alone, where there is no evaluation."""
    return _page(name, what, sections, [*map(_section, sections)], None)


def _section(section: Section) -> Markup:
    anchor, title, body = section
    return tag("section", tag("h2", title, id=anchor), body, aria_labelledby=anchor)


def _page(name: str, what: str, sections: Sequence[Section], main: Sequence[Child], footer: Markup | None) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", name),
        tag("style", Markup(CSS)),
    )
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    top = tag("header", tag("h1", name), tag("p", what, class_="soft"), tag("nav", links, aria_label="Sections"))
    return "<!doctype html>\n" + tag("html", head, tag("body", top, tag("main", main), footer), lang="en") + "\n"


def _sections(block: Mapping[str, Any], shown: Sequence[Example], limits: Limits) -> list[Section]:
    """What fits the task."""
    sections = [
        ("result", "Before and after", _results(block)),
        ("answers", "Answers", _points(block)),
        ("confidence", "Confidence", _confidence(block) if "calibration" in block else None),
        ("groups", "Groups", _groups(block["gaps"]) if block.get("gaps") else None),
        ("classes", "Classes" if "confusion" in block else "Labels", _classes(block) if "per_class" in block else None),
        ("examples", "Examples", example_cards.section(shown, limits)),
    ]
    return [(anchor, title, body) for anchor, title, body in sections if body]


def _headline(block: Mapping[str, Any]) -> Markup:
    values, main = block["metrics"], block["main"]
    tiles = [
        tile(
            heading(wording.name(main)), value(block, main), f"{interval(main, values[main])} (95{SPACE}% interval)",
            main=True,
        )
    ]  # fmt: skip
    for name, before in block.get("before", {}).items():
        told = f"before fine-tuning: {interval(main, before['metrics'][main])}"
        tiles.append(tile(heading(wording.BEFORE.get(name, name)), value(before, main), told))
    for name in wording.beside(block):
        shown = interval(name, values[name])
        tiles.append(tile(heading(wording.name(name)), value(block, name), "" if shown == "–" else shown))
    if "ece" in values:
        tiles.append(tile("Calibration error", value(block, "ece"), "how far confidence is from accuracy"))
    if (blind := block.get("blind")) and blind["n"]:
        note = f"confidence {percent(blind['mean_confidence'])}, right {percent(blind['accuracy'])}"
        note = f"without its {blind['without']}: {note}"
        tiles.append(tile("Honesty gap", percent(blind["gap"]), note))
    if block["errors"]["n"]:
        tiles.append(tile("Not answered", count(block["errors"]["n"]), "rows with an error: in no number here"))
    return tag("dl", tiles, class_="tiles")


def _results(block: Mapping[str, Any]) -> Markup:
    before, main = block.get("before", {}), block["main"]
    rows = {"all": block, **block["slices"]}
    notes = [
        tag("p", tag("b", wording.BEFORE.get(name, name)), f": {item['what']}", class_="soft")
        for name, item in before.items()
    ]
    chart = _dots(rows, before, main) if wording.is_share(main) else None
    return join(chart, notes, panel(_slice_table(rows, before)))


def _dots(rows: Mapping[str, Mapping[str, Any]], before: Mapping[str, Any], main: str) -> Markup:
    # One column of slices is a picture, all of them a table: the first that divides the rows is what the test is about.
    columns = Counter(name.partition("=")[0] for name in rows if name != "all")
    first = next((column for column, values in columns.items() if 1 < values <= _PLOTTED), None)
    plotted = {name: part for name, part in rows.items() if name.partition("=")[0] in ("all", first)}
    lines = [(group_name(name), _marks(name, part, before, main)) for name, part in plotted.items()]
    names = ["this bundle", *(wording.BEFORE.get(name, name) for name in before)]
    metric = wording.name(main)
    title = f"{heading(metric)} of this bundle and of simpler answers, by slice"
    chart = charts.dots(lines, title=title, x_label=metric)
    what = f"{heading(metric)} with its 95 % interval, on one scale that ends at 100 %."
    return panel(figure(None, tag("div", chart, class_="scroll"), what, key(names, "dots")))


def _marks(name: str, part: Mapping[str, Any], before: Mapping[str, Any], main: str) -> list[Mark]:
    found = part["metrics"][main]
    marks = []
    for style, (other_name, item) in enumerate(before.items(), 2):
        other = item if name == "all" else item["slices"].get(name)
        if other:
            number = other["metrics"][main]
            shown = wording.BEFORE.get(other_name, other_name)
            marks.append(Mark(shown, number["value"], number["low"], number["high"], style))
    return [*marks, Mark("this bundle", found["value"], found["low"], found["high"])]


def _slice_table(rows: Mapping[str, Mapping[str, Any]], before: Mapping[str, Any]) -> Markup:
    whole = rows["all"]
    main, others = whole["main"], [*wording.beside(whole), *({"ece"} & set(whole["metrics"])), "mean_confidence"]
    head = ["slice", "answers", *(wording.name(metric) for metric in (main, *others))]
    body: list[tuple[str, list[Child]]] = []
    for name, part in rows.items():
        first = join(value(part, main), " ", tag("small", interval(main, part["metrics"][main])))
        cells: list[Child] = [count(part["n"]), first, *(value(part, metric) for metric in others)]
        for item in before.values():
            other = item if name == "all" else item["slices"].get(name)
            cells.append(value(other, main) if other else "–")
        body.append((group_name(name), cells))
    head += [f"before: {wording.BEFORE.get(name, name)}" for name in before]
    return table(head, body, "Every slice of the test, with 95 % intervals, and what simpler answers reach on it.")


def _points(block: Mapping[str, Any]) -> Markup | None:
    if not block.get("points"):
        return None
    chart = scatter(block["points"], title="Given by right value", x_label="right value", y_label="given value")
    told = f"{count(len(block['points']))} answers; on the dashed line they are right."
    return panel(figure("How far off is it?", chart, told))


def _confidence(block: Mapping[str, Any]) -> Markup:
    bins = block["calibration"]["bins"]
    ece = percent(block["calibration"]["ece"])
    told = (
        f"Of all answers given with some confidence, that share should be right: bars on the dashed line. Red is the "
        f"distance to the mean confidence of the bin; its mean over all answers is the calibration error, {ece}."
    )
    chart = charts.reliability(bins, f"Reliability diagram: accuracy by confidence; expected calibration error {ece}")
    figures = [panel(figure("Is it right as often as it says?", chart, told))]
    points = [(row["coverage"], row["accuracy"]) for row in block["coverage"]]
    floor = max(0.0, min(y for _, y in points) - 0.02)
    line = charts.lines(
        [Series("accuracy", points, 1)],
        title="Accuracy by share of questions answered", x_label="share of questions answered, surest first",
        y_label="accuracy", shares=True, x_shares=True, floor=floor,
    )  # fmt: skip
    what = "The surest answers first: how accurate it is where the less sure ones are left to a person. "
    what += " ".join(_at_coverage(block["coverage"], wanted) for wanted in (0.5, 0.9, 0.95))
    figures.append(panel(figure("What does doubt buy?", line, what)))
    return join(tag("div", figures, class_="pair"), _blind(block.get("blind")))


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
            [count(part["n"]), *(percent(part[key]) for key in ("accuracy", "mean_confidence", "gap"))],
        )
        for name, part in rows.items()
    ]
    told = (
        f"The same questions with the {blind['without']} taken away. An honest model then claims no more than it gets "
        "right: the gap is the distance between mean confidence and accuracy."
    )
    shown = table(["slice", "answers", "accuracy", "mean confidence", "gap"], body, told)
    return panel(tag("h3", f"Without its {blind['without']}"), shown)


_GAPS = {
    "accuracy": "right answers",
    "demographic_parity": "how often a label is answered",
    "equalized_odds": "how often it is answered where it is right, or where it is not",
}


def _groups(gaps: Mapping[str, Mapping[str, Any]]) -> Markup:
    """How far groups of rows lie apart, by each column that was named."""
    parts: list[Child] = []
    for column, found in gaps.items():
        body: list[tuple[str, Sequence[Child]]] = [
            (words, [percent(found[key]["value"]), interval("accuracy", found[key])])
            for key, words in _GAPS.items()
            if key in found
        ]
        about = f"; it differs most for {found['label']!r}" if "label" in found else ""
        what = f"The largest difference between {len(found['groups'])} groups of {column}{about}. Of several groups "
        parts.append(table(["difference of", "at most", "interval"], body, what + "some of it is chance."))
        sizes: list[tuple[str, Sequence[Child]]] = [
            (name, [count(each["n"]), percent(each["accuracy"])]) for name, each in found["groups"].items()
        ]
        parts.append(table([column, "rows", "right"], sizes, f"Right answers of each group of {column}."))
    return panel(*parts)


def _classes(block: Mapping[str, Any]) -> Markup:
    classes, confusion = block["per_class"], block.get("confusion")
    head = ["class" if confusion else "label", "precision", "recall", "F1", "support"]
    body = [
        (label, [*(percent(row[name]) for name in ("precision", "recall", "f1")), count(row["support"])])
        for label, row in classes.items()
    ]
    listed = panel(table(head, body, f"Precision, recall and F1 of each {head[0]}."))
    return tag("div", panel(_confusion(confusion, classes)), listed, class_="pair") if confusion else listed


def _confusion(confusion: Mapping[str, Any], classes: Mapping[str, Any]) -> Markup:
    occurring = [label for label in confusion["labels"] if label in classes]
    cells = confusion["cells"]
    if len(occurring) <= _MATRIX_LABELS:
        told = "Rows: the right answer; columns: the given one. Blue is right, red is wrong, darker is more of its row."
        chart = charts.confusion(occurring, cells, "Confusion matrix: right answer by given answer")
        return figure("Confusion matrix", chart, told)
    wrong = [cell for cell in cells if cell["truth"] != cell["predicted"]][:_MISTAKES]
    mistakes = [(cell["truth"], [cell["predicted"], count(cell["count"])]) for cell in wrong]
    return table(["right answer", "given answer", "times"], mistakes, "The most frequent mistakes.")


def _footer(evaluation: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> Markup:
    notes = (
        "Intervals are 95 % percentile bootstraps of 1,000 resamples; rows of one group (the questions about one "
        "picture) are drawn together. Calibration error: 15 bins of equal width (Guo et al. 2017). "
        "Macro F1: the mean over the classes that occur. All numbers: evaluation.json, beside this page."
    )
    parts: list[Child] = [tag("p", notes)]
    for block in tasks.values():
        if block["cut"]:
            parts.append(tag("p", wording.cut(block)))
        for reason, rows in block["errors"]["reasons"].items():
            parts.append(tag("p", f"Not answered: {rows} x {reason}"))
        if block["unknown_labels"]:
            names = ", ".join(f"{label} ({rows:,})" for label, rows in [*block["unknown_labels"].items()][:_UNKNOWN])
            told = f"{count(block['unknown_rows'])} rows have labels that this bundle cannot answer, counted as wrong"
            parts.append(tag("p", f"{told}: {names}"))
    for name, errors in evaluation.get("unanswered", {}).items():
        told = "; ".join(f"{rows} x {reason}" for reason, rows in errors["reasons"].items())
        parts.append(tag("p", f"Task {name}: not answered: {told}"))
    return tag("footer", parts)
