"""The page of a gate: before and after, slice by slice, and answers that changed sides, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import example_cards, report
from mmagent.charts import number, percent
from mmagent.examples import Example
from mmagent.markup import Child, Markup, tag
from mmagent.media import Limits
from mmagent.panels import count, panel, table, tile

_MARKS = {True: "yes", False: "no", None: "not judged"}


def page(verdict: Mapping[str, Any], shown: Sequence[Example], limits: Limits) -> str:
    """
    Args:
        verdict: what gate.json holds.
        shown: answers of the candidate that only one of the two gave rightly.
        limits: of media that are shown.
    """
    sections: list[report.Section] = [
        ("verdict", "Verdict", _verdict(verdict)),
        ("checks", "Before and after", _checks(verdict["checks"])),
    ]
    if verdict.get("feedback"):
        sections.append(("feedback", "Feedback", _feedback(verdict["feedback"])))
    if (cards := example_cards.section(shown, limits)) is not None:
        sections.append(("flips", "Answers that changed", cards))
    word = "accepted" if verdict["accepted"] else "refused"
    return report.page(f"{verdict['after']}: {word}", f"in place of {verdict['before']}", sections)


def _verdict(verdict: Mapping[str, Any]) -> Markup:
    whole = {each["name"]: each for each in verdict["checks"] if "," not in each["name"]}
    names = {"fixed": "the fixed test set", "new": "the new feedback", "earlier": "earlier feedback"}
    tiles = [tile("verdict", "accepted" if verdict["accepted"] else "refused", verdict["after"], main=True)]
    for name, words in names.items():
        if (each := whole.get(name)) is not None:
            change = each["after"] - each["before"]
            tiles.append(tile(f"right on {words}", percent(each["after"]), f"{100 * change:+.1f} points"))
    failed = [each for each in verdict["checks"] if each["passed"] is False]
    told: list[Child] = [
        tag("li", f"{each['name']}: {number(each['before'])} before, {number(each['after'])} after; wanted "
                  f"{each['rule']}")
        for each in failed
    ]  # fmt: skip
    flips = verdict["flips"]
    words = f"{count(flips['gained'])} answers are right now that were wrong, {count(flips['lost'])} the other way."
    return tag("div", tag("dl", tiles, class_="tiles"), tag("ul", told) if told else None, tag("p", words))


def _checks(checks: Sequence[Mapping[str, Any]]) -> Markup:
    head = ["check", "rows", "before", "after", "change", "interval", "rule", "holds"]
    body: list[tuple[str, Sequence[Child]]] = []
    for each in sorted(checks, key=lambda each: (each["passed"] is not False, "," in each["name"], each["name"])):
        change = each["after"] - each["before"]
        body.append(
            (each["name"], [count(each["rows"]), number(each["before"]), number(each["after"]), f"{change:+.3f}",
                            f"{each['low']:+.3f} to {each['high']:+.3f}", each["rule"], _MARKS[each["passed"]]])
        )  # fmt: skip
    return panel(table(head, body, "Shares of right answers, the candidate's beside the present bundle's."))


def _feedback(told: Mapping[str, Any]) -> Markup:
    words = (
        f"{count(told['said'])} pieces of feedback: {count(told['train'])} rows to learn from, "
        f"{count(told['validation'])} to validate with, {count(told['test'])} to test with, and "
        f"{count(told['replayed'])} replayed; {count(sum(told['aside'].values()))} set aside."
    )
    body: list[tuple[str, Sequence[Child]]] = [(reason, [count(n)]) for reason, n in told["aside"].items()]
    return panel(tag("p", words), table(["reason", "set aside"], body, "What was not learned from.") if body else None)
