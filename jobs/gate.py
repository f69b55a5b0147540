"""Sets a candidate beside the bundle that answers now: the same questions asked of both on Ray, judged by the rules of
`mmagent.gate`.

Writes gate.json, what was found check by check, and gate.html, a page that stands alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.answers import Answerer
from mmagent import examples, gate, gate_page, predictions, storage, succession
from mmagent.bundle import Bundle
from mmagent.examples import Example
from mmagent.gate import Check, Rules
from mmagent.predictor import PartError, Predictor
from mmagent.record import SCHEMA, Record
from mmagent.tasks import make_all

_BATCH_ROWS = 64
_TIMED = 15  # answers
_MODALITIES = ("image", "audio")


def judge(
    before: Bundle,
    after: Bundle,
    sets: Mapping[str, Sequence[Record]],
    rules: Rules,
    out: Path,
    *,
    feedback: Mapping[str, Any] | None = None,
    workers: int = 2,
    threads: int = 1,
    seed: int = 0,
) -> tuple[dict[str, Any], pa.Table]:
    """The verdict, as gate.json holds it, and the candidate's answers; on the connected Ray.

    Args:
        sets: questions with their right answers, by `gate.FIXED`, `gate.NEW`, `gate.EARLIER`.
        feedback: what became of it, to be told.
        workers: processes that answer.

    Raises:
        MisfitError: the candidate was built for something else.
    """
    succession.check(succession.of_bundle(before), succession.of_bundle(after))
    asked = [replace(record, id=f"{name}:{record.id}") for name, records in sets.items() for record in records]
    missing = next((kind for kind in _MODALITIES if any(kind in each.modalities for each in asked)), None)
    was, now = (_answers(each, asked, rules, missing, workers, threads) for each in (before, after))
    checks = gate.compare(was, now, rules, seed=seed)
    if (timed := _timed(before, after, asked, rules)) is not None:
        checks.append(timed)
    flips = gate.flips(was, now, seed=seed)
    changed = [bool(b) - bool(a) for a, b in zip(_right(was), _right(now), strict=True)]
    verdict = {
        "accepted": gate.passed(checks),
        "before": before.name,
        "after": after.name,
        "bundles": {"before": str(before.path), "after": str(after.path)},
        "created_ms": int(time.time() * 1000),
        "rules": rules.model_dump(mode="json"),
        "checks": [each.to_dict() for each in checks],
        "flips": {"gained": changed.count(1), "lost": changed.count(-1)},
        **({"feedback": dict(feedback)} if feedback else {}),
    }
    storage.publish_json(out / "gate.json", verdict)
    shown = _shown(now, after, asked, flips)
    storage.publish(out / "gate.html", gate_page.page(verdict, shown, after.config.data.media))
    return verdict, now


def _answers(
    found: Bundle, asked: Sequence[Record], rules: Rules, without: str | None, workers: int, threads: int
) -> pa.Table:
    """The predictions of a bundle, in the order of their ids; `set` is the part before the colon."""
    from jobs import stream  # brings Ray, which reads its environment when it is imported

    if not asked:
        return predictions.schema(rules.slices).append(pa.field("set", pa.string())).empty_table()
    rows = pa.Table.from_pylist([record.to_row() for record in asked], SCHEMA)
    kwargs = {"bundle": str(found.path), "slices": rules.slices, "without": without, "threads": threads}
    parts = stream.over(rows, Answerer, kwargs, workers=workers, batch_rows=_BATCH_ROWS, threads=threads)
    table = pa.concat_tables(parts).cast(predictions.schema(rules.slices))
    table = table.sort_by([("id", "ascending"), ("without", "ascending")])
    names = pc.list_element(pc.split_pattern(table["id"], ":", max_splits=1), 0)
    ids = pc.list_element(pc.split_pattern(table["id"], ":", max_splits=1), 1)
    return table.set_column(0, "id", ids).append_column("set", names)


def _right(table: pa.Table) -> list[Any]:
    return table.filter(pc.equal(table["without"], ""))["right"].to_pylist()


def _timed(before: Bundle, after: Bundle, asked: Sequence[Record], rules: Rules) -> Check | None:
    """One question after the other, of both in turn; the middle time of each."""
    if not asked:
        return None
    pair = [Predictor.load(each.path, cache_mb=0) for each in (before, after)]
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(_TIMED):
        record = asked[index % len(asked)]
        for predictor, spent in zip(pair, times, strict=True):
            began = time.perf_counter()
            answer = predictor.attempt([replace(record, task=predictor.task)])[0]
            if not isinstance(answer, PartError):
                spent.append(1000 * (time.perf_counter() - began))
    if not all(times):
        return None
    return gate.slower(statistics.median(times[0]), statistics.median(times[1]), rules)


def _shown(
    table: pa.Table, found: Bundle, asked: Sequence[Record], flips: Mapping[tuple[str, str], str]
) -> list[Example]:
    """The candidate's answers to questions that only one of the two answers rightly."""
    tasks, records = make_all(found.tasks), {record.id: record for record in asked}
    out = []
    for row in table.filter(pc.equal(table["without"], "")).to_pylist():
        heading = flips.get((row["set"], row["id"]))
        if heading is not None and row["error"] is None:
            record = records[f"{row['set']}:{row['id']}"]
            out.append(examples.shown(record, row, tasks[record.task], heading))
    return sorted(out, key=lambda each: (each.group, each.record.id))
