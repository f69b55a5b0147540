"""Whether confidence means what it says, and whether evidence is what the answer hangs on.

    make bench-confidence       (python -m tests.bench.confidence [--bundle demo] [--data easy_vqa] [--answers 512])

- `confidence.ece`: the expected calibration error on test questions, all forms and with their pictures.
- `confidence.deletion_ratio`: words, picture regions and stretches of sound are taken from a question, once the top
  fifth by evidence and once a random fifth: the ratio of how far the answer's probability falls, over all answers; with
  its 95 % interval (bootstrap over answers).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jobs import cluster
from mmagent import explain, metrics, storage
from mmagent.arguments import Parser, positive
from mmagent.measurement import Row, publish, table
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.shards import Dataset

SMALL = os.environ.get("SCALE") == "small"


def main(argv: Sequence[str] | None = None, checkout: Path = cluster.CHECKOUT) -> int:
    parser = Parser("tests.bench.confidence", __doc__)
    parser.add_argument("--bundle", default="demo", help="a bundle that classifies (%(default)s)")
    parser.add_argument("--data", default="easy_vqa", help="whose test questions are asked (%(default)s)")
    parser.add_argument("--answers", type=positive, default=16 if SMALL else 512)
    parser.add_argument("--calibrate", type=positive, default=64 if SMALL else 4096, help="answers for the calibration")
    parser.add_argument("--method", choices=get_args(explain.Method), default="integrated_gradients")
    args = parser.parse_args(argv)
    predictor = Predictor.load(args.bundle, threads=2)
    records = _records(Dataset.open(storage.folder("data", args.data)), max(args.answers, args.calibrate))
    rows = [
        *_calibration(predictor, records[: args.calibrate]),
        *_deletion(predictor, records[: args.answers], args.method),
    ]
    publish("confidence", rows, checkout)
    print(table(rows))
    return 0


def _records(dataset: Dataset, count: int) -> list[Record]:
    """Test rows, evenly spread over all of them."""
    import pyarrow.parquet as pq

    files = dataset.shard_files("test")
    step = max(1, dataset.rows("test") // count)
    out: list[Record] = []
    number = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=512):
            for row in batch.to_pylist():
                if number % step == 0 and len(out) < count:
                    out.append(Record.from_row(row))
                number += 1
    return out


def _calibration(predictor: Predictor, records: list[Record]) -> list[Row]:
    answers = predictor.predict(records)
    right = [answer.label == record.target.label for answer, record in zip(answers, records, strict=True)]
    found = metrics.calibration(metrics.Marked(np.array([answer.confidence for answer in answers]), np.array(right)))
    what = f"expected calibration error over {len(records):,} test questions, {100 * np.mean(right):.1f} % right"
    return [Row("confidence.ece", found["ece"], "fraction", what, "<= 0.03")]


def _deletion(predictor: Predictor, records: list[Record], method: explain.Method) -> list[Row]:
    rng = np.random.default_rng(0)
    top, random = [], []
    for record in records:
        sample = predictor.prepare(record)
        [answer] = predictor.answer([sample])
        evidence = explain.explain(predictor, sample, answer, method)
        units = evidence.units()
        count = max(1, round(len(units) / 5))
        ranked = sorted(range(len(units)), key=lambda at: -units[at][0])[:count]
        drawn = rng.choice(len(units), count, replace=False)
        taken = [[units[at][1] for at in chosen] for chosen in (ranked, drawn)]
        variants = [explain.without(predictor, sample, evidence, each) for each in taken]
        before = answer.probabilities[str(answer.label)]
        after = [each.probabilities[str(answer.label)] for each in predictor.answer(variants)]
        top.append(before - after[0])
        random.append(before - after[1])
    ratio = _ratio(np.array(top), np.array(random))
    draws = rng.integers(0, len(top), (2000, len(top)))
    low, high = np.percentile([_ratio(np.array(top)[each], np.array(random)[each]) for each in draws], [2.5, 97.5])
    what = (
        f"fall of the answer's probability without the top fifth of the evidence ({100 * np.mean(top):.1f} points) to "
        f"that without a random fifth ({100 * np.mean(random):.1f}), {len(top)} answers, {method}; 95 % {low:.2f} to "
        f"{high:.2f}"
    )
    return [
        Row("confidence.deletion_ratio", ratio, "ratio", what, ">= 2"),
        Row("confidence.deletion_ratio_low", float(low), "ratio", "the lower end of its 95 % interval", "> 1"),
    ]


def _ratio(top: np.ndarray, random: np.ndarray) -> Any:
    return float(top.mean() / max(random.mean(), 1e-6))


if __name__ == "__main__":
    sys.exit(main())
