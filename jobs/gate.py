"""Sets a candidate beside the bundle that answers now: the same questions asked of both on Ray, judged by the rules of
`mmagent.gate`.

Robustness is asked with a modality taken away, and with each made noisy (`mmagent.disturbed`). Gaps between groups,
answers that change with words swapped, and repeated training texts are checks as well.

Writes gate.json, what was found check by check, and gate.html, a page that stands alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import counterfactual, verbatim
from jobs.answers import Answerer
from mmagent import disturbed, examples, gate, gate_page, metrics, predictions, storage, succession
from mmagent.batch import PartError
from mmagent.bundle import Bundle
from mmagent.examples import Example
from mmagent.gate import Check, Rules
from mmagent.media import Limits
from mmagent.predictor import Predictor
from mmagent.record import SCHEMA, Record
from mmagent.shards import Dataset, DatasetError
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
    words = counterfactual.load(Path(rules.swap)) if rules.swap else None
    asked = [replace(record, id=f"{name}:{record.id}") for name, records in sets.items() for record in records]
    noisy = _noisy(sets.get(gate.FIXED, ()), rules, after.config.data.media, seed)
    missing = next((kind for kind in _MODALITIES if any(kind in each.modalities for each in asked)), None)
    tables = [_answers(each, [*asked, *noisy], rules, missing, workers, threads) for each in (before, after)]
    told = [_told_noisy(each) for each in tables]
    checks = gate.compare(told[0], told[1], rules, seed=seed)
    was, now = (each.filter(pc.invert(pc.starts_with(each["set"], gate.NOISY))) for each in tables)
    checks += gate.gaps(was, now, make_all(after.tasks), rules, seed=seed)
    audit, more = _audited((before, after), (was, now), sets.get(gate.FIXED, ()), words, rules, workers, threads, seed)
    checks += more
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
        **({"audit": audit} if audit else {}),
    }
    storage.publish_json(out / "gate.json", verdict)
    shown = _shown(now, after, asked, flips)
    storage.publish(out / "gate.html", gate_page.page(verdict, shown, after.config.data.media))
    return verdict, now


def _noisy(fixed: Sequence[Record], rules: Rules, limits: Limits, seed: int) -> list[Record]:
    """Questions of the fixed test set with one kind of input made worse, of each kind as many as the rules say."""
    out = []
    order = np.random.default_rng([seed, 1]).permutation(len(fixed))
    for kind in disturbed.KINDS:
        having = (fixed[index] for index in order if kind in fixed[index].modalities)
        made = (disturbed.disturbed(record, kind, limits, seed) for record in having)
        found = islice((each for each in made if each is not None), rules.noisy_rows)
        out += [replace(each, id=f"{gate.NOISY}{kind}:{each.id}") for each in found]
    return out


def _told_noisy(table: pa.Table) -> pa.Table:
    """The table with noisy questions as questions of the fixed test set that are asked in another way."""
    noisy = pc.starts_with(table["set"], gate.NOISY)
    table = table.filter(pc.invert(pc.and_(noisy, pc.not_equal(table["without"], ""))))  # both at once is no check
    noisy = pc.starts_with(table["set"], gate.NOISY)
    ways = pc.if_else(noisy, table["set"], table["without"])
    table = table.set_column(table.column_names.index("without"), "without", ways)
    names = pc.if_else(noisy, gate.FIXED, table["set"])
    return table.set_column(table.column_names.index("set"), "set", names)


def _audited(
    pair: tuple[Bundle, Bundle], tables: tuple[pa.Table, pa.Table], fixed: Sequence[Record],
    words: Mapping[str, str] | None, rules: Rules, workers: int, threads: int, seed: int,
) -> tuple[dict[str, Any], list[Check]]:  # fmt: skip
    """What swapped words change, and what is repeated of training texts: of the candidate as `jobs.evaluate` tells it,
    and as checks beside the present bundle's."""
    parts = [each.filter(pc.equal(each["set"], gate.FIXED)) for each in tables]
    audit: dict[str, Any] = {}
    checks = []
    if words:
        was, now = (
            counterfactual.changed(str(found.path), fixed, part, words, {}, workers=workers, threads=threads, seed=seed)
            for found, part in zip(pair, parts, strict=True)
        )
        audit["counterfactual"] = now
        if now["changed"] and was["changed"]:
            name = f"{gate.FIXED}, answers that change with words swapped"
            before = was["changed"]["value"]
            checks.append(gate.bounded(name, now["n"], before, now["changed"], rules.max_swapped, "max_swapped"))
    for task in (name for name, info in pair[1].tasks.items() if info.kind == "generate"):
        found = [_copied(bundle, part, fixed, task) for bundle, part in zip(pair, parts, strict=True)]
        if found[1] is None or not found[1]["n"]:
            continue
        audit.setdefault("verbatim", {})[task] = found[1]
        shares = [metrics.share(_hits(each), seed=seed) if each and each["n"] else None for each in found]
        after: Any = shares[1]
        repeated = float(shares[0]["value"] or 0.0) if shares[0] else 0.0
        name = f"{gate.FIXED}, {task}, answers that repeat training text"
        checks.append(gate.bounded(name, found[1]["n"], repeated, after, rules.max_verbatim, "max_verbatim"))
    return audit, checks


def _copied(found: Bundle, table: pa.Table, asked: Sequence[Record], task: str) -> dict[str, Any] | None:
    """Of `jobs.verbatim`; none where what a bundle learned from is not here."""
    try:
        learned = Dataset.open(storage.folder("data", str(found.manifest.get("data"))))
    except (DatasetError, storage.StorageError):
        return None
    return verbatim.repeated(table.filter(pc.equal(table["task"], task)), asked, learned, task)


def _hits(found: Mapping[str, Any]) -> np.ndarray:
    """(n,) 1.0 for each answer that repeats something."""
    return (np.arange(found["n"]) < found["repeated"]).astype(float)


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
