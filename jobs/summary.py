"""An evaluation in a few lines, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import transfer, wording
from mmagent.charts import percent
from mmagent.evaluation import blocks


def table_of(result: Mapping[str, Any]) -> str:
    """A table for each task: all rows and each slice, with the main metric and what is shown beside it."""
    tasks = blocks(result)
    lines = []
    for name, block in tasks.items():
        lines += [f"task {name}"] if len(tasks) > 1 else []
        lines += [*_rows(block), *_notes(block)]
    if "own" in result:
        lines += _beside(result)
    for name, errors in result.get("unanswered", {}).items():
        lines += [f"task {name}: not answered: {count} x {reason}" for reason, count in errors["reasons"].items()]
    return "\n".join(lines)


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _rows(block: Mapping[str, Any]) -> list[str]:
    others: Mapping[str, Any] = block.get("before", {})
    main, beside = block["main"], wording.beside(block)
    named = [name.replace("_", " ") for name in others]
    lines = [["", "answers", wording.name(main), "95 % interval", *map(wording.name, beside), *named]]
    for name, part in {"all": block, **block["slices"]}.items():
        found = part["metrics"][main]
        low, high = (wording.written(main, found[end]) if found[end] is not None else "-" for end in ("low", "high"))
        cells = [name, f"{part['n']:,}", wording.value(part, main), f"{low} to {high}"]
        cells += [wording.value(part, metric) for metric in beside]
        for other in others.values():
            there = other if name == "all" else other["slices"].get(name)
            cells.append(wording.value(there, main) if there else "-")
        lines.append(cells)
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]


def _beside(result: Mapping[str, Any]) -> list[str]:
    """The same bundle at home and here."""
    own = result["own"]
    lines = [("", f"{own['data']} ({own['split']})", f"{result['data']} ({result['split']})")]
    lines += [(f"{task}: {wording.name(metric)}", home, here) for task, metric, home, here in transfer.rows(result)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return [
        "",
        "the same bundle on its own data set and on this one",
        *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines),
    ]


def _notes(block: Mapping[str, Any]) -> list[str]:
    lines = []
    if (blind := block.get("blind")) and blind["n"]:
        lines.append(
            f"without {blind['without']}: confidence {percent(blind['mean_confidence'])}, right "
            f"{percent(blind['accuracy'])}, gap {percent(blind['gap'])} ({blind['n']:,} questions)"
        )
    if block["cut"]:
        lines.append(wording.cut(block))
    lines += [f"not answered: {count} x {reason}" for reason, count in block["errors"]["reasons"].items()]
    if block["unknown_labels"]:
        named = [f"{label} ({rows:,})" for label, rows in block["unknown_labels"].items()]
        lines.append(
            f"labels this bundle cannot answer, counted as wrong: {some(named)}: {block['unknown_rows']:,} of "
            f"{block['n']:,} rows"
        )
    return lines
