"""Pastes measured figures into README.md and docs/*.md: `python -m tests.bench.figures`, or `make figures`.

Between ``<!-- figures:NAME -->`` and ``<!-- /figures -->`` stands a table of runs/bench/NAME.json; figures are never
typed. Rows that say ``ROW | COLUMN`` become a grid. A block whose file is not there is left as it is, and said.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(<!-- figures:([a-z_]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def paste(text: str, bench: Path) -> tuple[str, list[str]]:
    """The text with its blocks filled from the JSON files of a folder, and the names whose file is not there."""
    missing: list[str] = []

    def fill(match: re.Match[str]) -> str:
        file = bench / f"{match[2]}.json"
        if not file.exists():
            missing.append(match[2])
            return match[0]
        return f"{match[1]}{markdown(json.loads(file.read_text()))}{match[3]}"

    return _BLOCK.sub(fill, text), missing


def markdown(measured: dict[str, Any]) -> str:
    """A measurement as a table, and the machine it was made on."""
    if all(" | " in row["what"] for row in measured["rows"]):
        units = {row["unit"] for row in measured["rows"]}  # of one unit is what follows from a formula, of no machine
        return grid(measured["rows"]) + ("" if len(units) == 1 else f"\n{_machine(measured['machine'])}\n")
    lines = ["| figure | value | goal | what |", "|---|---|---|---|"]
    for row in measured["rows"]:
        goal = f"{row['goal']} {'✓' if row['met'] else '✗'}" if row["goal"] else ""
        lines.append(f"| `{row['id']}` | {_value(row)} | {goal} | {row['what'].replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, "", _machine(measured["machine"])]) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    gpu = machine["gpu"] or "no GPU"
    return f"{machine['cores']} cores ({machine['cpu']}), {gpu}, Python {machine['python']}, {packages}."


def grid(rows: list[dict[str, Any]]) -> str:
    """Figures by row and column; their unit in the first line, where it is one."""
    cells = {tuple(row["what"].split(" | ")): row["value"] for row in rows}
    across, down = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (1, 0))
    units = {row["unit"] for row in rows}
    lines = [f"| {units.pop() if len(units) == 1 else ''} | {' | '.join(across)} |", "|---|" + "---|" * len(across)]
    lines += [f"| {name} | {' | '.join(f'{_short(cells[name, column])}' for column in across)} |" for name in down]
    return "\n".join(lines) + "\n"


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _value(row: dict[str, Any]) -> str:
    number = f"{row['value']:.1f}" if row["unit"] in ("%", "s") else f"{row['value']:.3g}"
    if abs(row["value"]) >= 1000:
        number = f"{row['value']:,.0f}"
    return number if row["unit"] in ("ratio", "fraction") else f"{number} {row['unit']}"


def main(checkout: Path = CHECKOUT) -> int:
    for page in (checkout / "README.md", *sorted((checkout / "docs").glob("*.md"))):
        before = page.read_text()
        after, missing = paste(before, checkout / "runs" / "bench")
        page.write_text(after)
        print(f"{page}: {'figures pasted' if after != before else 'figures unchanged'}")
        for name in missing:
            print(f"left as it was: runs/bench/{name}.json is not there", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
